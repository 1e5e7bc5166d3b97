"""kill -9 of any rank at any time: the job ends at once, the finished points are there, and --resume makes of them the
file of a run that nobody disturbed. Needs h5py."""

import os
import re
import signal
import subprocess
import time
import unittest

import h5py

from harness import BINARY, HANG, MPIEXEC, SMALL, AppTest
from same_result import differences

RANKS = 3
SHARDED = "[parallel]\nheads = 1\nkv_chunk_blocks = 1\n"
DECODE = SMALL.replace("context = 64", "context = [64, 96, 128]") + SHARDED
PREFILL = DECODE.replace('"decode"', '"prefill"')
# The calls of each site are those of the second of three points: 6 measured steps, or 7 prefills, a point.
ENDS = 20  # s that a killed job may take more than a whole one, far from the deadline of 300


class Killed(AppTest):
    def path(self, name):
        return os.path.join(self.folder, name)

    def run_with(self, fault, *arguments):
        os.environ["NSA_FAULT"] = fault
        self.addCleanup(os.environ.pop, "NSA_FAULT", None)
        return self.nsa("run", "in.toml", "--output", "result.h5", *arguments, ranks=RANKS)

    def undisturbed(self, text):
        """Writes reference.h5; returns what it took."""
        self.write("in.toml", text)
        start = time.monotonic()
        self.assert_ok(self.run_with(""))
        os.rename(self.path("result.h5"), self.path("reference.h5"))
        return time.monotonic() - start

    def assert_kept_and_resumed(self, points):
        """`points` are whole in what is left, and --resume completes them."""
        if points == 0:
            self.assertFalse(os.path.exists(self.path("result.h5")))
        else:
            with h5py.File(self.path("result.h5")) as file:
                self.assertEqual(list(file["points"]), [f"{i:04}" for i in range(points)])
                self.assertEqual(file.attrs["status"], "running")
                for point in file["points"].values():
                    self.assertGreater(point["time"][()].size, 0)
        done = self.assert_ok(self.run_with("", "--resume"))
        if points > 0:
            self.assertIn(f"going on after {points} points", done.out)
        self.assertEqual(differences(self.path("reference.h5"), self.path("result.h5")), [])
        left = [name for name in os.listdir(self.folder) if not re.fullmatch(r"result\.h5\.rank\d\.ops\.json", name)]
        self.assertEqual(sorted(left), ["in.toml", "reference.h5", "result.h5"])
        os.remove(self.path("result.h5"))

    def assert_ends(self, quiet, job):
        start = time.monotonic()
        code = job()
        self.assertNotEqual(code, 0)
        self.assertLess(time.monotonic() - start, 3 * quiet + ENDS)

    def kill_each_rank(self, text, sites, ranks=range(RANKS)):
        """`sites`: where, and how many points are whole by then."""
        quiet = self.undisturbed(text)
        for (site, *when), points in sites.items():
            for rank in ranks:
                with self.subTest(site=site, rank=rank):
                    fault = ":".join([site, f"rank={rank}", *when, "kill"])
                    self.assert_ends(quiet, lambda fault=fault: self.run_with(fault).code)
                    self.assert_kept_and_resumed(points)

    def test_at_start_and_in_decode(self):
        self.kill_each_rank(DECODE, {("run.start",): 0, ("prefill.start", "at=2"): 1, ("decode.step", "at=9"): 1})

    def test_in_prefill(self):
        self.kill_each_rank(PREFILL, {("prefill.start", "at=10"): 1})

    def test_the_rank_that_writes(self):
        self.kill_each_rank(DECODE, {("result.publish", "at=1"): 0, ("result.publish", "at=3"): 2}, ranks=[0])

    def test_a_rank_that_waits_for_the_one_that_writes(self):
        quiet = self.undisturbed(DECODE)
        command = [MPIEXEC, "-n", str(RANKS), "--oversubscribe", "--allow-run-as-root", BINARY, "run", "in.toml",
                   "--output", "result.h5"]
        environment = dict(os.environ, NSA_FAULT="result.publish:rank=0:at=2:delay=30", OMP_NUM_THREADS="1",
                           OMPI_MCA_odls_base_sigkill_timeout="0")
        for rank in (1, 2):
            with self.subTest(rank=rank):
                run = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)
                self.addCleanup(run.kill)
                limit = time.monotonic() + HANG
                # The second point is written into a copy of the file that holds the first.
                while not any(name.endswith(".tmp") for name in os.listdir(self.folder) if self.exists("result.h5")):
                    self.assertLess(time.monotonic(), limit)
                    self.assertIsNone(run.poll())
                    time.sleep(0.02)
                os.kill(self.ranks_of(run)[rank], signal.SIGKILL)
                self.assert_ends(quiet, run.wait)
                self.assert_kept_and_resumed(1)

    def exists(self, name):
        return os.path.exists(self.path(name))

    @staticmethod
    def ranks_of(launcher):
        """Process ids by rank."""
        with open(f"/proc/{launcher.pid}/task/{launcher.pid}/children") as file:
            children = [int(pid) for pid in file.read().split()]
        ranks = {}
        for pid in children:
            with open(f"/proc/{pid}/environ") as file:
                variables = dict(entry.split("=", 1) for entry in file.read().split("\0") if "=" in entry)
            ranks[int(variables["OMPI_COMM_WORLD_RANK"])] = pid
        return ranks


if __name__ == "__main__":
    unittest.main(verbosity=2)
