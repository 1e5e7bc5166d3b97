#!/usr/bin/env python3
"""How often comparisons of equal runs err, and how often they find a slowdown: `nsa diff`, and pairs by turns.

Runs the input in pairs of equal runs, first A then B, in the next pair first B then A. Then, of all pairs:

- `nsa diff A B`: each pair is a comparison. With --slowdown 2% the step times in a copy of B are 1.02 times as long.
- by turns, as `nsa run --against` decides (docs/METRICS.md, "By turns"; recomputed here): comparisons are --draws draws
  of --turns pairs.

Prints for both how many verdicts are wrong (equal runs called FASTER or SLOWER) and how many slowdowns are found
(SLOWER), with 95% intervals (Clopper and Pearson), over all and over those whose interval allows it: it is narrow
enough that the slowdown lies outside it in 95% of cases: its half width is at most slowdown / (1 + 1.645 / 2.576).
Draws share pairs, so that their intervals hold for these pairs alone. NOISY pairs are compared like any other. --jobs
runs several pairs side by side, each on its own cores (--cores N: of so many). Needs h5py.

usage: error_rates.py NSA INPUT.toml [--pairs 200] [--jobs 1] [--cores 2] [--slowdown 2%] [--json FILE]
"""

import argparse
import concurrent.futures
import csv
import json
import math
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile

import h5py

FAMILY_ERROR = 0.01  # lib/nsa/report/diff.hpp
SAME_MARGIN = 0.02
ALLOWED = 1 + 1.645 / 2.576  # half widths of a 99% interval in which a slowdown is found with 95%


def probability(text):
    value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share, such as 2%")
    return value


def binomial_cdf(k, n, p):
    """P(X <= k)."""
    if p <= 0 or p >= 1:
        return 1.0 if p <= 0 or k >= n else 0.0
    return sum(math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) +
                        (n - i) * math.log1p(-p)) for i in range(k + 1))


def clopper_pearson(k, n):
    """The 95% interval of a rate of k in n."""
    def crossing(rises):
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if rises(middle) else (low, middle)
        return low

    lower = crossing(lambda p: 1 - binomial_cdf(k - 1, n, p) < 0.025) if k else 0.0
    upper = crossing(lambda p: binomial_cdf(k, n, p) > 0.025) if k < n else 1.0
    return lower, upper


def rate(k, n):
    if n == 0:
        return "0 of 0"
    low, high = clopper_pearson(k, n)
    return f"{k} of {n}, {k / n:.1%} [{low:.1%}, {high:.1%}]"


def median_interval(values, error):
    """The order-statistic interval of the median that misses with `error`; None where there are too few values."""
    ordered, n = sorted(values), len(values)
    k = 0
    while k < n // 2 and binomial_cdf(k, n, 0.5) <= error / 2:
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else None


def verdict(low, high, margin):
    """docs/METRICS.md, "The comparison"."""
    if low > 1:
        return "SLOWER"
    if high < 1:
        return "FASTER"
    return "SAME" if low >= 1 - margin and high <= 1 + margin else "UNCLEAR"


