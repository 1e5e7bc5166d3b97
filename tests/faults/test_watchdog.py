"""No job hangs: a rank that is stopped, late or out of step ends the job in time, and the message names the rank."""

import concurrent.futures
import json
import math
import os
import re
import signal
import subprocess
import tempfile
import time
import unittest

from harness import BINARY, MPIEXEC, SMALL, AppTest, nsa

DEADLINE = 6  # s, at least. On a busy machine it is as long as a whole run takes, so that no normal wait exceeds it
PROMISED = 15  # s beyond the deadline
AMPLE = 120  # s, for jobs that something else than the deadline has to end
DECODE = SMALL.replace("steps = 3", "steps = 40") + "[parallel]\nheads = 1\nkv_chunk_blocks = 1\n"
PREFILL = DECODE.replace('"decode"', '"prefill"').replace("context = 64", "context = 256")
MISMATCH = "does not match the other ranks"


class WatchdogTest(AppTest):
    def job_folder(self, text):
        folder = tempfile.mkdtemp(dir=self.folder)
        with open(os.path.join(folder, "in.toml"), "w") as file:
            file.write(text)
        return folder

    def job(self, fault, text, ranks, deadline, folder=None):
        """Runs a job in its own folder, so that several can run at a time. Returns its end, folder and seconds."""
        folder = folder or self.job_folder(text)
        start = time.monotonic()
        done = nsa("run", "in.toml", "--deadline", str(deadline), "--output", "r.h5", ranks=ranks, cwd=folder,
                   environment={"NSA_FAULT": fault})
        return done, folder, time.monotonic() - start

    quiet = {}

    def quiet_seconds(self, text, ranks):
        """Seconds of an undisturbed run on this machine. A run may take three times as long when others load it."""
        if (text, ranks) not in self.quiet:
            done, folder, seconds = self.job("", text, ranks, AMPLE)
            self.assert_ok(done)
            self.assertEqual(sorted(os.listdir(folder)), ["in.toml", "r.h5"])  # no report
            self.quiet[text, ranks] = seconds
        return self.quiet[text, ranks]

    def assert_reports(self, folder, ranks):
        names = [f"r.h5.rank{rank}.ops.json" for rank in range(ranks)]
        self.assertEqual(sorted(name for name in os.listdir(folder) if name.endswith(".json")), names)
        for rank, name in enumerate(names):
            with open(os.path.join(folder, name)) as file:
                report = json.load(file)
            self.assertEqual(report["rank"], rank)
            self.assertTrue(0 < len(report["operations"]) <= 64)
            self.assertIn("rank ", report["verdict"])

    def assert_ended(self, job, limit, message, ranks, reports):
        done, folder, seconds = job
        self.assertEqual(done.code, 4, done.err)
        self.assertLess(seconds, limit)
        lines = [line for line in done.err.splitlines() if re.match("nsa: (internal )?(error|warning)", line)]
        self.assertEqual(len(lines), 1, done.err)
        self.assertRegex(lines[0], r"^nsa: error: " + message)
        if reports:
            self.assert_reports(folder, ranks)

    def end(self, faults, text=DECODE, ranks=3, deadline=None, reports=True):
        """Each fault must end its job with its message. The jobs run concurrently, because they mostly wait for the
        deadline. With a deadline given they must end long before it."""
        whole = len(faults) * self.quiet_seconds(text, ranks)
        limit = 3 * whole + PROMISED + (0 if deadline else max(DEADLINE, whole))
        deadline = deadline or math.ceil(max(DEADLINE, whole))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            jobs = {fault: pool.submit(self.job, fault, text, ranks, deadline) for fault in faults}
        for fault, message in faults.items():
            with self.subTest(fault=fault):
                self.assert_ended(jobs[fault].result(), limit, message, ranks, reports)

    def lenient_job(self, fault, deadline, startup_deadline=AMPLE):
        """Runs under a launcher that does not end the other ranks (srun --kill-on-bad-exit=0; here mpirun
        --enable-recovery). Returns stderr, the exit code of every rank, and the seconds."""
        folder = self.job_folder(DECODE)
        save_code = '"$@"; echo $? > code.$OMPI_COMM_WORLD_RANK'
        start = time.monotonic()
        launcher = [MPIEXEC, "--enable-recovery", "-n", "3", "--oversubscribe", "--allow-run-as-root"]
        program = [BINARY, "run", "in.toml", "--deadline", str(deadline), "--startup-deadline", str(startup_deadline),
                   "--output", "r.h5"]
        done = subprocess.run([*launcher, "sh", "-c", save_code, "sh", *program], cwd=folder, capture_output=True,
                              text=True, env=dict(os.environ, NSA_FAULT=fault, OMP_NUM_THREADS="1"), timeout=AMPLE)
        codes = []
        for rank in range(3):
            with open(os.path.join(folder, f"code.{rank}")) as file:
                codes.append(int(file.read()))
        return done.stderr, codes, time.monotonic() - start

    def each_lenient_job(self, action, message, code, deadline=None):
        """Concurrently applies the fault to both ranks with a monitor and to one without."""
        whole = 3 * self.quiet_seconds(DECODE, 3)
        limit = 3 * whole + PROMISED + (0 if deadline else max(DEADLINE, whole))
        deadline = deadline or math.ceil(max(DEADLINE, whole))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            jobs = [pool.submit(self.lenient_job, f"decode.step:rank={rank}:at=20:{action}", deadline)
                    for rank in range(3)]
        for rank, job in enumerate(jobs):
            with self.subTest(rank=rank):
                said, codes, seconds = job.result()
                self.assertRegex(said, rf"nsa: error: rank {rank} \(\S+\) {message}")
                self.assertIn(codes.pop(rank), code, said)
                self.assertEqual(codes, [4, 4], said)
                self.assertLess(seconds, limit)


