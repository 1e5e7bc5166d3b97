#!/usr/bin/env python3
"""Public NSA kernels on the shapes of an input of kind = "kernels", timed and checked as ours are.

Each kernel runs on inputs like ours (docs/METRICS.md, "Kernels beside one another"): the same work, cold K and V, CUDA
graphs of 8 executions. A time counts where the outputs that the timed replays wrote are those of float64, and where it
is not below the floor of the work; else the kernel is named INVALID at that shape. Each package runs in processes of
its own: one that crashes loses its shape, and nothing of another package.
--output writes the samples as a file of peers (docs/SCHEMA.md, "Peers"; needs h5py). The packages are those that are
installed or whose checkouts --path names; what is not there, or does other work, is named. Needs torch with CUDA.

usage: bench_peers.py [--path CHECKOUT]... [--input INPUT.toml] [--output FILE.h5] [--list]
e.g.   scripts/bench/bench_peers.py --path ~/Scalable-Flash-Native-Sparse-Attention --output kernels.h5
"""

import argparse
import pathlib
import sys

from peers import kernels, report, shapes

M4_SHAPES = pathlib.Path(__file__).resolve().parents[2] / "inputs/gate/m4_kernels.toml"


def print_what_is_there(found, absent):
    for name in found:
        print(f"{name}: the same work")
    for name, reason in {**absent, **{name: f"other work: {why}" for name, why in kernels.OTHER_WORK.items()}}.items():
        print(f"{name}: not measured ({reason})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", action="append", default=[], help="a checkout to import from; may be repeated")
    parser.add_argument("--input", type=pathlib.Path, default=M4_SHAPES, help="shapes (default: the M4 shapes)")
    parser.add_argument("--output", type=pathlib.Path, help="write the samples to this file of peers")
    parser.add_argument("--list", action="store_true", help="say which kernels are there, and end")
    args = parser.parse_args()
    sys.path[:0] = args.path
    found, absent, versions = kernels.available()
    print_what_is_there(found, absent)
    if args.list:
        return
    if not found:
        sys.exit("none of the kernels is there")
    input_toml = args.input.read_text()
    commands = {name: report.worker_command(name, args.path) for name in found}
    if not report.run(commands, shapes.points_of(input_toml), versions, input_toml, args.output):
        sys.exit("none of the kernels was measured")


if __name__ == "__main__":
    main()