class Pairs:
    """Pairs of equal runs, their comparisons by `nsa diff`, and the medians of every series."""

    def __init__(self, args, folder):
        self.args, self.folder = args, folder

    def run(self, job, path):
        first = job % self.args.jobs * self.args.cores + self.args.first_core
        cores = ",".join(str(first + i) for i in range(self.args.cores))
        command = [self.args.nsa, "run", self.args.input, "--output", path, *self.args.set]
        subprocess.run(["taskset", "-c", cores, *command], check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": str(self.args.cores)})

    def diff(self, a, b):
        table = b.with_suffix(".csv")
        done = subprocess.run([self.args.nsa, "diff", a, b, "--csv", table], stdout=subprocess.PIPE, text=True)
        if not table.exists():
            sys.exit(done.stdout)
        with open(table, newline="") as file:
            return list(csv.DictReader(file))

    def slowed(self, path):
        """A copy of the file whose times are longer by the slowdown."""
        slow = path.with_suffix(".slow.h5")
        shutil.copy(path, slow)
        with h5py.File(slow, "r+") as file:
            for point in file["points"].values():
                name = "time" if "time" in point else "kernels/time"
                point[name][...] = point[name][...] * (1 + self.args.slowdown)
        return slow

    def pair(self, number, job):
        """(rows of `nsa diff A B`, rows of `nsa diff A slowed B`)."""
        a, b = (self.folder / f"{side}{number}.h5" for side in "ab")
        for path in (a, b) if number % 2 else (b, a):
            self.run(job, path)
        slow = self.slowed(b)
        rows = self.diff(a, b), self.diff(a, slow)
        for path in a, b, slow:
            path.unlink()
        return rows

    def all(self):
        def some(job):
            return [self.pair(number, job) for number in range(job, self.args.pairs, self.args.jobs)]

        with concurrent.futures.ThreadPoolExecutor(self.args.jobs) as pool:
            return [rows for of_job in pool.map(some, range(self.args.jobs)) for rows in of_job]


def key(row):
    return row["point"], row["mode"], row["stage"]


def allows(low, high, slowdown):
    return math.log(high / low) / 2 * ALLOWED <= math.log1p(slowdown)


def by_diff(pairs, slowdown):
    """Counts over pairs: a comparison errs when any of its series does."""
    counts = {"comparisons": len(pairs), "called different": 0, "series": 0, "series called different": 0, "found": 0,
              "allowed": 0, "found of allowed": 0, "unclear": 0}
    for equal, slowed in pairs:
        wrong = [row["verdict"] in ("FASTER", "SLOWER") for row in equal]
        counts["called different"] += any(wrong)
        counts["series"] += len(equal)
        counts["series called different"] += sum(wrong)
        counts["unclear"] += sum(row["verdict"] == "UNCLEAR" for row in equal)
        for row in slowed:
            found = row["verdict"] == "SLOWER"
            counts["found"] += found
            if row["ratio_low"] and allows(float(row["ratio_low"]), float(row["ratio_high"]), slowdown):
                counts["allowed"] += 1
                counts["found of allowed"] += found
    return counts


def by_turns(pairs, turns, draws, slowdown):
    """The same over draws of `turns` pairs, as `nsa run --against` compares them."""
    ratios = {}
    for equal, _ in pairs:
        for row in equal:
            ratios.setdefault(key(row), []).append(float(row["b_median_s"]) / float(row["a_median_s"]))
    draws = min(draws, math.comb(len(pairs), turns))  # all pairs are one comparison
    generator = random.Random(1)
    counts = {"comparisons": draws, "called different": 0, "series": 0, "series called different": 0, "found": 0,
              "allowed": 0, "found of allowed": 0, "unclear": 0}
    for _ in range(draws):
        chosen = generator.sample(range(len(pairs)), turns)
        wrong = []
        for values in ratios.values():
            interval = median_interval([values[i] for i in chosen], FAMILY_ERROR / len(ratios))
            if interval is None:
                sys.exit(f"{turns} pairs are too few for {len(ratios)} series; give --turns")
            found = verdict(*(x * (1 + slowdown) for x in interval), SAME_MARGIN) == "SLOWER"
            equal = verdict(*interval, SAME_MARGIN)
            wrong.append(equal in ("FASTER", "SLOWER"))
            counts["unclear"] += equal == "UNCLEAR"
            counts["found"] += found
            if allows(*interval, slowdown):
                counts["allowed"] += 1
                counts["found of allowed"] += found
        counts["called different"] += any(wrong)
        counts["series"] += len(wrong)
        counts["series called different"] += sum(wrong)
    return counts


def show(title, counts, slowdown):
    print(f"{title}: {counts['comparisons']} comparisons of {counts['series']} series in all")
    print(f"  equal runs called different: comparisons {rate(counts['called different'], counts['comparisons'])}; "
          f"series {rate(counts['series called different'], counts['series'])}; UNCLEAR {counts['unclear']}")
    print(f"  a slowdown of {slowdown:.1%} is found: {rate(counts['found'], counts['series'])}; where the interval "
          f"allows it: {rate(counts['found of allowed'], counts['allowed'])}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nsa", help="the program")
    parser.add_argument("input", help="what is run")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="pairs side by side")
    parser.add_argument("--cores", type=int, default=2, help="cores of a run")
    parser.add_argument("--first-core", type=int, default=0)
    parser.add_argument("--slowdown", type=probability, default="2%")
    parser.add_argument("--turns", type=int, default=24, help="pairs of a comparison by turns")
    parser.add_argument("--draws", type=int, default=1000, help="comparisons by turns, drawn from all pairs")
    parser.add_argument("--set", action="append", default=[], help="key=value, passed to `nsa run`")
    parser.add_argument("--json", help="write the counts and the ratio of every pair here")
    args = parser.parse_args()
    if args.turns > args.pairs:
        parser.error(f"--turns {args.turns} needs as many --pairs")
    args.set = [word for setting in args.set for word in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        pairs = Pairs(args, pathlib.Path(folder)).all()
    results = {"nsa diff": by_diff(pairs, args.slowdown),
               f"{args.turns} pairs by turns": by_turns(pairs, args.turns, args.draws, args.slowdown)}
    for title, counts in results.items():
        show(title, counts, args.slowdown)
    ratios = [float(row["b_median_s"]) / float(row["a_median_s"]) for equal, _ in pairs for row in equal]
    spread = statistics.stdev(map(math.log, ratios)) / math.sqrt(2) if len(ratios) > 1 else 0
    print(f"medians vary from run to run by {spread:.2%} (standard deviation, over all series)")
    if args.json:
        rows = [{"point": row["point"], "mode": row["mode"], "stage": row["stage"], "ratio": float(row["ratio"]),
                 "low": row["ratio_low"], "high": row["ratio_high"], "verdict": row["verdict"], "why": row["why"]}
                for equal, _ in pairs for row in equal]
        pathlib.Path(args.json).write_text(json.dumps({**results, "pairs": rows}) + "\n")


if __name__ == "__main__":
    main()
