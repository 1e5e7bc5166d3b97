"""Nothing hangs: a rank stopped, killed, late or out of step ends the job, in time, with the rank named."""

import json
import os
import signal
import subprocess
import time
import unittest

from harness import BINARY, MPIEXEC, SMALL, AppTest

DEADLINE = 10  # s; machines that test are busy, and allocating takes some
PROMISED = 15  # s beyond the deadline
AMPLE = 120  # s, where something else than the deadline is to end the job
DECODE = SMALL.replace("steps = 3", "steps = 40") + "[parallel]\nheads = 1\nkv_chunk_blocks = 1\n"
PREFILL = DECODE.replace('"decode"', '"prefill"').replace("context = 64", "context = 256")
STRAYED = "did not do the same as the others"


class Watchdog(AppTest):
    def run_with(self, fault, text=DECODE, ranks=3, deadline=DEADLINE):
        self.write("in.toml", text)
        os.environ["NSA_FAULT"] = fault
        self.addCleanup(os.environ.pop, "NSA_FAULT", None)
        return self.nsa("run", "in.toml", "--deadline", str(deadline), "--output", "r.h5", ranks=ranks)

    quiet = {}

    def quiet_seconds(self, text=DECODE, ranks=3):
        """What the run takes on this machine when nothing happens; three times that, since others may load it by then."""
        if (text, ranks) not in self.quiet:
            start = time.monotonic()
            self.assert_ok(self.run_with("", text, ranks, AMPLE))
            os.remove(os.path.join(self.folder, "r.h5"))
            self.quiet[text, ranks] = 3 * (time.monotonic() - start)
        return self.quiet[text, ranks]

    def reports(self):
        found = {}
        for name in os.listdir(self.folder):
            if name.endswith(".ops.json"):
                with open(os.path.join(self.folder, name)) as file:
                    found[name] = json.load(file)
        return found

    def assert_reports(self, ranks=3):
        reports = self.reports()
        self.assertEqual(sorted(reports), [f"r.h5.rank{rank}.ops.json" for rank in range(ranks)])
        for rank in range(ranks):
            report = reports[f"r.h5.rank{rank}.ops.json"]
            self.assertEqual(report["rank"], rank)
            self.assertTrue(0 < len(report["operations"]) <= 64)
            self.assertIn("rank ", report["verdict"])
        return reports

    def end(self, fault, message, text=DECODE, ranks=3, deadline=DEADLINE, reports=True):
        limit = self.quiet_seconds(text, ranks) + min(deadline, DEADLINE) + PROMISED
        start = time.monotonic()
        done = self.run_with(fault, text, ranks, deadline)
        seconds = time.monotonic() - start
        self.assertEqual(done.code, 4, done.err)
        self.assertLess(seconds, limit)
        lines = [line for line in done.err.splitlines() if line.startswith("nsa:")]
        self.assertEqual(len(lines), 1, done.err)
        self.assertRegex(lines[0], r"^nsa: error: " + message)
        if reports:
            self.assert_reports(ranks)

    def test_a_stopped_rank(self):
        for rank in (0, 1, 2):  # both hubs, and a rank that is none
            with self.subTest(rank=rank):
                self.end(f"decode.step:rank={rank}:at=20:stop",
                         rf"rank {rank} \(\S+\) is late: no answer for \d+ s, last seen .* "
                         rf"\(rank \d \(\S+\): \d+ s in \w+ #\d+ \[\w+, ?\w*\]; the deadline is {DEADLINE} s\)")

    def test_a_stopped_rank_in_prefill(self):
        self.end("prefill.start:rank=1:at=2:stop", r"rank 1 \(\S+\) is late: no answer", PREFILL)

    def test_a_stopped_rank_at_the_start(self):
        # Before the input is read nobody knows where the result is to stand.
        self.end("run.start:rank=1:stop", r"rank 1 \(\S+\) is late: no answer", reports=False)

    def test_a_rank_that_lives_and_comes_to_nothing(self):
        self.end("decode.step:rank=1:at=20:hang", r"rank 1 \(\S+\) is late: \d+ s at work \[decode")

    def test_a_skipped_collective(self):
        for site in ("comm.all_gather:rank=1:at=50", "comm.all_gather:rank=0:at=7", "comm.all_gather:rank=2:at=120"):
            with self.subTest(site=site):
                self.end(f"{site}:skip", rf"rank {site.split('rank=')[1][0]} \(\S+\) {STRAYED} at operation #\d+ ",
                         deadline=AMPLE)

    def test_a_skipped_collective_of_two_ranks(self):
        self.end("comm.all_gather:rank=1:at=50:skip", rf"rank 1 \(\S+\) {STRAYED}", ranks=2,
                 deadline=AMPLE)

    def test_a_skipped_sum_over_heads(self):
        self.end("comm.all_reduce:rank=1:at=30:skip", rf"(rank 0 \(\S+\) or )?rank 1 \(\S+\) {STRAYED}",
                 DECODE.replace("heads = 1", "heads = 2"), ranks=2, deadline=AMPLE)

    def test_a_collective_of_the_wrong_size(self):
        for rank in (0, 1, 2):
            with self.subTest(rank=rank):
                self.end(f"comm.all_gather:rank={rank}:at=50:shorten", rf"rank {rank} \(\S+\) {STRAYED}",
                         deadline=AMPLE)

    def test_a_rank_killed_by_the_system(self):
        for text, site in ((DECODE, "run.start"), (PREFILL, "prefill.start"), (DECODE, "decode.step:at=20")):
            for rank in (0, 1, 2):
                with self.subTest(site=site, rank=rank):
                    limit = self.quiet_seconds(text) + 10  # far from the deadline of 300
                    start = time.monotonic()
                    self.assertNotEqual(self.run_with(f"{site}:rank={rank}:kill", text, deadline=300).code, 0)
                    self.assertLess(time.monotonic() - start, limit)
                    self.assertFalse(os.path.exists(os.path.join(self.folder, "r.h5")))

    def test_no_deadline_no_end(self):
        self.write("in.toml", DECODE)
        environment = dict(os.environ, NSA_FAULT="decode.step:rank=1:at=20:stop", OMP_NUM_THREADS="1",
                           OMPI_MCA_odls_base_sigkill_timeout="0")
        with subprocess.Popen([MPIEXEC, "-n", "3", "--oversubscribe", "--allow-run-as-root", BINARY, "run", "in.toml",
                               "--deadline", "0"], cwd=self.folder, env=environment, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as job:
            with self.assertRaises(subprocess.TimeoutExpired):
                job.wait(20)
            job.send_signal(signal.SIGTERM)

    def test_a_job_that_was_stopped_as_a_whole_goes_on(self):
        """Suspended longer than the deadline, by a user or a scheduler: nobody hung."""
        self.write("in.toml", DECODE.replace("steps = 40", "steps = 40\nmin_time = 10.0"))
        environment = dict(os.environ, NSA_FAULT="", OMP_NUM_THREADS="1")
        with subprocess.Popen([MPIEXEC, "-n", "2", "--oversubscribe", "--allow-run-as-root", BINARY, "run", "in.toml",
                               "--deadline", "12"], cwd=self.folder, env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True) as job:
            time.sleep(3)
            ranks = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True,
                                                        check=True).stdout.split()]
            self.assertEqual(len(ranks), 2)
            for which, pause in ((signal.SIGSTOP, 25), (signal.SIGCONT, 0)):
                for pid in ranks:
                    os.kill(pid, which)
                time.sleep(pause)
            out, _ = job.communicate(timeout=100)
        self.assertEqual(job.returncode, 0, out)

    def test_a_run_leaves_no_report(self):
        self.assert_ok(self.run_with("", deadline=AMPLE))
        self.assertEqual(sorted(os.listdir(self.folder)), ["in.toml", "r.h5"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
