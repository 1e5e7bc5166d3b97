#!/usr/bin/env python3
"""Runs a sweep of nsa: rank counts x layouts x inputs. Completed runs are skipped, and a failure does not stop the
other runs. A summary is printed at the end. --submit submits the same list to Slurm, one job array per rank count.

The list has one line per group of runs; # starts a comment:

  # ranks   heads x kv   input                 options of `nsa run`
  1,2,4     all          inputs/scaling.toml
  8         1x8,2x4      inputs/scaling.toml   --set run.context=131072

heads x kv: layouts whose product is the rank count; "all": every layout that the input allows; "auto": nsa chooses.
Paths are relative to the current folder. Results go to RESULTS/<input>_r<ranks>_h<heads>_kv<kv>[_<hash of options>].h5,
with .json (summary, written at the end of the run) and .log next to it. A run is complete when its .json exists and has
the hash of the input; an incomplete run is resumed.

Exit codes: 0 all runs are complete and VALID, 1 some are not, 2 usage, 75 interrupted: repeat the command to continue.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import namedtuple

INTERRUPTED = 75
BAD_INPUT = 2

Case = namedtuple("Case", "ranks heads kv input options")
Group = namedtuple("Group", "number ranks layouts input options")


class UsageError(Exception):
    pass


def parse_list(path):
    """The lines of the list as Groups. Raises UsageError with file and line."""
    groups = []
    try:
        with open(path) as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot read %s (%s); give the path of a sweep list" % (path, error)) from None
    for number, line in enumerate(lines, 1):
        where = "%s:%d: " % (path, number)
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(where + "%s; close the quotation" % error) from None
        if not words:
            continue
        if len(words) < 3:
            raise UsageError(where + "a line is: ranks, heads x kv, input, options; see --help")
        try:
            ranks = [int(word) for word in words[0].split(",")]
        except ValueError:
            ranks = []
        if not ranks or min(ranks) < 1:
            raise UsageError(where + "%r (not rank counts); give positive numbers, like 1,2,4" % words[0])
        layouts = words[1].split(",")
        for layout in layouts:
            if layout not in ("all", "auto") and not re.match(r"^[1-9]\d*x[1-9]\d*$", layout):
                raise UsageError(where + "%r (not a layout); give heads x kv like 2x4, all or auto" % layout)
        if not os.path.isfile(words[2]):
            raise UsageError(where + "%s (no such file); give the path of an input from here" % words[2])
        groups.append(Group(number, ranks, layouts, words[2], tuple(words[3:])))
    return groups


def allowed(nsa, case):
    """(whether the input allows this layout, message of nsa if not), from a dry run of nsa."""
    command = [nsa, "run", case.input, "--dry-run", "--ranks", str(case.ranks)] + settings(case)
    try:
        plan = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    except OSError as error:
        raise UsageError("cannot start %s (%s); give the program with --nsa" % (nsa, error.strerror)) from None
    if plan.returncode not in (0, BAD_INPUT):
        raise UsageError("%s failed: %s" % (" ".join(command), plan.stderr.strip()))
    return plan.returncode == 0, plan.stderr.strip()


def settings(case):
    layout = []
    for name, value in (("heads", case.heads), ("kv", case.kv)):
        if value is not None:
            layout += ["--set", "parallel.%s=%d" % (name, value)]
    return layout + list(case.options)


def layouts_of(nsa, group, ranks):
    """Cases of one rank count."""
    for layout in group.layouts:
        if layout == "auto":
            yield Case(ranks, None, None, group.input, group.options)
        elif layout == "all":
            tried = [Case(ranks, h, ranks // h, group.input, group.options)
                     for h in range(1, ranks + 1) if ranks % h == 0]
            answers = [(case, allowed(nsa, case)) for case in tried]
            if not any(answer[0] for _, answer in answers):
                raise UsageError("line %d: no heads x kv of %d ranks fits %s: %s"
                                 % (group.number, ranks, group.input, answers[0][1][1]))
            for case, answer in answers:
                if answer[0]:
                    yield case
        else:
            heads, kv = map(int, layout.split("x"))
            if heads * kv == ranks:
                yield Case(ranks, heads, kv, group.input, group.options)


def expand(nsa, groups):
    """Every run once, in the order of the list. Raises UsageError for a layout that fits no rank count of its line."""
    cases = []
    for group in groups:
        for layout in group.layouts:
            heads, _, kv = layout.partition("x")
            if kv and int(heads) * int(kv) not in group.ranks:
                raise UsageError("line %d: layout %s (not of %s ranks); heads x kv is the rank count"
                                 % (group.number, layout, " or ".join(map(str, group.ranks))))
        for ranks in group.ranks:
            for case in layouts_of(nsa, group, ranks):
                if case not in cases:
                    cases.append(case)
    if not cases:
        raise UsageError("the list is empty; see --help")
    return cases


def stem(case):
    name = os.path.splitext(os.path.basename(case.input))[0] + "_r%d" % case.ranks
    name += "_auto" if case.heads is None else "_h%d_kv%d" % (case.heads, case.kv)
    if case.options:
        name += "_" + hashlib.sha256("\0".join(case.options).encode()).hexdigest()[:8]
    return name


def state_of(case, results):
    """("done" | "invalid" | "stale" | "unfinished" | "missing", the JSON summary or None)."""
    path = os.path.join(results, stem(case))
    if not os.path.exists(path + ".h5"):
        return "missing", None
    try:
        with open(path + ".json") as file:
            summary = json.load(file)
        with open(case.input, "rb") as file:
            same = hashlib.sha256(file.read()).hexdigest() == summary["input_sha256"]
    except (OSError, ValueError, KeyError):
        return "unfinished", None
    if not same:
        return "stale", summary
    return ("done" if summary["result"] == "VALID" else "invalid"), summary


class Runner:
    """Runs cases in sequence. USR1 and TERM are forwarded to nsa, which completes its point and exits with 75."""

    def __init__(self, nsa, launch, results):
        self.nsa, self.launch, self.results = nsa, launch, results
        self.child = None
        self.stopped = False
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)

    def stop(self, number, _):
        self.stopped = True
        if self.child is not None and self.child.poll() is None and number != signal.SIGINT:  # Ctrl-C reaches the child
            self.child.send_signal(signal.SIGUSR1)

    def run(self, case, resume):
        """Runs one case and returns its exit code. Output goes to the log."""
        path = os.path.join(self.results, stem(case))
        command = [word.replace("{ranks}", str(case.ranks)) for word in shlex.split(self.launch)]
        command += [self.nsa, "run", case.input] + settings(case) + ["--output", path + ".h5", "--json", path + ".json"]
        command += ["--resume"] if resume else []
        with open(path + ".log", "a") as log:
            log.write("$ " + " ".join(map(shlex.quote, command)) + "\n")
            log.flush()
            try:
                self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            except OSError as error:
                reason = (command[0], error.strerror)
                raise UsageError("cannot start %s (%s); choose another --launch" % reason) from None
            if self.stopped:
                self.child.send_signal(signal.SIGUSR1)
            return self.child.wait()


def last_error(path):
    try:
        with open(path, errors="replace") as file:
            lines = [line.strip() for line in file if "error" in line or line.startswith("RESULT: INVALID")]
    except OSError:
        return ""
    return lines[-1] if lines else ""


def run_cases(cases, runner):
    """Runs the cases that are not complete. Returns {case: exit code}."""
    codes = {}
    for number, case in enumerate(cases, 1):
        state, _ = state_of(case, runner.results)
        if state in ("missing", "unfinished") and not runner.stopped:
            start = time.time()
            codes[case] = runner.run(case, resume=state == "unfinished")
            outcome = "exit code %d after %.1f s" % (codes[case], time.time() - start)
        else:
            outcome = "not started" if state in ("missing", "unfinished") else "there already"
        print("[%d/%d] %s: %s" % (number, len(cases), stem(case), outcome), flush=True)
    return codes


def headline(summary):
    for name, figure in (summary or {}).get("figures", {}).items():
        if "_time_" in name or "_found_" in name:
            return "%s = %s %s" % (name, figure["value"], figure["unit"])
    return ""


def summarise(cases, results, codes):
    """Prints one line per run. Returns whether all are complete and VALID."""
    print("\n%-32s %5s %7s %-10s" % ("run", "ranks", "layout", "state"))
    commits, good = set(), True
    for case in cases:
        state, summary = state_of(case, results)
        path = os.path.join(results, stem(case))
        remark = headline(summary)
        if state == "stale":
            remark = "%s has changed since; remove the result or choose another --results" % case.input
        elif state != "done":
            remark = last_error(path + ".log") or remark
        if codes.get(case) not in (None, 0, INTERRUPTED) and state in ("missing", "unfinished"):
            state = "failed %d" % codes[case]
        if summary:
            commits.add(summary["git_commit"])
        good = good and state == "done"
        layout = "auto" if case.heads is None else "%dx%d" % (case.heads, case.kv)
        print("%-32s %5d %7s %-10s %s" % (stem(case), case.ranks, layout, state, remark))
    if len(commits) > 1:
        print("results of %d commits (%s): do not draw them as one curve" % (len(commits), ", ".join(sorted(commits))))
    return good


def submit(args, cases):
    """Submits incomplete runs, one job array per rank count, each with the nodes that it needs."""
    wanted = [i for i, case in enumerate(cases) if state_of(case, args.results)[0] in ("missing", "unfinished")]
    for ranks in sorted({cases[i].ranks for i in wanted}):
        indices = ",".join(str(i) for i in wanted if cases[i].ranks == ranks)
        nodes = -(-ranks // args.ranks_per_node)
        if ranks % nodes:
            raise UsageError("%d ranks do not fill %d nodes evenly; choose another --ranks-per-node" % (ranks, nodes))
        command = ["sbatch", "--array=" + indices, "--nodes=%d" % nodes, "--ntasks-per-node=%d" % (ranks // nodes)]
        command += args.sbatch + [args.submit, args.list, args.results]
        print(" ".join(map(shlex.quote, command)), flush=True)
        try:
            code = subprocess.call(command)
        except OSError as error:
            raise UsageError("cannot start sbatch (%s); run this where Slurm is" % error.strerror) from None
        if code != 0:
            return 1
    if not wanted:
        print("nothing is left to submit")
    return 0


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", help="the sweep list")
    nsa = os.environ.get("NSA", "build/host/nsa")
    parser.add_argument("--nsa", default=nsa, help="the program (default %(default)s)")
    parser.add_argument("--launch", default="mpirun -n {ranks}", help="what starts it (default: %(default)s)")
    parser.add_argument("--results", help="folder of the results (default: the list's name without its suffix)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--case", type=int, metavar="N", help="run only the N-th run of the list, from 0 (array tasks)")
    what.add_argument("--show", action="store_true", help="run nothing: print the runs and their numbers")
    what.add_argument("--summary", action="store_true", help="run nothing: print the summary")
    what.add_argument("--submit", metavar="SCRIPT",
                      help="sbatch SCRIPT as an array for each rank count; what follows a -- goes to sbatch")
    parser.add_argument("--ranks-per-node", type=int, default=8, help="with --submit (default %(default)s)")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.sbatch = argv[split + 1:]
    if args.sbatch and not args.submit:
        parser.error("options of sbatch without --submit")
    args.results = args.results or os.path.splitext(os.path.basename(args.list))[0]
    return args


def main(argv):
    args = parse_arguments(argv)
    cases = expand(args.nsa, parse_list(args.list))
    if args.show:
        for number, case in enumerate(cases):
            print("%d %s: %s" % (number, stem(case), " ".join(map(shlex.quote, [case.input] + settings(case)))))
        return 0
    if args.submit:
        return submit(args, cases)
    if args.summary:
        return 0 if summarise(cases, args.results, {}) else 1
    if args.case is not None:
        if not 0 <= args.case < len(cases):
            raise UsageError("--case %d (the list has 0 to %d); see --show" % (args.case, len(cases) - 1))
        cases = [cases[args.case]]
    os.makedirs(args.results, exist_ok=True)
    runner = Runner(args.nsa, args.launch, args.results)
    codes = run_cases(cases, runner)
    good = summarise(cases, args.results, codes)
    return INTERRUPTED if runner.stopped or INTERRUPTED in codes.values() else 0 if good else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print("sweep: error: %s" % error, file=sys.stderr)
        sys.exit(BAD_INPUT)
