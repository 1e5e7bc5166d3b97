"""Measures each package of kernels in processes of its own, so that one that crashes costs its own shape only.

A process measures the shapes of one package one after the other and leaves a file for each. Where it ends before the
last, a new one goes on behind the shape that ended it. Packages take turns with nobody: the samples of one package are
in alternation, those of two are not.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

SHAPE_LIMIT = 180  # seconds without a finished shape, after which a process hangs; compilers take most of it


class Crash(RuntimeError):
    """How the process of a package ended."""


def write_json(path, value):
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, default=float))
    os.replace(temporary, path)


def result_path(folder, index):
    return folder / f"{index:04d}.json"


def serve(folder, about, measure_point):
    """The process of a package: measures the points of the folder from `first` on, and says what it runs on.

    `about()`: the `program` and `system` of the file of peers; `measure_point(point)`: measure.measure()'s.
    """
    folder = pathlib.Path(folder)
    work = json.loads((folder / "work.json").read_text())
    write_json(folder / "about.json", about())
    for index in range(work["first"], len(work["points"])):
        write_json(result_path(folder, index), measure_point(work["points"][index]))


def how_it_ended(code):
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def run_from(command, folder, points, first, limit):
    """Runs a process on points[first:]; returns the index of the shape that ended it, and how; None where none did."""
    write_json(folder / "work.json", {"points": points, "first": first})
    process = subprocess.Popen([*command, str(folder)])
    begin, done = time.monotonic(), first
    try:
        while True:
            while done < len(points) and result_path(folder, done).exists():
                begin, done = time.monotonic(), done + 1
            try:
                code = process.wait(0.1)
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() - begin > limit:
                    return done, f"no end after {limit:g} s"
    finally:
        process.kill()
        process.wait()
    while done < len(points) and result_path(folder, done).exists():
        done += 1
    return None if done == len(points) else (done, how_it_ended(code))


def measure_package(name, command, points, limit=SHAPE_LIMIT):
    """(point or None for each of the points, `about` of the package or None, {index: how its process ended}).

    `command` starts a process that calls serve() with the folder that is added to its arguments.
    """
    crashes, first = {}, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        while first < len(points):
            ended = run_from(command, folder, points, first, limit)
            if ended is None:
                break
            index, how = ended
            crashes[index] = how
            shape = " ".join(str(value) for key, value in points[index].items() if key.startswith("kernels."))
            print(f"  {name} CRASHED at {shape} ({how}): that shape has no time of it; the next ones are measured in a "
                  "new process", file=sys.stderr, flush=True)
            first = index + 1
        found = [json.loads(path.read_text()) if (path := result_path(folder, i)).exists() else None
                 for i in range(len(points))]
        about = folder / "about.json"
        return found, json.loads(about.read_text()) if about.exists() else None, crashes


def merged(points_of_packages):
    """One point of those of all packages at one shape; None where nothing ran."""
    there = [point for point in points_of_packages if point]
    if not there:
        return None
    lists = "implementations", "variants", "errors", "seconds"
    return {**there[0], **{key: [x for point in there for x in point[key]] for key in lists}}


def measure_apart(commands, points, limit=SHAPE_LIMIT):
    """(measured points, `about` of a package, {(package, index): how it ended}) of {package: command}."""
    found, abouts, crashes = [], [], {}
    for name, command in commands.items():
        of_package, about, ended = measure_package(name, command, points, limit)
        found.append(of_package)
        abouts += [about] if about else []
        crashes |= {(name, index): how for index, how in ended.items()}
    return [point for point in map(merged, zip(*found)) if point], abouts[0] if abouts else None, crashes
