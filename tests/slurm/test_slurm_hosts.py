"""The job scripts for several nodes under a Slurm of four nodes, which are hosts made of namespaces: two and four
nodes, srun and mpirun, an array sweep, and a node that is lost while a job runs on it.

usage: test_slurm_hosts.py PACKAGES     as test_slurm.py; needs root; exits with 77 where it cannot be had
"""

import re
import subprocess
import sys

from slurm_test import LAUNCHERS, LONG_POINTS, NSA, SCRIPTS, SMALL, SlurmTest, hosts, main

ENVIRONMENT = {"NSA": NSA, "OMP_NUM_THREADS": "1", "OMPI_MCA_btl": "self,tcp", "OMPI_MCA_btl_tcp_if_include": "eth0",
               "OMPI_MCA_oob_tcp_if_include": "eth0", "OMPI_MCA_mpi_yield_when_idle": "1",
               "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # fmt: skip
SIZE = ("--ntasks-per-node=1", "--cpus-per-task=1")
ALL_DONE = 150  # seconds until every job has ended; some 80 on two quiet cores


class FourNodes(SlurmTest):
    """Jobs on the four nodes, then two jobs that lose a node each."""

    @classmethod
    def setUpClass(cls):
        cls.cluster = hosts.Hosts(4)
        cls.addClassCleanup(cls.cluster.remove)
        cls.start_slurm(cls.cluster, tiny=SMALL)
        (cls.work / "tiny.sweep").write_text("2 all tiny.toml\n")
        cls.jobs = {(nodes, launcher): cls.submit(launcher, nodes, "tiny.toml")
                    for nodes in (2, 4) for launcher in LAUNCHERS}  # fmt: skip
        cls.sweep("--submit", str(SCRIPTS / "sweep.sh"), "--ranks-per-node", "1", "--", "--cpus-per-task=1")
        cls.slurm.until(cls.no_job_is_left, "the end of all jobs", ALL_DONE)
        cls.lost_jobs = {launcher: cls.submit(launcher, 2, "long.toml") for launcher in LAUNCHERS}
        cls.slurm.until(cls.each_has_a_point, "points of the jobs that shall lose a node", ALL_DONE)
        cls.lost_nodes = [cls.node_without_the_script(number) for number in cls.lost_jobs.values()]
        cls.cluster.cut(*cls.lost_nodes)
        cls.slurm.until(cls.each_is_back_in_the_queue, "the requeue of the jobs that lost a node", ALL_DONE)
        cls.cluster.heal()
        cls.slurm.until(cls.no_job_is_left, "the end of the jobs that lost a node", ALL_DONE)

    @classmethod
    def submit(cls, launcher, nodes, text):
        return cls.submit_script("cpu_nodes", f"--nodes={nodes}", *SIZE, INPUT=text, LAUNCHER=launcher, **ENVIRONMENT)

    @classmethod
    def sweep(cls, *arguments):
        command = [*cls.cluster.on("n1", cls.work), sys.executable, "scripts/sweep.py", "tiny.sweep", "--nsa", NSA,
                   "--results", "results", *arguments]  # fmt: skip
        done = subprocess.run(command, env={**cls.slurm.environment, **ENVIRONMENT}, capture_output=True, text=True)
        if done.returncode != 0:
            raise AssertionError(done.stdout + done.stderr)
        return done.stdout

    @classmethod
    def each_has_a_point(cls):
        return all((cls.work / f"long-{number}.h5").exists() for number in cls.lost_jobs.values())

    @classmethod
    def each_is_back_in_the_queue(cls):
        return all(int(cls.job(number)["Restarts"]) > 0 for number in cls.lost_jobs.values())

    @classmethod
    def node_without_the_script(cls, number):
        told = cls.job(number)
        names = cls.slurm.run("scontrol", "show", "hostnames", told["NodeList"]).split()
        return next(name for name in names if name not in (told["BatchHost"], cls.slurm.control_host))

    def test_fences_are_of_one_kind(self):
        """Slurm's default mixes two: one start in ten ended by a message that came before MPI_Init could take it."""
        scripts = [p for p in SCRIPTS.glob("*.sh") if "oob_tcp_keepalive" in p.read_text()]
        self.assertEqual(len(scripts), 4)
        for script in scripts:
            self.assertIn("export SLURM_PMIX_FENCE=tree", script.read_text(), script.name)

    def test_two_and_four_nodes(self):
        for (nodes, launcher), number in self.jobs.items():
            with self.subTest(nodes=nodes, launcher=launcher):
                self.assert_completed(number)
                result = self.result(f"tiny-{number}")
                self.assertEqual((result["ranks"], result["result"]), (nodes, "VALID"))

    def test_the_array_sweep(self):
        self.assertEqual(len(re.findall(r" done ", self.sweep("--summary"))), 2)

    def test_a_job_that_loses_a_node_goes_on_after_the_requeue(self):
        for launcher, number in self.lost_jobs.items():
            with self.subTest(launcher=launcher):
                output = self.assert_completed(number)
                self.assertGreaterEqual(int(self.job(number)["Restarts"]), 1, output)
                self.assertTrue(1 <= int(re.search(r"going on after (\d+) point", output)[1]) <= LONG_POINTS, output)
                self.assert_same(self.undisturbed(), f"long-{number}")


if __name__ == "__main__":
    sys.exit(hosts.main(main))
