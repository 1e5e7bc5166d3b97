"""The quick start on four ranks again and again: no failure, no growth in memory, nothing left behind.

NSA_RUNS says how often: 10 in the ordinary tests, 20 in those of ./test.sh --all; 1000 by
`./test.sh --all -R many_runs_long -V`, which prints what it saw. Standard library only."""

import os
import re
import resource
import statistics
import subprocess
import tempfile
import time
import unittest

from harness import BINARY, INPUTS, MPIEXEC, SMALL, AppTest

RUNS = int(os.environ.get("NSA_RUNS", "20" if "NSA_TEST_ALL" in os.environ else "10"))


class ManyRuns(AppTest):
    def once(self, scratch):
        """One run in the test's folder; the largest resident set of a process, MB, and seconds."""
        command = [MPIEXEC, "-n", "4", "--oversubscribe", "--allow-run-as-root", BINARY, "run",
                   os.path.join(INPUTS, "quickstart.toml")]
        environment = dict(os.environ, OMP_NUM_THREADS="1", TMPDIR=scratch)
        start = time.monotonic()
        with open(os.path.join(self.folder, "out"), "w+") as out:
            run = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
            self.addCleanup(lambda: run.returncode is None and run.kill())
            _, status, usage = os.wait4(run.pid, 0)
            run.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            text = out.read()
        self.assertEqual(run.returncode, 0, text)
        self.assertIn("\nRESULT: VALID\n", text)
        self.assertEqual(sorted(os.listdir(self.folder)), ["out", "quickstart.h5"])
        os.remove(os.path.join(self.folder, "quickstart.h5"))
        self._cleanups.pop()
        return usage.ru_maxrss / 1024, time.monotonic() - start

    @staticmethod
    def everything(folder):
        return {os.path.join(root, name) for root, _, names in os.walk(folder) for name in names}

    def test_the_quick_start_again_and_again(self):
        scratch = tempfile.mkdtemp(prefix="nsa-scratch-")  # where MPI keeps its session
        shared = tempfile.mkdtemp(prefix="nsa-shared-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
        self.addCleanup(os.system, f"rm -rf {scratch} {shared}")
        # Open MPI's shared segments, apart from those of whatever else runs on this machine.
        os.environ["OMPI_MCA_btl_vader_backing_directory"] = shared
        self.addCleanup(os.environ.pop, "OMPI_MCA_btl_vader_backing_directory")
        self.once(scratch)
        left = self.everything(scratch)
        seen = [self.once(scratch) for _ in range(RUNS - 1)]
        self.assertEqual(self.everything(scratch), left)
        self.assertEqual(self.everything(shared), set())
        memory = [megabytes for megabytes, _ in seen]
        tenth = max(1, len(memory) // 10)
        first, last = statistics.median(memory[:tenth]), statistics.median(memory[-tenth:])
        print(f"{RUNS} runs: largest process {min(memory):.1f} to {max(memory):.1f} MB, "
              f"median of the first tenth {first:.1f}, of the last {last:.1f}; "
              f"median run {statistics.median(s for _, s in seen):.2f} s")
        self.assertLess(last, 1.05 * first + 1)

    def test_a_run_of_many_points_does_not_grow(self):
        """A point's caches and scratch are 4 MB here, what is kept of it until the end some 20 KB."""
        points = 60
        many = SMALL.replace("context = 64", f'fill = "synthetic"\ncontext = {[16384 + i for i in range(points)]}')
        self.write("in.toml", many)
        run = subprocess.Popen([BINARY, "run", "in.toml"], cwd=self.folder, env=dict(os.environ, OMP_NUM_THREADS="1"),
                               stdout=subprocess.PIPE, text=True)
        resident = []
        for line in run.stdout:
            if re.match(r" +\d+ ", line):  # a row as its point is sealed
                with open(f"/proc/{run.pid}/statm") as file:
                    resident.append(int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6)
        self.assertEqual(run.wait(), 0)
        run.stdout.close()
        self.assertEqual(len(resident), points)
        # Read beside the running program: medians, since some readings fall into the next point.
        self.assertLess(statistics.median(resident[-20:]) - statistics.median(resident[:20]), 20, resident)

    def test_a_long_sweep_costs_little(self):
        """Beside its own work, 1 ms here, a point costs 20 ms at most, of which the processor works half."""
        points = 500
        self.write("in.toml", SMALL.replace("context = 64", f"context = {[64 + i for i in range(points)]}"))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.assert_ok(self.nsa("run", "in.toml"))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{points} points: {1e3 * used / points:.1f} ms of processor time a point")
        self.assertLess(used / points, 0.02)


if __name__ == "__main__":
    unittest.main(verbosity=2)
