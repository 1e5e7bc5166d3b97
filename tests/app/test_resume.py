"""Stopping and going on, with the real binary: --max-time, signals, exit code 75, --resume, and that a resumed file is
the file of a run that nobody disturbed. Needs h5py."""

import os
import re
import shutil
import signal
import subprocess
import time
import unittest

import h5py

from harness import BINARY, HANG, MPIEXEC, SMALL, AppTest
from same_result import differences

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")

OK, USAGE, FILE, INTERRUPTED = 0, 2, 6, 75

# Prefills, so that a point is many short repetitions: a quarter of a second each, and the same samples in every run.
SWEEP = SMALL.replace('"decode"', '"prefill"').replace("context = 64", "context = [192, 256, 320, 384]").replace(
    "steps = 3", "steps = 120")
TWO_POINTS = SMALL.replace("context = 64", "context = [64, 96]")


class ResumeTest(AppTest):
    def start(self, *arguments, ranks=0, environment=None):
        command = [BINARY, *arguments]
        if ranks:
            command = [MPIEXEC, "-n", str(ranks), "--oversubscribe", "--allow-run-as-root", *command]
        run = subprocess.Popen(command, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=dict(os.environ, OMP_NUM_THREADS="1", **(environment or {})))
        self.addCleanup(run.kill)
        return run

    def path(self, name):
        return os.path.join(self.folder, name)

    def wait_for(self, what, run):
        end = time.monotonic() + HANG
        while not what():
            self.assertIsNone(run.poll(), "it ended by itself")
            self.assertLess(time.monotonic(), end)
            time.sleep(0.01)

    def attributes(self, name):
        with h5py.File(self.path(name)) as file:
            return dict(file.attrs), [dict(point.attrs) for point in file["points"].values()]

    def undisturbed(self, text, *arguments, ranks=0):
        """The file that the input gives when nothing happens, as reference.h5."""
        self.write("in.toml", text)
        self.assert_ok(self.nsa("run", "in.toml", *arguments, ranks=ranks))
        os.rename(self.path("result.h5"), self.path("reference.h5"))

    def assert_as_undisturbed(self):
        self.assertEqual(differences(self.path("reference.h5"), self.path("result.h5")), [])
        self.assertEqual(sorted(os.listdir(self.folder)), ["in.toml", "reference.h5", "result.h5"])


