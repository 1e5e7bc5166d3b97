"""What the tests under a private Slurm share: its start and end, the jobs' inputs, what a job left."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import unittest

from private_slurm import PrivateSlurm

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path += [str(ROOT / "tests" / "app"), str(ROOT / "tests" / "hosts")]

import hosts  # noqa: E402, F401
from small import SMALL  # noqa: E402

SCRIPTS = ROOT / "jobscripts" / "slurm"
NSA = os.environ["NSA_BINARY"]
LAUNCHERS = ("srun", "mpirun")
LONG_POINTS = 4
LONG = SMALL.replace("context = 64", "context = [64, 72, 80, 88]") + """modes = ["total"]
min_time = 0.5
"""  # half a second a point at the least: long enough to be told in the middle


class SlurmTest(unittest.TestCase):
    packages = None  # the folder of what ../unpack.sh leaves

    @classmethod
    def start_slurm(cls, *cluster, **files):
        """Starts Slurm, on this machine or a cluster, with a work folder that holds scripts/, long.toml and `files`, by
        stem of a TOML file."""
        cls.slurm = PrivateSlurm(SlurmTest.packages, *cluster)
        cls.addClassCleanup(cls.slurm.remove)
        cls.addClassCleanup(cls.nothing_is_left)
        cls.slurm.start()
        cls.work = cls.slurm.folder / "work"
        cls.work.mkdir()
        (cls.work / "scripts").symlink_to(ROOT / "scripts")
        for stem, text in {"long": LONG, **files}.items():
            (cls.work / f"{stem}.toml").write_text(text)

    @classmethod
    def nothing_is_left(cls):
        left = cls.slurm.stop()
        if left:
            raise AssertionError(f"left running: {left}")

    @classmethod
    def submit_script(cls, name, *options, **environment):
        """The number of a job that runs a job script of ours."""
        said = cls.slurm.run("sbatch", "--parsable", *options, str(SCRIPTS / f"{name}.sh"), cwd=cls.work, **environment)
        return said.strip()

    @classmethod
    def no_job_is_left(cls):
        return not cls.slurm.run("squeue", "-h").strip()

    @classmethod
    def job(cls, number):
        """What Slurm knows of a job, as a dictionary."""
        return dict(re.findall(r"(\S+?)=(\S*)", cls.slurm.run("scontrol", "show", "job", number)))

    def assert_completed(self, number):
        """The job's output, where it has ended well and its run is valid."""
        told = self.job(number)
        output = (self.work / f"{told['JobName']}-{number}.out").read_text()
        self.assertEqual((told["JobState"], told["ExitCode"]), ("COMPLETED", "0:0"), output)
        self.assertEqual(output.splitlines()[-1], "RESULT: VALID")
        return output

    def result(self, stem):
        """The run's JSON; the HDF5 file beside it is there."""
        self.assertTrue((self.work / f"{stem}.h5").exists())
        return json.loads((self.work / f"{stem}.json").read_text())

    def assert_same(self, a, b):
        done = subprocess.run([NSA, "diff", f"{a}.h5", f"{b}.h5"], cwd=self.work, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def undisturbed(self):
        """The result of long.toml that no job disturbed."""
        if not (self.work / "undisturbed.h5").exists():
            command = ("mpirun", "-n", "2", NSA, "run", "long.toml", "--output", "undisturbed.h5")
            done = subprocess.run(command, cwd=self.work, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return "undisturbed"


def main():
    """Runs the tests of the calling script. Its argument is the folder of the packages; returns 77 where they cannot be
    had."""
    SlurmTest.packages = sys.argv.pop(1)
    got = subprocess.run(
        [HERE.parent / "unpack.sh", SlurmTest.packages, "slurmctld", "slurmd", "slurm-client", "munge"]
    )
    if got.returncode == 77:
        return 77
    if got.returncode == 0 and not shutil.which("mpirun"):
        print("SKIPPED: no mpirun; install Open MPI")
        return 77
    return 1 if got.returncode else not unittest.main(exit=False, verbosity=2).result.wasSuccessful()
