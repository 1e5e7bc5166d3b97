#!/usr/bin/env python3
"""Compares the machine code of the CUDA kernels in two builds, kernel names aside.

    scripts/compare_sass.py BEFORE AFTER      programs, libraries or object files that hold CUDA code

Kernels are paired by what they are made of: instructions, registers, stack, shared and constant memory. A renamed or
moved kernel pairs with itself. Exits with 1 and names the kernels that have no partner. Needs cuobjdump.
"""
import argparse
import collections
import concurrent.futures
import hashlib
import re
import subprocess
import sys

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);\s*/\*")
FUNCTION = re.compile(r"\s*Function : (\S+)")
RESOURCES = re.compile(r"\s*Function (\S+):$")


def cuobjdump(option, path):
    return subprocess.run(["cuobjdump", option, path], check=True, capture_output=True, text=True).stdout.splitlines()


def kernels(path):
    """Returns {kernel name: (digest, instruction count, resources)}."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sass, usage = pool.map(lambda option: cuobjdump(option, path), ["-sass", "-res-usage"])
    bodies, name = collections.defaultdict(list), None
    for line in sass:
        if match := FUNCTION.match(line):
            name = match.group(1)
        elif name and (match := INSTRUCTION.match(line)):
            bodies[name].append(re.sub(r"_Z\w+|\$\w+", "NAME", match.group(1)))
    resources = {}
    for line, following in zip(usage, usage[1:]):
        if match := RESOURCES.match(line):
            resources[match.group(1)] = following.strip()
    return {name: (hashlib.sha256("\n".join(body).encode()).hexdigest(), len(body), resources.get(name, ""))
            for name, body in bodies.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    arguments = parser.parse_args()
    before, after = kernels(arguments.before), kernels(arguments.after)
    unpaired = collections.defaultdict(list)
    for name, code in before.items():
        unpaired[code].append(name)
    only_after = []
    for name, code in after.items():
        if unpaired[code]:
            unpaired[code].pop()
        else:
            only_after.append((name, code))
    only_before = [(name, code) for code, names in unpaired.items() for name in names]
    for side, left in (("before", only_before), ("after", only_after)):
        for name, (_, instructions, resources) in sorted(left):
            print(f"only {side}: {name}: {instructions} instructions, {resources}")
    equal = len(after) - len(only_after)
    print(f"{len(before)} kernels before, {len(after)} after, {equal} with the same machine code")
    return 1 if only_before or only_after or not before else 0


if __name__ == "__main__":
    sys.exit(main())