class Stopping(ResumeTest):
    def test_a_signal_seals_and_resume_completes(self):
        for ranks, sent in ((2, signal.SIGUSR1), (0, signal.SIGUSR2), (0, signal.SIGTERM), (0, signal.SIGINT),
                            (0, signal.SIGHUP)):
            with self.subTest(ranks=ranks, signal=sent.name):
                self.undisturbed(SWEEP, ranks=ranks)
                run = self.start("run", "in.toml", ranks=ranks)
                self.wait_for(lambda: os.path.exists(self.path("result.h5")), run)
                run.send_signal(sent)  # mpirun hands USR1 on
                out, err = run.communicate(timeout=HANG)
                self.assertEqual(run.returncode, INTERRUPTED, out + err)
                self.assertRegex(out.splitlines()[-1],
                                 r"^RESULT: INTERRUPTED \([1-3] of 4 points are finished; go on with --resume\)$")
                root, points = self.attributes("result.h5")
                self.assertEqual(root["status"], "interrupted")
                self.assertNotEqual(root["end"], "")
                self.assertEqual({point["stop_reason"] for point in points}, {"steps"})
                self.assertLess(len(points), 4)
                done = self.assert_ok(self.nsa("run", "in.toml", "--resume", ranks=ranks))
                self.assertIn(f"result.h5: going on after {len(points)} points", done.out)
                self.assertEqual(len(re.findall(r"^ +\d+ .*/", done.out, re.MULTILINE)), 4)
                self.assertEqual(done.out.splitlines()[-1], "RESULT: VALID")
                self.assert_as_undisturbed()
                os.remove(self.path("result.h5"))

    @staticmethod
    def catches(pid, number):
        with open(f"/proc/{pid}/status") as file:
            caught = next(line for line in file if line.startswith("SigCgt:"))
        return int(caught.split()[1], 16) >> (number - 1) & 1

    @staticmethod
    def processor_seconds(pid):
        with open(f"/proc/{pid}/stat") as file:
            user, system = file.read().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def test_a_signal_that_nohup_ignores_stays_ignored(self):
        self.write("in.toml", SWEEP)
        library = os.environ.get("NSA_HANGUP_TAKEN")  # takes SIGHUP before the program sees that it is ignored
        for environment in [{}] + ([{"LD_PRELOAD": library}] if library else []):
            before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
            try:
                run = self.start("run", "in.toml", "--set", "run.context=65536", environment=environment)
            finally:
                signal.signal(signal.SIGHUP, before)
            self.wait_for(lambda run=run: self.catches(run.pid, signal.SIGUSR1), run)
            self.wait_for(lambda run=run: not self.catches(run.pid, signal.SIGHUP), run)
            run.send_signal(signal.SIGHUP)
            run.kill()
            run.communicate(timeout=HANG)
            self.assertEqual(run.returncode, -signal.SIGKILL)

    def test_a_second_interrupt_ends_it_at_once(self):
        self.write("in.toml", SWEEP.replace("steps = 120", "steps = 2\nmin_time = 60.0"))
        run = self.start("run", "in.toml", "--set", "run.context=65536")  # a repetition takes long
        self.wait_for(lambda: self.processor_seconds(run.pid) > 1, run)  # it computes
        run.send_signal(signal.SIGINT)
        self.wait_for(lambda: not self.catches(run.pid, signal.SIGINT), run)
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=10)
        self.assertEqual(run.returncode, -signal.SIGINT)

    def test_max_time_again_and_again(self):
        self.undisturbed(SWEEP, ranks=2)
        # The limit grows by less than the number of points: on any machine some round finishes some points and not all.
        limit = 0.05
        resume = ("run", "in.toml", "--resume", "--max-time")
        while (done := self.nsa(*resume, f"{limit:.3f}s", ranks=2)).code == INTERRUPTED:
            limit *= 1.7
            self.assertLess(limit, 60)
        self.assert_ok(done)
        self.assert_as_undisturbed()
        self.assertGreater(self.attributes("result.h5")[0]["resumed"], 0)

    def test_every_kind_stops_within_a_point(self):
        # Each would take many minutes.
        text = SMALL.replace("steps = 3", "steps = 1000000\ncheck = false").replace("context = 64", "context = 2048")
        self.write("in.toml", text + f"[needle]\ndepths = {[i / 20000 for i in range(20000)]}\n")
        for kind in ("decode", "prefill", "kernels", "needle"):
            with self.subTest(kind=kind):
                done = self.nsa("run", "in.toml", "--max-time", "2", "--set", f'task.kind="{kind}"', ranks=2)
                self.assertEqual(done.code, INTERRUPTED, done.out + done.err)
                self.assertIn("0 of 1 points are finished", done.out)
                self.assertEqual(os.listdir(self.folder), ["in.toml"])

    def test_no_time_at_all(self):
        self.write("in.toml", SMALL)
        for limit in ("0", "0s", "0.0m", "0h", "00:00:00"):
            done = self.nsa("run", "in.toml", "--max-time", limit)
            self.assertEqual(done.code, INTERRUPTED, done.out + done.err)
            self.assertEqual(done.out, "RESULT: INTERRUPTED (0 of 1 points are finished; go on with --resume)\n")
            self.assertEqual(os.listdir(self.folder), ["in.toml"])
        for limit in ("90", "90s", "10m", "1.5h", "100:59:59"):
            self.assert_ok(self.nsa("run", "in.toml", "--max-time", limit, "--output", limit + ".h5"))

    def test_what_is_no_duration(self):
        self.write("in.toml", SMALL)
        for limit in ("soon", "-1", "1d", "10:60", "00:60:00", "1:00:0x", "nan", "inf", "5 s"):
            done = self.nsa("run", "in.toml", f"--max-time={limit}")
            self.assertEqual(done.code, USAGE, done.out + done.err)
            self.assertIn(f"nsa: error: --max-time {limit} (not a duration); give seconds, or 90s", done.err)

    def test_a_point_cut_short_after_its_steps_is_kept_until_it_is_redone(self):
        text = SMALL.replace("steps = 3", "steps = 3\nmin_time = 4.0")
        text = text.replace("warmup = 1", 'warmup = 1\nmodes = ["total"]')
        self.write("in.toml", text)
        for limit in range(1, 60):  # a busy machine may need longer to come to it
            done = self.nsa("run", "in.toml", "--max-time", str(limit), ranks=2)
            self.assertEqual(done.code, INTERRUPTED, done.out + done.err)
            self.assertIn("0 of 1 points are finished", done.out)
            if os.path.exists(self.path("result.h5")):
                break
        root, (point,) = self.attributes("result.h5")
        self.assertEqual((root["status"], point["stop_reason"]), ("interrupted", "interrupted"))
        with h5py.File(self.path("result.h5")) as file:
            reps = file["points/0000/rep"].size
            self.assertGreater(reps, 0)
            self.assertEqual(reps % 3, 0)  # whole passes
        done = self.assert_ok(self.nsa("run", "in.toml", "--resume", ranks=2))
        self.assertIn("going on after 0 points", done.out)
        root, (point,) = self.attributes("result.h5")
        self.assertEqual((root["status"], point["stop_reason"]), ("complete", "min_time"))
        with h5py.File(self.path("result.h5")) as file:
            times = file["points/0000/time"][0, -1]
            self.assertGreater(times.shape[1], 3)  # more than one pass
            self.assertTrue(times.nbytes > 1 << 19 or times.max(axis=0).sum() >= 4.0)  # of many passes, some are stored


