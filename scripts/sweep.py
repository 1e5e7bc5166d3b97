#!/usr/bin/env python3
"""Runs a sweep of nsa: rank counts x layouts x inputs. Completed runs are skipped, and a failure does not stop the
other runs. A summary is printed at the end. --submit submits the same list to Slurm, one job array per rank count.

The list has one line per group of runs; # starts a comment:

  # ranks   heads x kv   input                 options of `nsa run`
  1,2,4     all          inputs/scaling/scaling.toml
  8         1x8,2x4      inputs/scaling/scaling.toml   --set run.context=131072

heads x kv: layouts whose product is the rank count; "all": every layout that the input allows; "auto": nsa chooses.
Paths are relative to the current folder. Results go to RESULTS/<input>_r<ranks>_h<heads>_kv<kv>[_<options>].h5, with
.json (summary, written at the end of the run), .log (output of all attempts) and .state (JSON: state, job, host,
seconds, exit code, cause) next to it. A run is complete when its .json exists and has the hash of the input. An
incomplete run is resumed, one that is queued or running is left alone, and a failed one runs again with --retry-failed
or when its input has changed.

  scripts/sweep.py LIST                            here, one run after the other
  scripts/sweep.py LIST --jobs 4                   here, four at a time, each on a quarter of the cores
  scripts/sweep.py LIST --submit jobscripts/slurm/sweep.sh --ranks-per-node 8 [--after JOBID]
  scripts/sweep.py LIST --status [--csv FILE]      what became of each run, why it failed, and how long the rest takes

Exit codes: 0 all runs are complete and VALID, 1 some are not, 2 usage, 75 interrupted: repeat the command to continue.
"""

import argparse
import csv
import os
import shlex
import sys

from sweeps.cases import BAD_INPUT, UsageError, expand, names_of, parse_list, settings
from sweeps.runner import Runner
from sweeps.slurm import submit
from sweeps.states import INTERRUPTED, States, seconds_left


def headline(summary):
    for name, figure in (summary or {}).get("figures", {}).items():
        if "_time_" in name or "_found_" in name:
            return "%s = %s %s" % (name, figure["value"], figure["unit"])
    return ""


def remark(case, status):
    """The figure of a complete run; why another is not complete."""
    if status.state == "stale":
        return "%s has changed since; remove the result or choose another --results" % case.input
    if status.state == "invalid":
        return (status.summary or {}).get("reason") or "a check failed; see its .log"
    if status.state == "failed":
        return status.record.get("cause", "")
    if status.state in ("queued", "running"):
        job, host = status.record.get("job"), status.record.get("host")
        return "job " + job if job else "on " + host
    return headline(status.summary)


def layout_of(case):
    return "auto" if case.heads is None else "%dx%d" % (case.heads, case.kv)


def duration(seconds):
    return "%.0f s" % seconds if seconds < 120 else "%.0f min" % (seconds / 60) if seconds < 7200 else \
        "%.1f h" % (seconds / 3600)


def summarise(cases, states, jobs):
    """Prints one line per run. Returns whether all are complete and VALID."""
    statuses = {case: states.of(case) for case in cases}
    width = max([32] + [len(states.names[case]) for case in cases])
    print("\n%-*s %5s %7s %-10s %8s" % (width, "run", "ranks", "layout", "state", "time"))
    for case, status in statuses.items():
        seconds = status.record.get("seconds")
        print(("%-*s %5d %7s %-10s %8s %s" % (width, states.names[case], case.ranks, layout_of(case), status.state,
                                              "-" if seconds is None else duration(seconds),
                                              remark(case, status))).rstrip())
    count = {}
    for status in statuses.values():
        count[status.state] = count.get(status.state, 0) + 1
    print(", ".join("%d %s" % (number, state) for state, number in sorted(count.items())) + of_rest(statuses, jobs))
    commits = {status.summary["git_commit"] for status in statuses.values() if status.summary}
    if len(commits) > 1:
        print("results of %d commits (%s): do not draw them as one curve" % (len(commits), ", ".join(sorted(commits))))
    return count.get("done", 0) == len(cases)


def of_rest(statuses, jobs):
    left = seconds_left(statuses, jobs)
    return "; about %s left, as the ended runs took" % duration(left) if left else ""