class Late(WatchdogTest):
    """A rank is stopped or late, and the deadline counts."""

    def test_a_stopped_rank(self):
        self.end({f"decode.step:rank={rank}:at=20:stop":  # both monitors, and a rank without one
                  rf"rank {rank} \(\S+\) is late: no answer for \d+ s, last seen .* "
                  r"\(rank \d \(\S+\): \d+ s in \w+ #\d+ \[\w+, ?\w*\]; the deadline is \d+ s\)"
                  for rank in range(3)})

    def test_a_stopped_rank_in_prefill(self):
        self.end({"prefill.start:rank=1:at=2:stop": r"rank 1 \(\S+\) is late: no answer"}, PREFILL)

    def test_a_stopped_rank_at_the_start(self):
        # Before the input is read the path of the result is unknown.
        self.end({"run.start:rank=1:stop": r"rank 1 \(\S+\) is late: no answer"}, reports=False)

    def test_a_rank_that_runs_without_progress(self):
        self.end({"decode.step:rank=1:at=20:hang": r"rank 1 \(\S+\) is late: \d+ s at work \[decode"})

    def test_a_report_that_cannot_be_written_delays_no_rank(self):
        """A file system that hangs, imitated by pipes without a reader: opening one waits for ever."""
        quiet = self.quiet_seconds(DECODE, 3)
        deadline = math.ceil(max(DEADLINE, quiet))
        folder = self.job_folder(DECODE)
        for rank in range(3):
            os.mkfifo(os.path.join(folder, f"r.h5.rank{rank}.ops.json"))
        job = self.job("decode.step:rank=1:at=20:hang", DECODE, 3, deadline, folder)
        self.assert_ended(job, 3 * quiet + deadline + PROMISED, r"rank 1 \(\S+\) is late", 3, reports=False)

    def test_no_deadline_no_end(self):
        self.write("in.toml", DECODE)
        environment = dict(os.environ, NSA_FAULT="decode.step:rank=1:at=20:stop", OMP_NUM_THREADS="1",
                           OMPI_MCA_odls_base_sigkill_timeout="0")
        with subprocess.Popen([MPIEXEC, "-n", "3", "--oversubscribe", "--allow-run-as-root", BINARY, "run", "in.toml",
                               "--deadline", "0"], cwd=self.folder, env=environment, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as job:
            with self.assertRaises(subprocess.TimeoutExpired):
                job.wait(DEADLINE + 2)
            job.send_signal(signal.SIGTERM)

    def test_a_job_that_was_stopped_as_a_whole_continues(self):
        """Suspended for longer than the deadline, by a user or a scheduler. No rank hung."""
        deadline = math.ceil(max(DEADLINE, self.quiet_seconds(DECODE, 2)))
        self.write("in.toml", DECODE.replace("steps = 40", "steps = 40\nmin_time = 6.0"))
        environment = dict(os.environ, NSA_FAULT="", OMP_NUM_THREADS="1")
        with subprocess.Popen([MPIEXEC, "-n", "2", "--oversubscribe", "--allow-run-as-root", BINARY, "run", "in.toml",
                               "--deadline", str(deadline)], cwd=self.folder, env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True) as job:
            time.sleep(3)
            ranks = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True,
                                                        check=True).stdout.split()]
            self.assertEqual(len(ranks), 2)
            for which, pause in ((signal.SIGSTOP, deadline + 6), (signal.SIGCONT, 0)):
                for pid in ranks:
                    os.kill(pid, which)
                time.sleep(pause)
            out, _ = job.communicate(timeout=100)
        self.assertEqual(job.returncode, 0, out)


