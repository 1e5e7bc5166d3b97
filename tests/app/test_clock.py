"""The clock of the day is set back by an hour during a run (clock_back.c): nothing waits for it or counts by it. Needs
h5py."""

import datetime
import json
import os
import pathlib
import subprocess
import sys
import time
import unittest

import h5py
import numpy as np

from harness import BINARY, MPIEXEC, SMALL, AppTest

SWEEP = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "sweep.py"
TEXT = SMALL.replace("context = 64", "context = [64, 96]") + "min_time = 0.3\n"


class ClockSetBack(AppTest):
    def setUp(self):
        super().setUp()
        self.write("in.toml", TEXT)

    def run_with(self, command):
        """Seconds that the command took, which has to succeed."""
        environment = os.environ | {"LD_PRELOAD": os.environ["NSA_CLOCK_BACK"], "OMP_NUM_THREADS": "1"}
        start = time.monotonic()
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return time.monotonic() - start

    def test_the_clock_goes_back(self):
        script = "import time; a = time.time(); time.sleep(0.5); print(time.time() < a); assert time.time() < a"
        self.run_with([sys.executable, "-c", script])

    def test_a_run(self):
        launch = [MPIEXEC, "-n", "2", "--oversubscribe", "--allow-run-as-root"]
        for launcher, name in ([], "r1.h5"), (launch, "r2.h5"):
            with self.subTest(name=name):
                seconds = self.run_with([*launcher, BINARY, "run", "in.toml", "--deadline", "20", "--max-time", "40",
                                         "--output", name])
                with h5py.File(os.path.join(self.folder, name)) as file:
                    self.assertEqual(file.attrs["status"], "complete")
                    start, end = (datetime.datetime.fromisoformat(file.attrs[name].rstrip("Z"))
                                  for name in ("start", "end"))
                    self.assertLessEqual(start, end)
                    self.assertLess((end - start).total_seconds(), seconds + 1)
                    for point in file["points"].values():
                        self.assertEqual(point.attrs["validity"], "VALID")
                        self.assertGreater(point.attrs["copy_bandwidth"], 0)
                        times = point["time"][()]
                        self.assertFalse((times < 0).any())
                        self.assertLess(np.nanmax(times), seconds)
                        self.assertGreaterEqual(point["noise/seconds"][()].min(), 0)

    def test_a_sweep(self):
        self.write("list.sweep", "1 auto in.toml\n")
        launch = MPIEXEC + " -n {ranks} --oversubscribe --allow-run-as-root"
        seconds = self.run_with([sys.executable, str(SWEEP), "list.sweep", "--nsa", BINARY, "--launch", launch])
        (state,) = pathlib.Path(self.folder, "list").glob("*.state")
        took = json.loads(state.read_text())["seconds"]
        self.assertGreater(took, 0)
        self.assertLess(took, seconds)


if __name__ == "__main__":
    unittest.main(verbosity=2)
