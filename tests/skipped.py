#!/usr/bin/env python3
"""Prints what the last ctest of build folders skipped, and why: one line `skipped: TEST: reason` each.

usage: skipped.py BUILD...
"""

import pathlib
import re
import sys

# A whole test that exits with 77, tests of unittest, and tests of pytest -rs.
REASONS = (
    re.compile(r"^(?:SKIPPED|skipped): (?P<why>.*)$", re.IGNORECASE),
    re.compile(r"^(?P<what>\w+) \(.*\) \.\.\. skipped ['\"](?P<why>.*)['\"]$"),
    re.compile(r"^(?P<what>.*) \.\.\. skipped ['\"](?P<why>.*)['\"]$"),  # behind its description
    re.compile(r"^SKIPPED \[\d+\] (?P<what>\S+): (?P<why>.*)$"),
)


def skipped(log):
    """(test, reason) of a LastTest.log; a test that says no reason is named all the same."""
    found = []
    for text in re.split(r"^(?=\d+/\d+ Testing: )", log, flags=re.MULTILINE)[1:]:
        name = re.match(r"\d+/\d+ Testing: (.*)", text)[1]
        reasons = []
        for line in text.splitlines():
            match = next(filter(None, (pattern.match(line) for pattern in REASONS)), None)
            if match:
                what = match.groupdict().get("what")
                reasons.append(f"{what}: {match['why']}" if what else match["why"])
        if not reasons and re.search(r"^Test Skipped", text, re.MULTILINE):
            reasons.append("no reason given")
        found += [(name, reason) for reason in dict.fromkeys(reasons)]
    return found


def main():
    for build in sys.argv[1:]:
        log = pathlib.Path(build, "Testing", "Temporary", "LastTest.log")
        if log.exists():
            for name, reason in skipped(log.read_text(errors="replace")):
                print(f"skipped: {name}: {reason}")


if __name__ == "__main__":
    main()