class Missing(WatchdogTest):
    """A rank is out of step, or dead or stopped while its launcher ignores that."""

    def test_a_killed_rank_that_the_launcher_ignores(self):
        self.each_lenient_job("kill", "ended unexpectedly", (137,), AMPLE)

    def test_a_stopped_rank_that_the_launcher_ignores(self):
        """The other ranks of its host continue and end it: a stopped rank would remain for ever."""
        self.each_lenient_job("stop", "is late: no answer", (4, 137))

    def test_a_rank_that_dies_at_the_start(self):
        """Between the start of MPI and the connection of the watchdogs nobody knows the dead rank; every rank knows
        itself."""
        deadline = math.ceil(max(DEADLINE, 2 * self.quiet_seconds(DECODE, 3)))
        unknown = "not all ranks have started"
        absent = r"rank {} \(\S+\) has not connected(, rank 1 \S+ has not connected)?"
        expected = {("session.start", 0): unknown, ("session.start", 2): unknown,
                    # Rank 1 has no monitor to connect to when rank 0 is dead, and speaks for itself.
                    ("watchdog.join", 0): f"({unknown}|{absent.format(0)})", ("watchdog.join", 2): absent.format(2)}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            jobs = {(site, rank): pool.submit(self.lenient_job, f"{site}:rank={rank}:kill", AMPLE, deadline)
                    for site, rank in expected}
        for (site, rank), job in jobs.items():
            with self.subTest(site=site, rank=rank):
                said, codes, seconds = job.result()
                self.assertEqual(codes.pop(rank), 137, said)
                self.assertEqual(codes, [4, 4], said)
                self.assertLess(seconds, deadline + PROMISED + 3 * self.quiet_seconds(DECODE, 3))
                lines = re.findall(r"^nsa: error: .*", said, re.MULTILINE)
                self.assertGreater(len(lines), 0, said)
                for line in lines:
                    self.assertRegex(line, rf"error: {expected[site, rank]} \(rank \d \(\S+\): \d+ s in .* "
                                           rf"the start-up deadline is {deadline} s\)")
                    self.assertNotRegex(line, rf"\(rank {rank} \(\S+\): ")  # the dead rank says nothing

    def test_a_skipped_collective(self):
        self.end({f"comm.all_gather:rank={rank}:at={at}:skip": rf"rank {rank} \(\S+\) {MISMATCH} at operation #\d+ "
                  for rank, at in ((1, 50), (0, 9), (2, 120))}, deadline=AMPLE)

    def test_a_skipped_collective_of_two_ranks(self):
        self.end({"comm.all_gather:rank=1:at=50:skip": rf"rank 1 \(\S+\) {MISMATCH}"}, ranks=2, deadline=AMPLE)

    def test_a_skipped_sum_over_heads(self):
        self.end({"comm.all_reduce:rank=1:at=30:skip": rf"(rank 0 \(\S+\) or )?rank 1 \(\S+\) {MISMATCH}"},
                 DECODE.replace("heads = 1", "heads = 2"), ranks=2, deadline=AMPLE)

    def test_a_collective_of_the_wrong_size(self):
        self.end({f"comm.all_gather:rank={rank}:at=50:shorten": rf"rank {rank} \(\S+\) {MISMATCH}"
                  for rank in range(3)}, deadline=AMPLE)


if __name__ == "__main__":
    unittest.main(verbosity=2)
