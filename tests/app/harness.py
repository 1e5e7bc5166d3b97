"""Runs the real binary in a folder of its own. Python 3, standard library only."""

import os
import shutil
import subprocess
import tempfile
import unittest
from dataclasses import dataclass

from small import SMALL  # noqa: F401, for the tests

BINARY = os.environ["NSA_BINARY"]
MPIEXEC = os.environ.get("NSA_MPIEXEC", "mpiexec")
INPUTS = os.environ["NSA_INPUTS"]
HANG = 120  # seconds after which a run counts as hung; the slowest takes a few on two busy cores


@dataclass
class Finished:
    code: int
    out: str
    err: str


def nsa(*arguments, ranks=0, cwd, environment=None):
    """ranks=0: without a launcher. `environment`: beside what is there."""
    command = [BINARY, *arguments]
    if ranks:
        command = [MPIEXEC, "-n", str(ranks), "--oversubscribe", "--allow-run-as-root", *command]
    # Open MPI waits two seconds for the other ranks after one has ended with an error code; here none is left.
    settings = {"OMP_NUM_THREADS": "1", "OMPI_MCA_odls_base_sigkill_timeout": "0"} | (environment or {})
    done = subprocess.run(command, cwd=cwd, env=os.environ | settings, capture_output=True, text=True, timeout=HANG)
    # mpirun of Open MPI 5.x ends its messages with a NUL, before what a rank prints next.
    return Finished(done.returncode, done.stdout, done.stderr.replace("\0", ""))


class AppTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="nsa-test-")
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def write(self, name, text):
        with open(os.path.join(self.folder, name), "w") as file:
            file.write(text)
        return name

    def nsa(self, *arguments, ranks=0):
        return nsa(*arguments, ranks=ranks, cwd=self.folder)

    def assert_ok(self, done):
        self.assertEqual(done.code, 0, done.out + done.err)
        return done
