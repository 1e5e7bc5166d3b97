"""The job scripts for several nodes under a Slurm of four nodes, which are hosts made of namespaces: two and four
nodes, srun and mpirun, an array sweep, and a node that is lost while a job runs on it.

usage: test_slurm_hosts.py PACKAGES     as test_slurm.py; needs root; exits with 77 where it cannot be had
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import unittest

from private_slurm import PrivateSlurm

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path += [str(ROOT / "tests" / "app"), str(ROOT / "tests" / "hosts")]

import hosts  # noqa: E402
from small import SMALL  # noqa: E402

SCRIPTS = ROOT / "jobscripts" / "slurm"
NSA = os.environ["NSA_BINARY"]
LAUNCHERS = ("srun", "mpirun")
ENVIRONMENT = {"NSA": NSA, "OMP_NUM_THREADS": "1", "OMPI_MCA_btl": "self,tcp", "OMPI_MCA_btl_tcp_if_include": "eth0",
               "OMPI_MCA_oob_tcp_if_include": "eth0", "OMPI_MCA_mpi_yield_when_idle": "1",
               "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # fmt: skip
SIZE = ("--ntasks-per-node=1", "--cpus-per-task=1")
ALL_DONE = 150  # seconds until every job has ended; some 80 on two quiet cores
LONG_POINTS = 4
LONG = SMALL.replace("context = 64", "context = [64, 72, 80, 88]") + """modes = ["total"]
min_time = 0.5
"""


class FourNodes(unittest.TestCase):
    """Jobs on the four nodes, then two jobs that lose a node each."""

    @classmethod
    def setUpClass(cls):
        cls.cluster = hosts.Hosts(4)
        cls.addClassCleanup(cls.cluster.remove)
        cls.slurm = PrivateSlurm(PACKAGES, cls.cluster)
        cls.addClassCleanup(cls.nothing_is_left)
        cls.slurm.start()
        cls.work = cls.slurm.folder / "work"
        cls.work.mkdir()
        (cls.work / "scripts").symlink_to(ROOT / "scripts")
        (cls.work / "tiny.toml").write_text(SMALL)
        (cls.work / "long.toml").write_text(LONG)
        (cls.work / "tiny.sweep").write_text("2 all tiny.toml\n")
        cls.jobs = {(nodes, launcher): cls.submit(launcher, nodes, "tiny.toml")
                    for nodes in (2, 4) for launcher in LAUNCHERS}  # fmt: skip
        cls.sweep("--submit", str(SCRIPTS / "sweep.sh"), "--ranks-per-node", "1", "--", "--cpus-per-task=1")
        cls.slurm.until(cls.all_ended, "the end of all jobs", ALL_DONE)
        cls.lost_jobs = {launcher: cls.submit(launcher, 2, "long.toml") for launcher in LAUNCHERS}
        cls.slurm.until(cls.each_has_a_point, "points of the jobs that shall lose a node", ALL_DONE)
        cls.lost_nodes = [cls.node_without_the_script(number) for number in cls.lost_jobs.values()]
        cls.cluster.cut(*cls.lost_nodes)
        cls.slurm.until(cls.each_is_back_in_the_queue, "the requeue of the jobs that lost a node", ALL_DONE)
        cls.cluster.heal()
        cls.slurm.until(cls.all_ended, "the end of the jobs that lost a node", ALL_DONE)

    @classmethod
    def nothing_is_left(cls):
        left = cls.slurm.stop()
        if left:
            raise AssertionError(f"left running: {left}")

    @classmethod
    def submit(cls, launcher, nodes, text):
        return cls.slurm.run("sbatch", "--parsable", f"--nodes={nodes}", *SIZE, str(SCRIPTS / "cpu_nodes.sh"),
                             cwd=cls.work, INPUT=text, LAUNCHER=launcher, **ENVIRONMENT).strip()  # fmt: skip

    @classmethod
    def sweep(cls, *arguments):
        command = [*cls.cluster.on("n1", cls.work), sys.executable, "scripts/sweep.py", "tiny.sweep", "--nsa", NSA,
                   "--results", "results", *arguments]  # fmt: skip
        done = subprocess.run(command, env={**cls.slurm.environment, **ENVIRONMENT}, capture_output=True, text=True)
        if done.returncode != 0:
            raise AssertionError(done.stdout + done.stderr)
        return done.stdout

    @classmethod
    def all_ended(cls):
        return not cls.slurm.run("squeue", "-h").strip()

    @classmethod
    def each_has_a_point(cls):
        return all((cls.work / f"long-{number}.h5").exists() for number in cls.lost_jobs.values())

    @classmethod
    def each_is_back_in_the_queue(cls):
        return all(int(cls.job(number)["Restarts"]) > 0 for number in cls.lost_jobs.values())

    @classmethod
    def job(cls, number):
        return dict(re.findall(r"(\S+?)=(\S*)", cls.slurm.run("scontrol", "show", "job", number)))

    @classmethod
    def node_without_the_script(cls, number):
        told = cls.job(number)
        names = cls.slurm.run("scontrol", "show", "hostnames", told["NodeList"]).split()
        return next(name for name in names if name not in (told["BatchHost"], cls.slurm.control_host))

    def assert_completed(self, number):
        output = (self.work / f"nsa-cpus-{number}.out").read_text()
        told = self.job(number)
        self.assertEqual((told["JobState"], told["ExitCode"]), ("COMPLETED", "0:0"), output)
        self.assertEqual(output.splitlines()[-1], "RESULT: VALID")
        return told, output

    def test_two_and_four_nodes(self):
        for (nodes, launcher), number in self.jobs.items():
            with self.subTest(nodes=nodes, launcher=launcher):
                self.assert_completed(number)
                result = json.loads((self.work / f"tiny-{number}.json").read_text())
                self.assertEqual((result["ranks"], result["result"]), (nodes, "VALID"))

    def test_the_array_sweep(self):
        self.assertEqual(len(re.findall(r" done ", self.sweep("--summary"))), 2)

    def test_a_job_that_loses_a_node_goes_on_after_the_requeue(self):
        undisturbed = ("mpirun", "-n", "2", NSA, "run", "long.toml", "--output", "undisturbed.h5")
        done = subprocess.run(undisturbed, cwd=self.work, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        for launcher, number in self.lost_jobs.items():
            with self.subTest(launcher=launcher):
                told, output = self.assert_completed(number)
                self.assertGreaterEqual(int(told["Restarts"]), 1, output)
                self.assertTrue(1 <= int(re.search(r"going on after (\d+) point", output)[1]) <= LONG_POINTS, output)
                same = subprocess.run([NSA, "diff", "undisturbed.h5", f"long-{number}.h5"], cwd=self.work,
                                      capture_output=True, text=True)  # fmt: skip
                self.assertEqual(same.returncode, 0, same.stdout + same.stderr)


def main():
    global PACKAGES
    PACKAGES = sys.argv[1]
    got = subprocess.run([HERE.parent / "unpack.sh", PACKAGES, "slurmctld", "slurmd", "slurm-client", "munge"])
    if got.returncode:
        return got.returncode
    return not unittest.main(argv=sys.argv[:1], exit=False, verbosity=2).result.wasSuccessful()


if __name__ == "__main__":
    sys.exit(hosts.main(main))
