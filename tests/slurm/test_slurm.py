"""The job scripts under a real Slurm: one node, loopback, the host backend, srun --mpi=pmix and mpirun.

usage: test_slurm.py PACKAGES     a folder for what ../unpack.sh leaves; exits with 77 where it cannot be had
"""

import re
import subprocess
import sys
import time

from slurm_test import LAUNCHERS, LONG_POINTS, NSA, SCRIPTS, SMALL, SlurmTest, main

PLAIN = ("cpu_one_node", "cpu_nodes", "gpu_one_node", "gpu_nodes")
HERE_ONLY = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1")  # what this node has, over what the scripts ask
ALL_DONE = 400  # seconds until every job has ended; some 30 on two quiet cores

TINY = SMALL.replace("context = 64", "context = [64, 128]")
SWEEP = """# ranks  heads x kv  input
1,2   all   tiny.toml
"""


class Jobs(SlurmTest):
    """All jobs are submitted at once, each test looks at its own."""

    @classmethod
    def setUpClass(cls):
        cls.start_slurm(tiny=TINY)
        (cls.work / "tiny.sweep").write_text(SWEEP)
        cls.told = set()
        cls.long_jobs = {launcher: cls.submit("requeue", launcher, "long.toml") for launcher in LAUNCHERS}
        cls.lost_jobs = {launcher: cls.submit("cpu_nodes", launcher, "long.toml") for launcher in LAUNCHERS}
        cls.jobs = {(name, launcher): cls.submit(name, launcher) for name in PLAIN for launcher in LAUNCHERS}
        for launcher in LAUNCHERS:
            cls.sweep(launcher)
        cls.wait_for_all()

    @classmethod
    def submit(cls, name, launcher, text="tiny.toml"):
        gpus = ["--gpus-per-node=2"] if name.startswith("gpu") else []
        return cls.submit_script(name, *HERE_ONLY, *gpus, NSA=NSA, INPUT=text, LAUNCHER=launcher, BACKEND="host")

    @classmethod
    def run_sweep(cls, launcher, *arguments, check=True):
        command = [sys.executable, "scripts/sweep.py", "tiny.sweep", "--nsa", NSA, "--results", f"results-{launcher}"]
        environment = {**cls.slurm.environment, "NSA": NSA, "LAUNCHER": launcher}
        done = subprocess.run([*command, *arguments], cwd=cls.work, env=environment, capture_output=True, text=True,
                              timeout=60)  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(done.stdout + done.stderr)
        return done.stdout

    @classmethod
    def sweep(cls, launcher):
        cls.run_sweep(launcher, "--submit", str(SCRIPTS / "sweep.sh"), "--", "--cpus-per-task=1")

    @classmethod
    def all_ended(cls):
        """On the way, each long job is told once to end, as soon as it has sealed its first point. From each job that
        shall lose its node Slurm takes it at that moment, as it does when the node fails."""
        for number in [*cls.long_jobs.values(), *cls.lost_jobs.values()]:
            if number not in cls.told and (cls.work / f"long-{number}.h5").exists():
                if number in cls.lost_jobs.values():
                    cls.slurm.run("scontrol", "requeue", number)
                else:
                    cls.slurm.run("scancel", "--batch", "--signal=USR1", number)
                cls.told.add(number)
        return cls.no_job_is_left()

    @classmethod
    def wait_for_all(cls):
        cls.slurm.until(cls.all_ended, "the end of all jobs", ALL_DONE)

    def test_what_is_left_running_would_be_found(self):
        stray = subprocess.Popen(["sleep", "60"], env=self.slurm.environment, start_new_session=True)
        self.addCleanup(stray.wait)
        self.addCleanup(stray.kill)
        end = time.monotonic() + 10  # its environment shows a moment after its start
        while stray.pid not in self.slurm.processes() and time.monotonic() < end:
            time.sleep(0.1)
        self.assertIn(stray.pid, self.slurm.processes())

    def test_every_script_is_run(self):
        scripts = {path.stem for path in SCRIPTS.glob("*.sh")}
        self.assertEqual(scripts, {*PLAIN, "sweep", "requeue"})

    def test_one_and_several_nodes_cpu_and_gpu(self):
        for (name, launcher), number in self.jobs.items():
            with self.subTest(script=name, launcher=launcher):
                self.assert_completed(number)
                told = self.result(f"tiny-{number}")
                self.assertEqual((told["ranks"], told["backend"], told["result"]), (2, "host", "VALID"))
        self.assert_same(*(f"tiny-{self.jobs['cpu_one_node', launcher]}" for launcher in LAUNCHERS))

    def test_a_plain_job_that_loses_its_node_goes_on_after_the_requeue(self):
        for launcher, number in self.lost_jobs.items():
            with self.subTest(launcher=launcher):
                output = self.assert_completed(number)
                self.assertEqual((self.job(number)["Restarts"], number in self.told), ("1", True), output)
                self.assertRegex(output, r"going on after \d+ points?")  # and what was printed before is kept:
                self.assertLess(output.index("CANCELLED"), output.index("going on after"), output)
                self.assert_same(self.undisturbed(), f"long-{number}")

    def test_a_signalled_job_requeues_resumes_and_ends_complete(self):
        for launcher, number in self.long_jobs.items():
            with self.subTest(launcher=launcher):
                output = self.assert_completed(number)
                self.assertEqual((self.job(number)["Restarts"], number in self.told), ("1", True), output)
                self.assertIn(f"requeue: job {number} goes back into the queue, restart 1", output)
                verdicts = re.findall(r"^RESULT: (\w+)", output, re.MULTILINE)
                self.assertEqual(verdicts, ["INTERRUPTED", "VALID"], output)
                kept = int(re.search(r"going on after (\d+) points", output)[1])
                self.assertTrue(1 <= kept < LONG_POINTS, output)
                figures = self.result(f"long-{number}")["figures"]
                self.assertEqual(sum("_time_" in name for name in figures), LONG_POINTS)
                self.assert_same(self.undisturbed(), f"long-{number}")

    def test_the_array_sweep_finishes(self):
        names = ["tiny_r1_h1_kv1", "tiny_r2_h1_kv2", "tiny_r2_h2_kv1"]
        for launcher in LAUNCHERS:
            with self.subTest(launcher=launcher):
                summary = self.run_sweep(launcher, "--summary")
                self.assertEqual(len(re.findall(r" done ", summary)), 3, summary)
                for name, ranks in zip(names, (1, 2, 2)):
                    told = self.result(f"results-{launcher}/{name}")
                    self.assertEqual((told["ranks"], told["result"]), (ranks, "VALID"))
                    self.assertIn(f"heads={told['heads']}", told["argv"])
                self.assertEqual(self.run_sweep(launcher, "--submit", "x"), "nothing is left to submit\n")


if __name__ == "__main__":
    sys.exit(main())
