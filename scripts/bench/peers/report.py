"""Measures shapes by packages of kernels, prints them, and writes them as a file of peers."""

import os
import pathlib
import statistics
import sys

from . import isolation

SHAPE = ("rows", "heads", "head_size", "blocks", "spans")
BENCH = pathlib.Path(__file__).resolve().parents[1]


def medians(point):
    """The shape, and the median of each implementation in us."""
    times = {
        name: statistics.median(seconds[point["warmup"]:]) * 1e6
        for name, seconds in zip(point["implementations"], point["seconds"])
    }
    return {**{key: point["parameters"][f"kernels.{key}"] for key in SHAPE}, "us": times}


def worker_command(package, checkouts=()):
    """Of a process that finds `peers` and the checkouts."""
    path = os.pathsep.join([str(BENCH), *checkouts, *filter(None, [os.environ.get("PYTHONPATH")])])
    return ["env", f"PYTHONPATH={path}", sys.executable, "-m", "peers.worker", package]


def print_row(row):
    print("selection " + " ".join(f"{row[key]:>5}" for key in SHAPE) + ": " +
          ", ".join(f"{name} {us:.1f} us" for name, us in row["us"].items()), flush=True)


def run(commands, points, versions, input_toml, output):
    """Measures the points by {package: command}, prints and returns their rows; `output` gets the file of peers."""
    if output:
        from . import result_file  # needs h5py

        start = result_file.now()
    measured, about, crashes = isolation.measure_apart(commands, points)
    rows = [medians(point) for point in measured]
    for row in rows:
        print_row(row)
    for (package, index), how in crashes.items():
        print(f"{package} has no time of shape {index + 1} of {len(points)}: its process ended there ({how})")
    if output and measured:
        run = result_file.run_attributes(", ".join([about["program"], *versions]), input_toml, "cuda", start)
        result_file.write(output, run, result_file.system_columns(**about["system"]), measured)
        print(f"{output}: {len(measured)} of {len(points)} shapes of {run['program']}")
    return rows
