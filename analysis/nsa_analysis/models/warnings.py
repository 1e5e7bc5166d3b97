"""What a reader should know before believing a number: INVALID points, unfinished runs, machines that changed."""

import math
import os

import numpy as np

from ..data.series import differences, latest, size_text, split
from ..data.statistics import summarise

CLOCK_DRIFT = 0.05


def serious(points):
    """Lines about results that are wrong."""
    return [
        f"{p.run.path}, point {p.index} ({size_text(p)}, {p.layout}) is INVALID: {p.get('reason') or 'no reason given'}"
        for p in points
        if not p.valid
    ]


def warnings(points):
    """Lines about results that are right and want care."""
    runs = list({p.run.path: p.run for p in points}.values())
    lines = []
    about = {}  # what is said -> the runs and points it is said of
    for run in runs:
        for said in of_run(run):
            about.setdefault(said, []).append(run.path)
    for p in points:
        for said in of_point(p):
            about.setdefault(said, []).append(f"{p.run.path}, point {p.index} ({size_text(p)}, {p.layout})")
    lines += [
        f"{of[0]}: {said}" if len(of) == 1 else f"{len(of)} times ({of[0]}, …): {said}" for said, of in about.items()
    ]
    unknown = [r.path for r in runs if r.attributes.get("git_commit", "unknown") == "unknown"]
    if unknown:
        lines.append(
            f"the commit is unknown in {counted(unknown)}: that these runs are of one program cannot be checked"
        )
    for device in dict.fromkeys(r.device for r in runs):
        lines += versions([r for r in runs if r.device == device])
    series = split([p for p in points if p.modes])
    if len(series) > 1:
        lines.append(f"{len(series)} series that share no curve: they differ in {apart(differences(series))}")
    lines = list(dict.fromkeys(lines + latest([p for p in points if p.modes])[1]))
    folder = common_folder([r.path for r in runs])
    return [line.replace(folder, "") for line in lines] if folder else lines


def common_folder(paths):
    """The folder, with its last separator, within which all of several files are named; empty where there is none."""
    shared = os.path.commonprefix(paths) if len(paths) > 1 else ""  # by letters: paths may be absolute and relative
    folder = shared[: shared.rfind(os.sep) + 1]
    return "" if folder == os.sep else folder


def apart(names):
    """Devices, backends and commits with their values; of the input the names."""
    told = [
        f"{name} ({', '.join(dict.fromkeys(map(str, names[name])))})"
        for name in ("device", "backend", "git_commit")
        if name in names
    ]
    inputs = [name for name in names if "." in name]
    shown = ", ".join(inputs[:5]) + (f" and {len(inputs) - 5} more" if len(inputs) > 5 else "")
    return ", ".join([*told, *([f"the input ({shown})"] if inputs else [])])


def versions(runs):
    """Software that differs between runs on one device."""
    lines = []
    for name in ("driver", "cuda", "nccl", "mpi", "compiler"):
        values = {}
        for run in runs:
            found = run.attributes.get(name) or "+".join(sorted(set(map(str, run.system.get(name, [])))))
            values.setdefault(found, []).append(run.path)
        if len(values) > 1:
            lines.append(
                f"{name} differs: " + "; ".join(f"{v or 'none'} in {counted(files)}" for v, files in values.items())
            )
    return lines


def counted(files):
    return files[0] if len(files) == 1 else f"{len(files)} files ({files[0]}, …)"


def of_run(run):
    get, system = run.attributes.get, run.system
    lines = []
    if get("status") != "complete":
        lines.append(f"status {get('status')}: the run did not end; the points it sealed are here")
    if get("resumed", 0):
        lines.append(f"went on {get('resumed')} times after it was stopped; its points are of several launches")
    if str(get("git_commit", "")).endswith("-dirty"):
        lines.append(f"commit {get('git_commit')}: the program had changes that no commit holds")
    if " + " in run.device:
        lines.append(f"its ranks ran on different devices: {run.device}")
    if run.crowded:
        ranks, threads, cores = run.crowded
        lines.append(
            f"more threads than cores ({ranks:.0f} ranks of {threads:.0f} on {cores:.0f}): "
            "they take turns, so its times count for no scaling"
        )
    before, after = (np.array(system.get(f"clock_mhz_{when}", []), dtype=float) for when in ("before", "after"))
    if len(before) and len(before) == len(after) and (before > 0).all() and (after > 0).all():
        drift = np.abs(after / before - 1).max()
        if drift > CLOCK_DRIFT:
            lines.append(f"clocks changed by {drift:.0%} while it ran")
        if before.max() / before.min() - 1 > CLOCK_DRIFT:
            lines.append(f"clocks of its ranks are {before.max() / before.min() - 1:.0%} apart")
    errors = [v for when in ("before", "after") for v in system.get(f"ecc_{when}", []) if v > 0]
    if errors:
        lines.append(f"uncorrected memory errors (ECC), up to {max(errors):.0f}")
    return lines


def of_point(p):
    lines = [f"fallback {line}" for line in str(p.get("fallbacks", "")).splitlines()]
    samples = summarise(p.step_samples())["n"]
    if p.modes and samples < 6:
        lines.append(f"{samples} samples; there is no 95% interval below 6")
    if p.get("max_abs_err", 0) == -1:
        lines.append("not checked against float64 (run.check = false)")
    if p.get("stop_reason") == "interrupted":
        lines.append("interrupted")
    if p.unknown_stages:
        lines.append(f"stages {', '.join(p.unknown_stages)} are unknown to this reader and left out")
    if p.bytes is not None and math.isnan(p.get("copy_bandwidth", math.nan)):
        lines.append("no copy bandwidth was measured")
    return lines
