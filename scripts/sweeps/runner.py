"""Runs cases of a sweep on this machine, or one of them as a task of a job array."""

import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from .cases import UsageError, settings
from .states import INTERRUPTED, RUNNABLE, cause, sha256_of, start_time_of


def own_task():
    """The array task that this process is; None outside of one."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    return job and "%s_%s" % (job, os.environ["SLURM_ARRAY_TASK_ID"])


class Runner:
    """USR1 and TERM are forwarded to every nsa, which completes its point and exits with 75."""

    def __init__(self, nsa, launch, states, jobs):
        self.nsa, self.launch, self.states = nsa, launch, states
        self.children = set()
        self.stopped = False
        cores = sorted(os.sched_getaffinity(0))
        if jobs > len(cores):
            raise UsageError("--jobs %d (%d cores here); give each run a core at least" % (jobs, len(cores)))
        # One run at a time may use every core; several get a share each.
        self.shares = [cores[i * len(cores) // jobs:(i + 1) * len(cores) // jobs] for i in range(jobs)]
        self.lock = threading.Lock()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)

    def stop(self, number, _):
        self.stopped = True
        if number != signal.SIGINT:  # Ctrl-C reaches the children
            for child in list(self.children):
                if child.poll() is None:
                    child.send_signal(signal.SIGUSR1)

    def command(self, case, resume):
        words = [word.replace("{ranks}", str(case.ranks)) for word in shlex.split(self.launch)]
        words += [self.nsa, "run", case.input] + settings(case)
        words += ["--output", self.states.path(case, ".h5"), "--json", self.states.path(case, ".json")]
        return words + (["--resume"] if resume else [])

    def start(self, command, log, cores):
        os.sched_setaffinity(0, cores)  # of this thread, from which the child inherits it
        try:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        except OSError as error:
            reason = (command[0], error.strerror)
            raise UsageError("cannot start %s (%s); choose another --launch" % reason) from None

    def run(self, case, resume, cores):
        """Runs one case, records what became of it and returns its exit code. Its output goes to the log."""
        command = self.command(case, resume)
        earlier = self.states.record(case)
        start = time.monotonic()  # the clock of the day may be set back
        with open(self.states.path(case, ".log"), "a") as log:
            log.write("$ " + " ".join(map(shlex.quote, command)) + "\n")
            log.flush()
            child = self.start(command, log, cores)
            self.children.add(child)
            self.states.write(case, state="running", started=time.time(), host=socket.gethostname(), pid=os.getpid(),
                              start_time=start_time_of(os.getpid()), input_sha256=sha256_of(case.input),
                              job=own_task(), attempts=earlier.get("attempts", 0) + 1,
                              code=None, cause="")
            if self.stopped:
                child.send_signal(signal.SIGUSR1)
            code = child.wait()
            self.children.discard(child)
        before = earlier.get("seconds", 0) if resume else 0
        failed = code not in (0, 3, INTERRUPTED)
        self.states.write(case, state="failed" if failed else "ended", code=code,
                          cause=cause(code, self.states.path(case, ".log")) if failed else "",
                          seconds=before + time.monotonic() - start)
        return code

    def is_wanted(self, status, retry_failed):
        own = own_task()
        if own and status.record.get("job") in (own, None):  # queued or requeued as this task
            return status.state in RUNNABLE + ("queued", "running", "failed")
        return status.state in RUNNABLE or (status.state == "failed" and retry_failed)

    def run_all(self, cases, retry_failed):
        """Runs the cases that are not complete. Returns {case: exit code}."""
        codes = {}
        shares = list(self.shares)

        def work(item):
            number, case = item
            status = self.states.of(case)
            state, wanted = status.state, self.is_wanted(status, retry_failed)
            if wanted and not self.stopped:
                with self.lock:
                    cores = shares.pop()
                start = time.monotonic()
                resume = os.path.exists(self.states.path(case, ".h5"))
                try:
                    codes[case] = self.run(case, resume, cores)
                finally:
                    with self.lock:
                        shares.append(cores)
                outcome = "exit code %d after %.1f s" % (codes[case], time.monotonic() - start)
            else:
                outcome = "not started" if wanted else "failed before" if state == "failed" else \
                    state if state in ("queued", "running") else "there already"
            print("[%d/%d] %s: %s" % (number, len(cases), self.states.names[case], outcome), flush=True)

        with ThreadPoolExecutor(len(self.shares)) as pool:
            for done in [pool.submit(work, item) for item in enumerate(cases, 1)]:
                done.result()
        return codes
