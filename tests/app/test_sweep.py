"""scripts/sweep.py without Slurm: what it runs, skips, survives and sums up."""

import csv
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import unittest

from harness import BINARY, HANG, MPIEXEC, SMALL, AppTest, Finished

SWEEP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts", "sweep.py")
LAUNCH = MPIEXEC + " -n {ranks} --oversubscribe --allow-run-as-root"


class Sweep(AppTest):
    def setUp(self):
        super().setUp()
        self.write("small.toml", SMALL)

    def command(self, text, *arguments):
        self.write("list.sweep", text)
        command = [sys.executable, SWEEP, "list.sweep", "--nsa", BINARY, "--launch", LAUNCH, *arguments]
        environment = dict(os.environ, OMP_NUM_THREADS="1", OMPI_MCA_odls_base_sigkill_timeout="0")
        return {"args": command, "cwd": self.folder, "env": environment, "text": True}

    def sweep(self, text, *arguments):
        done = subprocess.run(**self.command(text, *arguments), capture_output=True, timeout=HANG)
        return Finished(done.returncode, done.stdout, done.stderr)

    def states(self, done):
        """{run: state} of the summary."""
        return dict(re.findall(r"^(\S+) +\d+ +(?:\d+x\d+|auto) (\w+)", done.out, re.MULTILINE))

    def record(self, name):
        with open(os.path.join(self.folder, "list", name + ".state")) as file:
            return json.load(file)

    def test_a_failure_does_not_stop_the_rest_and_done_runs_are_skipped(self):
        text = "# a comment\n2 2x1 small.toml --set model.d_k=15\n1,2 all small.toml\n"
        done = self.sweep(text)
        self.assertEqual(done.code, 1, done.out + done.err)
        states = self.states(done)
        failed = "small_r2_h2_kv1_d_k-15"
        self.assertEqual(states, {failed: "failed", "small_r1_h1_kv1": "done", "small_r2_h1_kv2": "done",
                                  "small_r2_h2_kv1": "done"})
        self.assertRegex(done.out, rf"{failed} .* exit code 2: nsa: error: .*model.d_k")  # the summary says why
        with open(os.path.join(self.folder, "list", "small_r2_h2_kv1.json")) as file:
            told = json.load(file)
        self.assertEqual((told["ranks"], told["heads"], told["kv"]), (2, 2, 1))
        before = os.stat(os.path.join(self.folder, "list", "small_r1_h1_kv1.h5")).st_mtime_ns
        again = self.sweep(text)
        self.assertEqual(again.out.count("there already"), 3, again.out)
        self.assertIn(failed + ": failed before", again.out)
        self.assertEqual((self.states(again), self.record(failed)["attempts"]), (states, 1))
        again = self.sweep(text, "--retry-failed", "--csv", "sweep.csv")
        self.assertEqual((self.states(again), self.record(failed)["attempts"]), (states, 2))
        with open(os.path.join(self.folder, "sweep.csv")) as file:
            rows = {row["run"]: row for row in csv.DictReader(file)}
        self.assertEqual({name: row["state"] for name, row in rows.items()}, states)
        self.assertEqual((rows[failed]["exit_code"], rows[failed]["options"]), ("2", "--set model.d_k=15"))
        self.assertGreater(float(rows["small_r1_h1_kv1"]["seconds"]), 0)
        self.assertEqual(rows["small_r1_h1_kv1"]["unit"], "us")
        self.assertEqual(os.stat(os.path.join(self.folder, "list", "small_r1_h1_kv1.h5")).st_mtime_ns, before)
        self.assertEqual(self.sweep("1 1x1 small.toml\n", "--summary").code, 0)

    def test_the_cause_names_the_signal(self):
        """A launcher that is killed leaves no message; one whose rank says why leaves its first error."""
        self.write("killed.sh", "kill -KILL $$\n")
        self.write("told.sh", "echo 'There are not enough slots available in the system'; echo other error; exit 1\n")
        for script, why in (("killed.sh", r"signal 9 \(SIGKILL\) on \S+, without a message"),
                            ("told.sh", "exit code 1: There are not enough slots available")):
            with self.subTest(script=script):
                done = self.sweep("1 1x1 small.toml\n", "--launch", f"sh {script}", "--retry-failed")
                self.assertEqual(self.states(done), {"small_r1_h1_kv1": "failed"})
                self.assertRegex(done.out, rf"failed +\d s {why}")

    def test_several_at_a_time_share_the_cores(self):
        cores = len(os.sched_getaffinity(0))
        if cores < 2:
            self.skipTest("one core")
        self.write("launch.sh", 'nproc > "nproc.$$"; sleep 2; shift; exec "$@"\n')
        start = time.monotonic()
        done = self.assert_ok(self.sweep("1 auto small.toml\n1 1x1 small.toml\n", "--jobs", "2", "--launch",
                                         "sh launch.sh {ranks}"))
        self.assertLess(time.monotonic() - start, 4 + 2)  # not 2 x 2 s and two runs
        counts = [int(path.read_text()) for path in pathlib.Path(self.folder).glob("nproc.*")]
        self.assertEqual(sorted(counts), [cores // 2, cores - cores // 2])
        self.assertEqual(set(self.states(done).values()), {"done"})
        self.assertIn("sweep: error: --jobs", self.sweep("1 auto small.toml\n", "--jobs", "9999").err)

    def test_status_of_runs_that_did_not_end(self):
        """A run of a process that is gone has failed; one of a living process is running, and not started twice."""
        self.assert_ok(self.sweep("1 auto small.toml\n"))
        own = {"host": socket.gethostname(), "pid": os.getpid(), "state": "running",
               "started": time.time() + 7200}  # since then the clock was set back by two hours
        with open("/proc/self/stat") as file:
            own["start_time"] = file.read().rsplit(")", 1)[1].split()[19]
        for start_time, state in ((own["start_time"], "running"), ("1", "failed")):
            with self.subTest(state=state):
                self.write("list/small_r1_h1_kv1.state", json.dumps(own | {"start_time": start_time}))
                done = self.sweep("1 auto,1x1 small.toml\n", "--status")
                self.assertEqual(self.states(done), {"small_r1_auto": "done", "small_r1_h1_kv1": state})
                self.assertEqual(re.findall(r"1 done, 1 (\w+)(?:; about (?:\d+ s) left)?", done.out), [state], done.out)
                done = self.sweep("1 auto,1x1 small.toml\n")
                self.assertFalse(os.path.exists(os.path.join(self.folder, "list", "small_r1_h1_kv1.h5")), done.out)
        self.assert_ok(self.sweep("1 auto,1x1 small.toml\n", "--retry-failed"))

    def test_submitting_twice_submits_once(self):
        """A Slurm of two scripts: the queue is a file."""
        self.write("queued", "77_0 PENDING\n77_1 PENDING\n")
        self.write("sbatch", '#!/bin/sh\necho "$@" >> calls\ncp queued queue\necho 77\n')
        self.write("squeue", "#!/bin/sh\ncat queue\n")
        for name in ("sbatch", "squeue"):
            os.chmod(os.path.join(self.folder, name), 0o755)
        os.environ["PATH"] = self.folder + os.pathsep + os.environ["PATH"]
        self.addCleanup(os.environ.__setitem__, "PATH", os.environ["PATH"].split(os.pathsep, 1)[1])
        text = "2 1x2,2x1 small.toml\n"
        submit = ("--submit", "script.sh", "--ranks-per-node", "1", "--after", "55")
        self.assert_ok(self.sweep(text, *submit))
        self.assertIn("nothing is left to submit", self.assert_ok(self.sweep(text, *submit)).out)
        with open(os.path.join(self.folder, "calls")) as file:
            self.assertEqual(file.read().splitlines(), ["--parsable --array=0,1 --nodes=2 --ntasks-per-node=1 "
                                                        "--dependency=afterany:55 script.sh list.sweep list"])
        self.assertEqual(set(self.states(self.sweep(text, "--status")).values()), {"queued"})
        self.write("queue", "77_1 RUNNING\n")
        done = self.sweep(text, "--status")
        self.assertEqual(list(self.states(done).values()), ["failed", "running"])
        self.assertIn("job 77_0 ended without a word (sacct -j tells why)", done.out)

    def test_a_signal_ends_it_and_the_same_command_goes_on(self):
        text = "2 1x2,2x1 small.toml --set run.context=[64,72,80,88] --set run.min_time=0.5\n"
        first = os.path.join(self.folder, "list")
        with subprocess.Popen(**self.command(text), stdout=subprocess.PIPE) as sweep:
            end = time.monotonic() + HANG
            while not (os.path.isdir(first) and any(name.endswith(".h5") for name in os.listdir(first))):
                self.assertLess(time.monotonic(), end)
                time.sleep(0.05)
            sweep.send_signal(signal.SIGUSR1)
            done = Finished(None, sweep.communicate(timeout=HANG)[0], "")
        self.assertEqual(sweep.returncode, 75, done.out)
        self.assertEqual(sorted(self.states(done).values()), ["missing", "unfinished"], done.out)
        done = self.assert_ok(self.sweep(text))
        self.assertEqual(set(self.states(done).values()), {"done"})
        log = next(name for name in os.listdir(first) if name.endswith(".log") and "h1_kv2" in name)
        with open(os.path.join(first, log)) as file:
            self.assertRegex(file.read(), r"going on after [1-3] points")

    def test_a_result_of_another_input_is_neither_replaced_nor_counted(self):
        self.assert_ok(self.sweep("1 auto small.toml\n"))
        self.write("small.toml", SMALL + "seed = 2\n")
        done = self.sweep("1 auto small.toml\n")
        self.assertEqual((done.code, self.states(done)), (1, {"small_r1_auto": "stale"}))
        self.assertIn("small.toml has changed since; remove the result or choose another --results", done.out)

    def test_all_is_every_layout_that_the_input_allows(self):
        done = self.assert_ok(self.sweep("1,2,4 all small.toml\n", "--show"))  # two KV groups
        self.assertEqual(re.findall(r"h\d_kv\d", done.out), ["h1_kv1", "h1_kv2", "h2_kv1", "h1_kv4", "h2_kv2"])

    def test_bad_lists_are_told_by_their_line(self):
        for text, message in (
            ("\n1 all\n", "list.sweep:2: a line is: ranks, heads x kv, input, options; see --help"),
            ("0 all small.toml\n", "list.sweep:1: '0' (not rank counts); give positive numbers, like 1,2,4"),
            ("2 2*1 small.toml\n", "list.sweep:1: '2*1' (not a layout); give heads x kv like 2x4, all or auto"),
            ("2 2x2 small.toml\n", "line 1: layout 2x2 (not of 2 ranks); heads x kv is the rank count"),
            ("1 all none.toml\n", "list.sweep:1: none.toml (no such file); give the path of an input from here"),
            ("1 all small.toml 'x\n", "list.sweep:1: No closing quotation; close the quotation"),
            ("2 all small.toml --set model.d_k=15\n", "line 1: no heads x kv of 2 ranks fits small.toml: nsa: error:"),
            ("# nothing\n", "the list is empty; see --help"),
            ("1_0 all small.toml\n", "list.sweep:1: '1_0' (not rank counts)"),
        ):
            with self.subTest(text=text):
                done = self.sweep(text)
                self.assertEqual(done.code, 2)
                self.assertIn("sweep: error: " + message, done.err)
                self.assertEqual(sorted(os.listdir(self.folder)), ["list.sweep", "small.toml"])

    def test_a_summary_replaces_no_file_of_the_sweep(self):
        text = "1 1x1 small.toml\n"
        os.symlink("list.sweep", os.path.join(self.folder, "link"))
        for name in ("list.sweep", "./small.toml", "link", "list/small_r1_h1_kv1.json"):
            done = self.sweep(text, "--status", "--csv", name)
            self.assertEqual(done.code, 2, name)
            self.assertIn(f"cannot write {name} (it is the list, an input or a result); choose", done.err)
        self.assertEqual(pathlib.Path(self.folder, "list.sweep").read_text(), text)
        self.assertEqual(pathlib.Path(self.folder, "small.toml").read_text(), SMALL)
        self.assertIn("--results small.toml (not a folder)", self.sweep(text, "--results", "small.toml").err)
        for option in ("--csv", "--results", "--nsa"):
            self.assertIn(option + " is empty", self.sweep(text, option, "").err)
        self.assertEqual(self.sweep(text, "--stat").code, 2)  # no abbreviations: --summary today, --sum tomorrow?

    def test_an_output_that_ends_early_ends_no_sweep(self):
        text = "\ufeff1 1x1 small.toml\r\n"  # as an editor of another system writes it
        command = self.command(text)
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(**command, stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        with open("/dev/full", "w") as full:
            done = subprocess.run(**command, stdout=full, stderr=subprocess.PIPE)
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr, "sweep: error: cannot write the standard output (No space left on device); "
                                      "--status prints the summary again\n")  # fmt: skip
        for content in ("", "[]", "3"):  # a record that was cut off, or edited
            pathlib.Path(self.folder, "list", "small_r1_h1_kv1.state").write_text(content)
            self.assertEqual(self.states(self.sweep(text, "--status")), {"small_r1_h1_kv1": "done"})
        pathlib.Path(self.folder, "list", "small_r1_h1_kv1.json").write_text("[1]")
        self.assertEqual(self.states(self.sweep(text, "--status")), {"small_r1_h1_kv1": "unfinished"})


if __name__ == "__main__":
    unittest.main()
