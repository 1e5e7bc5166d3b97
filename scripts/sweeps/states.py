"""What became of each run of a sweep. RESULTS/<name>.h5 and .json are the result. RESULTS/<name>.state is JSON,
replaced as a whole by whoever submits or runs the case. RESULTS/<name>.log is the output of all attempts.

States: missing; queued, running; unfinished (it has points, and can be resumed); failed; done, invalid; stale (the
input has changed since)."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections import namedtuple

INTERRUPTED = 75
RUNNABLE = ("missing", "unfinished")

Status = namedtuple("Status", "state record summary")  # record: of the .state file; summary: of the .json or None


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def read_json(path):
    """The object in the file; empty where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class States:
    """The files of a results folder. Slurm's queue and the processes of this machine are asked once."""

    def __init__(self, results, names):
        self.results, self.names = results, names
        self.queue = None

    def path(self, case, suffix):
        return os.path.join(self.results, self.names[case] + suffix)

    def record(self, case):
        return read_json(self.path(case, ".state"))

    def write(self, case, **changes):
        """Changes the record; the file is always whole."""
        record = self.record(case)
        record.update(changes)
        partial = self.path(case, ".state.%s.%d" % (socket.gethostname(), os.getpid()))
        with open(partial, "w") as file:
            json.dump(record, file, sort_keys=True)
        os.replace(partial, self.path(case, ".state"))

    def of(self, case):
        record = self.record(case)
        summary = read_json(self.path(case, ".json"))
        has_result = os.path.exists(self.path(case, ".h5"))
        input_sha = sha256_of(case.input)
        if has_result and summary.get("result"):
            state = "done" if summary["result"] == "VALID" else "invalid"
            return Status(state if summary.get("input_sha256") == input_sha else "stale", record, summary)
        state = record.get("state")
        if state in ("queued", "running"):
            if self.is_alive(record):
                return Status((self.queue or {}).get(record.get("job"), state), record, None)
            record["cause"] = gone(record, self.path(case, ".log"))
            state = "failed"
        if state == "failed" and record.get("input_sha256", input_sha) == input_sha:
            return Status("failed", record, None)
        return Status("unfinished" if has_result else "missing", record, None)

    def is_alive(self, record):
        """Whether the job is in Slurm's queue, or the process on this machine. Another machine's counts as alive."""
        if record.get("job"):
            if self.queue is None:
                self.queue = slurm_queue()
            return self.queue is None or record["job"] in self.queue
        if record.get("host") != socket.gethostname():
            return record.get("state") == "running"
        return record.get("start_time") == start_time_of(record.get("pid", 0))


def start_time_of(pid):
    """Distinguishes a process from a later one of the same number. None: there is none."""
    try:
        with open("/proc/%d/stat" % pid) as file:
            return file.read().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None


def slurm_queue():
    """{array task: "queued" or "running"} of Slurm's queue; None where it cannot be asked."""
    try:
        told = subprocess.run(["squeue", "-h", "-r", "-o", "%F_%K %T"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if told.returncode != 0:
        return None
    tasks = (line.split() for line in told.stdout.splitlines())
    return {words[0]: "running" if words[1] == "RUNNING" else "queued" for words in tasks if len(words) == 2}


def gone(record, log):
    """The cause of a run that ended without a word: its node, its job or the machine was lost."""
    if record.get("job"):
        who, hint = "job " + record["job"], "sacct -j tells why"
    else:
        who, hint = "process %s on %s" % (record.get("pid"), record.get("host")), "killed?"
    said = first_error(log)
    return "%s ended without a word (%s)%s" % (who, hint, ": " + said if said else "")


def last_attempt(log):
    """The lines of the log since the last command."""
    try:
        with open(log, errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    return lines[starts[-1] + 1:] if starts else lines


def first_error(log):
    """The line that says why: nsa's own, else the first one that speaks of an error."""
    lines = [line.strip() for line in last_attempt(log)]
    for pattern in (r"nsa: (internal )?error: ", r"RESULT: INVALID", r"(?i)error|not enough slots|cannot|killed"):
        for line in lines:
            if re.search(pattern, line):
                return line
    return ""


def cause(code, log):
    """Why a run failed: how it ended, and the first error that it printed. That names rank and host where it knows."""
    number = -code if code < 0 else code - 128 if 128 < code < 160 else 0
    try:
        how = "signal %d (%s)" % (number, signal.Signals(number).name) if number else "exit code %d" % code
    except ValueError:
        how = "exit code %d" % code
    said = first_error(log)
    return how + (": " + said if said else " on %s, without a message" % socket.gethostname())


def seconds_left(statuses, jobs):
    """Estimate for the runs that have not ended, from those that have: of the same input where there are any. None: no
    run has ended yet."""
    took = {}
    for case, status in statuses.items():
        if status.state in ("done", "invalid") and status.record.get("seconds"):
            took.setdefault(case.input, []).append(status.record["seconds"])
    every = [seconds for runs in took.values() for seconds in runs]
    if not every:
        return None
    left = 0.0
    for case, status in statuses.items():
        if status.state in RUNNABLE + ("queued", "running"):
            runs = took.get(case.input, every)
            expected = sum(runs) / len(runs)
            if status.state == "running":
                so_far = time.time() - status.record.get("started", time.time())  # below 0 where a clock was set back
                expected = max(0.0, expected - max(0.0, so_far))
            left += expected
    return left / jobs
