"""Runs over four hosts made of namespaces, heads = 2 x kv = 2, one rank a host: whole, and losing a host, the host of
rank 0 and mpirun, or the network between two halves. Each job ends in time everywhere, names who is missing, keeps its
finished points, and --resume completes it. Python 3, standard library only."""

import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
import unittest

import hosts
from small import SMALL

NSA = os.environ["NSA_BINARY"]
ROOT = pathlib.Path(__file__).resolve().parents[2]
DEADLINE = 10  # s, far more than any normal wait of these runs
PROMISED = 30  # s beyond the deadline
LONG = 300  # s: a deadline that ends nothing
POINTS = 4
INPUT = SMALL.replace("context = 64", "context = [64, 72, 80, 88]") + """modes = ["total"]
min_time = 0.4
[parallel]
heads = 2
kv = 2
kv_chunk_blocks = 1
"""
# What the job scripts set, so that mpirun notices a lost host.
SCRIPT = (ROOT / "jobscripts" / "slurm" / "cpu_nodes.sh").read_text()
KEEPALIVE = {f"{kind}_MCA_oob_tcp_keepalive_{name}": value for kind in ("OMPI", "PRTE")
             for name, value in re.findall(r"(\w+)=(\d+)", re.search(r"for keep in (.*); do", SCRIPT)[1])}  # fmt: skip