def write_csv(path, cases, states):
    """A line for each run; of its figures the one that the summary shows."""
    columns = ("run", "input", "options", "ranks", "heads", "kv", "state", "seconds", "attempts", "exit_code", "cause",
               "host", "job", "figure", "value", "unit")
    try:
        with open(path, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(columns)
            for case in cases:
                status = states.of(case)
                record = status.record
                figure = headline(status.summary).split(" ", 3) if status.summary else []
                table.writerow([states.names[case], case.input, " ".join(map(shlex.quote, case.options)), case.ranks,
                                case.heads, case.kv, status.state] +
                               [record.get(key) for key in ("seconds", "attempts", "code", "cause", "host", "job")] +
                               ([figure[0], figure[2], figure[3]] if len(figure) == 4 else ["", "", ""]))
    except OSError as error:
        raise UsageError("cannot write %s (%s); choose another --csv" % (path, error.strerror)) from None


def check_written(args, cases, states):
    """Raises UsageError where the CSV would replace a file of the sweep, or the results have no folder."""
    if os.path.exists(args.results) and not os.path.isdir(args.results):
        raise UsageError("--results %s (not a folder); choose another" % args.results)
    if args.csv is None:
        return
    kept = [args.list] + [case.input for case in cases]
    kept += [states.path(case, suffix) for case in cases for suffix in (".h5", ".json", ".log", ".state")]
    if os.path.realpath(args.csv) in map(os.path.realpath, kept):
        raise UsageError("cannot write %s (it is the list, an input or a result); choose another --csv" % args.csv)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("list", help="the sweep list")
    nsa = os.environ.get("NSA", "build/host/nsa")
    parser.add_argument("--nsa", default=nsa, help="the program (default %(default)s)")
    parser.add_argument("--launch", default="mpirun -n {ranks}", help="what starts it (default: %(default)s)")
    parser.add_argument("--results", help="folder of the results (default: the list's name without its suffix)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--case", type=int, metavar="N", help="run only the N-th run of the list, from 0 (array tasks)")
    what.add_argument("--show", action="store_true", help="run nothing: print the runs and their numbers")
    what.add_argument("--status", "--summary", action="store_true",
                      help="run nothing: print what became of each run and how long the rest may take")
    what.add_argument("--submit", metavar="SCRIPT",
                      help="sbatch SCRIPT as an array for each rank count; what follows a -- goes to sbatch")
    parser.add_argument("--csv", metavar="FILE", help="also write the summary as CSV, with --status or at the end")
    parser.add_argument("--retry-failed", action="store_true", help="failed runs too, from their last point on")
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="runs at a time on this machine, each on its share of the cores (default %(default)s)")
    parser.add_argument("--after", metavar="JOBID", help="with --submit: not before this job has ended")
    parser.add_argument("--ranks-per-node", type=int, default=8, help="with --submit (default %(default)s)")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.sbatch = argv[split + 1:]
    if args.sbatch and not args.submit:
        parser.error("options of sbatch without --submit")
    if args.after and not args.submit:
        parser.error("--after without --submit")
    if args.jobs < 1:
        parser.error("--jobs %d (no run at all); give 1 or more" % args.jobs)
    for name in ("nsa", "results", "submit", "csv"):
        if getattr(args, name) == "":
            parser.error("--%s is empty" % name)
    args.results = args.results or os.path.splitext(os.path.basename(args.list))[0]
    return args


def main(argv):
    args = parse_arguments(argv)
    cases = expand(args.nsa, parse_list(args.list))
    states = States(args.results, names_of(cases, args.results))
    check_written(args, cases, states)
    if args.show:
        for number, case in enumerate(cases):
            print("%d %s: %s" % (number, states.names[case], " ".join(map(shlex.quote, [case.input] + settings(case)))))
        return 0
    if args.status:
        if args.csv:
            write_csv(args.csv, cases, states)
        return 0 if summarise(cases, states, args.jobs) else 1
    os.makedirs(args.results, exist_ok=True)
    if args.submit:
        return submit(args, cases, states)
    if args.case is not None:
        if not 0 <= args.case < len(cases):
            raise UsageError("--case %d (the list has 0 to %d); see --show" % (args.case, len(cases) - 1))
        cases = [cases[args.case]]
    runner = Runner(args.nsa, args.launch, states, args.jobs)
    codes = runner.run_all(cases, args.retry_failed)
    if args.csv:
        write_csv(args.csv, cases, states)
    good = summarise(cases, states, args.jobs)
    return INTERRUPTED if runner.stopped or INTERRUPTED in codes.values() else 0 if good else 1


class Output:
    """Standard output whose reader may go away, or whose disk may fill: the runs go on."""

    def __init__(self, stream):
        self.stream, self.error = stream, None

    def write(self, text):
        self.attempt(lambda: self.stream.write(text))

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, operation):
        if self.error is None:
            try:
                operation()
            except OSError as error:
                self.error = error
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # what it still buffers goes there


def with_lasting_output(argv):
    """main; 1 where standard output could not be written, unless its reader went away."""
    if sys.stdout is None:  # closed
        return main(argv)
    sys.stdout = output = Output(sys.stdout)
    code = main(argv)
    output.flush()
    if output.error is None or isinstance(output.error, BrokenPipeError):
        return code
    print("sweep: error: cannot write the standard output (%s); --status prints the summary again"
          % output.error.strerror, file=sys.stderr)
    return code or 1


if __name__ == "__main__":
    try:
        sys.exit(with_lasting_output(sys.argv[1:]))
    except UsageError as error:
        print("sweep: error: %s" % error, file=sys.stderr)
        sys.exit(BAD_INPUT)
