"""Writes kernels points of another program as a result file of nsa (docs/SCHEMA.md, "Peers")."""

import datetime
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import uuid

import h5py
import numpy as np
import tomllib  # Python 3.11

SCHEMA_VERSION = "1.9"  # that of the program, lib/nsa/results/schema.hpp
# lib/nsa/results/records.hpp
STAGES = "project append compress attend_cmp rank attend_sel attend_win combine output comm step".split()
BRANCHES = ["cmp", "sel", "win"]


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def git_commit():
    """Commit of the checkout that holds this script, `-dirty` where it has changes; empty outside of one."""
    command = "git describe --always --dirty --abbrev=12 --exclude=*".split()
    done = subprocess.run(command, cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def file_sha256(path):
    """Of its content; empty without a path."""
    if not path:
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cpu_name():
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def run_attributes(program, input_toml, backend, start):
    """Attributes of "/". `program` names the libraries with their versions; `start` is now() of the first point."""
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "complete",
        "run_uuid": str(uuid.uuid4()),
        "start": start,
        "end": now(),
        "argv": shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "input_toml": input_toml,
        "input_sha256": hashlib.sha256(input_toml.encode()).hexdigest(),
        "git_commit": git_commit(),
        "compiler": f"Python {platform.python_version()}",
        "backend": backend,
        "config": input_toml,
        "input_file_sha256": "",
        "input_selection_sha256": file_sha256(tomllib.loads(input_toml).get("input", {}).get("selection", "")),
        "resumed": 0,
        "program": program,
    }


def system_columns(**known):
    """Datasets of /system of one rank; `known`: gpu, uuid, driver, cuda."""
    texts = {"host": platform.node(), "cpu": cpu_name(), "gpu": "", "uuid": "", "driver": "", "cuda": "", "nccl": "",
             "mpi": "", "environment": "", **known}
    numbers = {"clock_mhz_before": 0.0, "clock_mhz_after": 0.0, "ecc_before": -1, "ecc_after": -1, "threads": 0,
               "cores": len(os.sched_getaffinity(0)), "sharers": 1}
    return {**texts, **numbers}


def set_attribute(at, name, value):
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, list):
        at.attrs.create(name, value, dtype=h5py.string_dtype())
    elif isinstance(value, str):
        at.attrs[name] = value
    else:
        at.attrs[name] = np.array(value, "f8" if isinstance(value, float) else "i8")


def scale(group, name, labels, long_name):
    dataset = column(group, name, labels, "1", long_name)
    dataset.make_scale(name)
    return dataset


def column(group, name, values, units, long_name, dimensions=()):
    values = np.asarray(values)
    kind = h5py.string_dtype() if values.dtype.kind in "UO" else "f8" if values.dtype.kind == "f" else "i8"
    dataset = group.create_dataset(name, data=values.astype(object) if values.dtype.kind == "U" else values, dtype=kind)
    for axis, dimension in enumerate(dimensions):
        dataset.dims[axis].attach_scale(group[dimension])
    set_attribute(dataset, "units", units)
    set_attribute(dataset, "long_name", long_name)
    return dataset


def write_point(points, index, point):
    group = points.create_group(f"{index:04d}")
    for name, value in point["parameters"].items():
        set_attribute(group, name, value)
    errors = [e["max"] for e in point["errors"]]
    attributes = {"validity": "VALID", "fingerprint": "", "reason": "", "stop_reason": "steps", "heads": 1, "kv": 1,
                  "first_position": 0, "warmup_reps": point["warmup"], "copy_bandwidth": 0.0,
                  "max_abs_err": float(max(errors)), "routes": ["", "", ""], "route_reasons": ["", "", ""],
                  "route_kernels": ["", "", ""], "exchange": "", "fallbacks": ""}
    for name, value in attributes.items():
        set_attribute(group, name, value)
    scale(group, "rank", [0], "rank")
    scale(group, "stage", STAGES, "stage of a step")
    scale(group, "branch", BRANCHES, "branch of attention")
    kernels = group.create_group("kernels")
    seconds = np.array(point["seconds"], "f8")[:, None, :]
    scale(kernels, "implementation", point["implementations"], "implementation of the branch")
    scale(kernels, "rank", [0], "rank")
    scale(kernels, "rep", list(range(seconds.shape[2])), "repetition, warm-up first")
    column(kernels, "time", seconds, "s", "duration of one execution", ["implementation", "rank", "rep"])
    for name, key in ("mean_abs_err", "mean"), ("mean_abs_err_se", "standard_error"), ("max_abs_err", "max"):
        values = [float(e[key]) for e in point["errors"]]
        column(kernels, name, values, "1", f"{name} against float64", ["implementation"])
    column(kernels, "variant", point["variants"], "1", "name that the library gives it", ["implementation"])


def write(path, run, system, points):
    """Writes the file, whole or not at all.

    `run`: run_attributes(); `system`: system_columns(); `points`: dicts with `parameters` ("section.key" -> value),
    `implementations` and `variants` (names), `seconds` [implementation][rep], the first `warmup` of which warm up, and
    `errors` (mean, standard_error, max) one an implementation. Replaces a file of that name.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with h5py.File(temporary, "w") as file:
            for name, value in run.items():
                set_attribute(file, name, value)
            group = file.create_group("system")
            scale(group, "rank", [0], "rank")
            for name, value in system.items():
                column(group, name, [value], "1", name, ["rank"])
            group = file.create_group("points")
            for index, point in enumerate(points):
                write_point(group, index, point)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