class Resuming(ResumeTest):
    def test_without_a_file_it_starts_anew(self):
        self.write("in.toml", SMALL)
        done = self.assert_ok(self.nsa("run", "in.toml", "--resume"))
        self.assertNotIn("going on", done.out)
        self.assertEqual(self.attributes("result.h5")[0]["resumed"], 0)

    def test_a_complete_file_is_shown_and_left_alone(self):
        self.write("in.toml", SMALL)
        before = self.assert_ok(self.nsa("run", "in.toml", "--csv", "a.csv", ranks=2)).out
        with open(self.path("result.h5"), "rb") as file:
            bytes_before = file.read()
        done = self.assert_ok(self.nsa("run", "in.toml", "--csv", "a.csv", "--resume", ranks=2))
        self.assertEqual(done.out, "result.h5 is complete: 1 points\n" + before)
        with open(self.path("result.h5"), "rb") as file:
            self.assertEqual(file.read(), bytes_before)

    def interrupted_file(self, *arguments, ranks=0, text=TWO_POINTS):
        """result.h5 with one of two points."""
        self.write("in.toml", text)
        self.assert_ok(self.nsa("run", "in.toml", *arguments, ranks=ranks))
        with h5py.File(self.path("result.h5"), "r+") as file:
            del file["points/0001"]
            file.attrs["status"] = "running"

    def test_a_file_that_says_it_is_complete_and_is_not_is_completed(self):
        self.interrupted_file()
        self.edit(lambda file: file.attrs.__setitem__("status", "complete"))
        done = self.assert_ok(self.nsa("run", "in.toml", "--resume"))
        self.assertIn("going on after 1 points", done.out)
        self.assertEqual(len(self.attributes("result.h5")[1]), 2)

    def refuses(self, parts, *arguments, code=USAGE, ranks=0):
        with open(self.path("result.h5"), "rb") as file:
            before = file.read()
        done = self.nsa("run", "in.toml", "--resume", *arguments, ranks=ranks)
        self.assertEqual(done.code, code, done.out + done.err)
        self.assertEqual(done.err.count("nsa: "), 1, done.err)
        for part in parts:
            self.assertIn(part, done.err)
        with open(self.path("result.h5"), "rb") as file:
            self.assertEqual(file.read(), before)

    def edit(self, change):
        with h5py.File(self.path("result.h5"), "r+") as file:
            change(file)

    def test_another_input_is_refused(self):
        self.interrupted_file()
        self.refuses(["cannot resume result.h5 (nsa.w: 512 there, 32 here; run.steps: 3 there, 5 here); give what it "
                      "was begun with, or start anew with another --output"],
                     "--set", "run.steps=5", "--set", "nsa.w=32")
        self.refuses(["run.context: [64, 96] there, [64, 128] here"], "--set", "run.context=[64, 128]")
        self.refuses(["output.tensors: false there, true here"], "--set", "output.tensors=true")
        self.assert_ok(self.nsa("run", "in.toml", "--resume", "--set", "run.backend=auto", "--set", "parallel.heads=1"))

    def test_another_program_layout_or_machine_is_refused(self):
        self.interrupted_file(ranks=2)
        self.refuses(["ranks: 2 there, 1 here"])
        self.refuses(["heads x kv: 2 x 1 there, 1 x 2 here"], "--set", "parallel.kv=2", ranks=2)
        self.edit(lambda file: file.attrs.__setitem__("git_commit", "abc"))
        self.refuses(["commit: abc there, "], ranks=2)
        os.remove(self.path("result.h5"))
        self.interrupted_file(ranks=2)
        self.edit(lambda file: file["system/threads"].__setitem__(1, 2))
        self.refuses(["threads of rank 1: 2 there, 1 here"], ranks=2)
        self.edit(lambda file: file["system/threads"].__setitem__(1, 1))
        self.edit(lambda file: file["system/cpu"].__setitem__(1, "another CPU"))
        self.refuses(["cpu of rank 1: another CPU there, "], ranks=2)
        self.edit(lambda file: file["system/gpu"].__setitem__(0, "a GPU"))
        self.refuses(["gpu of rank 0: a GPU there, none here"], ranks=2)

    def test_another_host_of_the_same_kind_is_taken_and_named(self):
        self.interrupted_file(ranks=2)
        self.edit(lambda file: file["system/host"].__setitem__(slice(None), "elsewhere"))
        self.assert_ok(self.nsa("run", "in.toml", "--resume", ranks=2))
        here = os.uname().nodename
        with h5py.File(self.path("result.h5")) as file:
            self.assertEqual(list(file["system/host"].asstr()), [f"elsewhere,{here}"] * 2)

    def test_another_content_of_the_input_file_is_refused(self):
        self.write("in.toml", SMALL)
        self.assert_ok(self.nsa("run", "in.toml", "--output", "x.h5", "--set", "output.tensors=true"))
        shutil.copy(self.path("x.h5"), self.path("moved.h5"))
        self.interrupted_file("--set", 'input.file="x.h5"', text=SMALL + 'force_branch = ["none", "sel"]\n')
        with h5py.File(self.path("x.h5"), "r+") as file:
            y = file["points/0000/tensors/x"]
            y[0, 0, 0] = y[0, 0, 0] + 1
        self.assertEqual(os.path.getsize(self.path("x.h5")), os.path.getsize(self.path("moved.h5")))
        self.refuses(["content of [input] file (SHA-256): "], "--set", 'input.file="x.h5"')
        self.assert_ok(self.nsa("run", "in.toml", "--resume", "--set", 'input.file="moved.h5"'))

    def test_another_fingerprint_is_refused(self):
        self.interrupted_file()
        self.edit(lambda file: file["points/0000"].attrs.__setitem__("fingerprint", "0"))
        self.refuses(["point 0 has another fingerprint"])

    def test_what_is_no_result_is_refused(self):
        self.write("in.toml", SMALL)
        self.write("result.h5", "precious")
        self.refuses(["cannot read result.h5 (", "file signature not found"], code=FILE)

    def test_a_killed_run_is_taken_up_and_its_leftovers_go(self):
        self.undisturbed(SWEEP, ranks=2)
        run = self.start("run", "in.toml", ranks=2)
        self.wait_for(lambda: os.path.exists(self.path("result.h5")), run)
        with open(f"/proc/{run.pid}/task/{run.pid}/children") as file:
            os.kill(int(file.read().split()[0]), signal.SIGKILL)
        run.communicate()
        self.assertNotEqual(run.returncode, 0)
        with open(self.path("result.h5.node7.123.tmp"), "wb") as file:
            file.write(b"\x89HDF\r\n\x1a\n, cut off")
        os.utime(self.path("result.h5.node7.123.tmp"), (1, 1))
        self.write("result.h5.rank1.ops.json", "{}")  # of the run that was killed; it goes with the completion
        self.assertEqual(self.attributes("result.h5")[0]["status"], "running")
        self.assert_ok(self.nsa("run", "in.toml", "--resume", ranks=2))
        self.assert_as_undisturbed()

    def test_a_file_of_an_earlier_version_is_resumed_where_only_program_and_machine_differ(self):
        """data/stopped_run.h5 is of commit 082e9f80b750 and holds one of two points. Only the same program on the same
        kind of machine may resume it (test_earlier_files.py has the refusal): here the file gets this one's facts."""
        for name in ("stopped_run.toml", "stopped_run.h5"):
            shutil.copy(os.path.join(DATA, name), self.folder)
        chunks = ("--set", "parallel.kv_chunk_blocks=16")  # the default of that version
        self.assert_ok(self.nsa("run", "stopped_run.toml", *chunks, "--output", "here.h5"))
        with h5py.File(self.path("stopped_run.h5"), "r+") as file, h5py.File(self.path("here.h5")) as here:
            same_device = file["system/cpu"][0] == here["system/cpu"][0]
            for name in ("git_commit", "compiler"):
                file.attrs[name] = here.attrs[name]
            for name in ("cpu", "gpu", "driver", "cuda", "nccl", "mpi"):
                file[f"system/{name}"][0] = here[f"system/{name}"][0]
            if not same_device:
                file["points/0000"].attrs["fingerprint"] = here["points/0000"].attrs["fingerprint"]
        shutil.copy(self.path("stopped_run.h5"), self.path("before.h5"))
        done = self.assert_ok(self.nsa("run", "stopped_run.toml", *chunks, "--resume"))
        self.assertIn("stopped_run.h5: going on after 1 points", done.out)
        self.assertEqual(done.out.splitlines()[-1], "RESULT: VALID")
        root, points = self.attributes("stopped_run.h5")
        self.assertEqual((root["status"], root["resumed"], len(points)), ("complete", 1, 2))
        for name in ("before.h5", "stopped_run.h5"):  # the point of before is untouched
            with h5py.File(self.path(name), "r+") as file:
                for group in [group for group in file["points"] if group != "0000"]:
                    del file["points"][group]
        found = differences(self.path("before.h5"), self.path("stopped_run.h5"))
        self.assertEqual([line for line in found if "points" in line], [])
        with h5py.File(self.path("before.h5")) as before, h5py.File(self.path("stopped_run.h5")) as after:
            self.assertEqual(before["points/0000/time"][()].tobytes(), after["points/0000/time"][()].tobytes())


if __name__ == "__main__":
    unittest.main(verbosity=2)