class Job:
    """nsa run over all hosts of a set; mpirun runs on the first one."""

    def __init__(self, cluster, deadline, *arguments):
        self.cluster = cluster
        environment = dict(os.environ, OMP_NUM_THREADS="1", OMPI_ALLOW_RUN_AS_ROOT="1",
                           OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", **KEEPALIVE)  # fmt: skip
        command = ["mpirun", "--host", ",".join(cluster.names), "-n", str(len(cluster.names)), "--bind-to", "none"]
        for name, value in {"plm_rsh_agent": str(cluster.agent), "btl": "self,tcp", "btl_tcp_if_include": "eth0",
                            "oob_tcp_if_include": "eth0", "mpi_yield_when_idle": "1"}.items():  # fmt: skip
            command += ["--mca", name, value]
        command += [NSA, "run", "in.toml", "--output", str(cluster.folder / "r.h5"), "--deadline", str(deadline)]
        (cluster.folder / "in.toml").write_text(INPUT)
        words = cluster.on(cluster.names[0], cluster.folder)
        self.out = open(cluster.folder / "out", "w+")
        self.mpirun = subprocess.Popen([*words, *command, *arguments], stdin=subprocess.DEVNULL, stdout=self.out,
                                       stderr=subprocess.STDOUT, env=environment)  # fmt: skip

    def wait(self, seconds):
        """Until mpirun, its daemons and every rank have ended. Returns the exit code, what was printed and the
        seconds."""
        start = time.monotonic()
        while (code := self.mpirun.poll()) is None or self.cluster.processes():
            if time.monotonic() - start > seconds:
                raise AssertionError(f"after {seconds} s: {code}, left {self.cluster.processes()}\n{self.printed()}")
            time.sleep(0.1)
        return code, self.printed(), time.monotonic() - start

    def wait_for_a_point(self):
        while not (self.cluster.folder / "r.h5").exists():
            if self.mpirun.poll() is not None:
                raise AssertionError(self.printed())
            time.sleep(0.02)

    def printed(self):
        self.out.seek(0)
        return self.out.read()


class FourHosts(unittest.TestCase):
    working = threading.Lock()  # tests wait side by side, but only one job at a time computes
    reference = None  # the file of an undisturbed run

    def setUp(self):
        self.cluster = hosts.Hosts(4)
        self.addCleanup(self.cluster.remove)

    def whole_run(self, *arguments):
        code, said, _ = Job(self.cluster, LONG, *arguments).wait(LONG)
        self.assertEqual(code, 0, said)
        self.assertEqual(said.splitlines()[-1], "RESULT: VALID", said)
        for name in self.cluster.names:  # MPI has tidied up
            self.assertEqual(hosts.run(*self.cluster.on(name), "ls", "/dev/shm"), "", name)
        return said

    def verdicts(self):
        """{rank: why it ended}, as each rank wrote it."""
        files = self.cluster.folder.glob("r.h5.rank*.ops.json")
        return {report["rank"]: report["verdict"] for report in (json.loads(file.read_text()) for file in files)}

    def disturbed(self, disturb, deadline=DEADLINE):
        """Disturbs a run that has a point. Returns what it printed and its verdicts once all of it has ended."""
        with self.working:
            job = Job(self.cluster, deadline)
            job.wait_for_a_point()
            disturb()
        code, said, seconds = job.wait(min(deadline, DEADLINE) + PROMISED)
        self.assertNotEqual(code, 0, said)
        print(f"\n{self.id().split('.')[-1]}: ended after {seconds:.1f} s", file=sys.stderr)
        return said, self.verdicts()

    def assert_resumed(self):
        """The hosts are back: --resume completes the result, which is that of an undisturbed run."""
        self.cluster.heal()
        with self.working:
            said = self.whole_run("--resume")
            kept = int(re.search(r"going on after (\d+) point", said)[1])
            self.assertTrue(1 <= kept < POINTS, said)
            resumed = self.cluster.folder / "resumed.h5"
            os.rename(self.cluster.folder / "r.h5", resumed)
            if FourHosts.reference is None:
                self.whole_run()
                FourHosts.reference = (self.cluster.folder / "r.h5").read_bytes()
        (self.cluster.folder / "r.h5").write_bytes(FourHosts.reference)
        done = subprocess.run([NSA, "diff", "r.h5", resumed], cwd=self.cluster.folder, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_a_host_is_cut_off(self):
        said, verdicts = self.disturbed(lambda: self.cluster.cut("n3"))
        self.assertRegex(said, r"nsa: error: rank 2 \(n3\) is late: no answer")
        for rank in (0, 1, 3):
            self.assertRegex(verdicts[rank], r"^rank 2 \(n3\) is late")
        self.assert_resumed()

    def test_the_host_of_rank_0_and_mpirun_is_cut_off(self):
        _, verdicts = self.disturbed(lambda: self.cluster.cut("n1"))
        for rank in (1, 2, 3):  # mpirun is gone: their reports say it
            self.assertRegex(verdicts[rank], r"^rank 0 \(n1\) is late: no answer")
        self.assert_resumed()

    def test_the_network_between_two_halves_is_cut(self):
        said, verdicts = self.disturbed(lambda: self.cluster.separate("n3", "n4"))
        late = r"rank {} \({}\) is late: no answer.*rank {} \({}\) is late: no answer"
        one, other = late.format(2, "n3", 3, "n4"), late.format(0, "n1", 1, "n2")
        self.assertRegex(said, "nsa: error: " + one)
        # Both halves write the reports of all ranks; here they reach the same folder.
        self.assertEqual(sorted(verdicts), [0, 1, 2, 3])
        for verdict in verdicts.values():
            self.assertRegex(verdict, f"^({one}|{other})")
        self.assert_resumed()

    def test_mpirun_ends_the_job_before_the_deadline(self):
        """Its keepalive notices the lost host: a job with the default deadline does not keep its hosts for minutes."""
        said, _ = self.disturbed(lambda: self.cluster.cut("n3"), LONG)
        self.assertIn("n3", said)


def run_side_by_side():
    """Every test has hosts of its own, and most of its time it waits."""
    suite = unittest.defaultTestLoader.loadTestsFromName(".".join(sys.argv[1:]) or "FourHosts", sys.modules["__main__"])
    tests = list(suite) if isinstance(suite, unittest.TestSuite) else [suite]
    results = [unittest.TestResult() for _ in tests]
    with concurrent.futures.ThreadPoolExecutor(len(tests)) as pool:
        list(pool.map(lambda test, result: test.run(result), tests, results))
    for test, result in zip(tests, results):
        for _, reason in result.failures + result.errors:
            print(f"FAIL: {test.id()}\n{reason}")
        print(f"{test.id()}: {'ok' if result.wasSuccessful() else 'FAILED'}")
    return 0 if all(result.wasSuccessful() for result in results) else 1


if __name__ == "__main__":
    sys.exit(hosts.main(run_side_by_side))
