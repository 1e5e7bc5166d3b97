"""Warnings about results: INVALID points, incomplete runs, differences between runs."""

import math
import os

import numpy as np

from ..data.series import differences, latest, size_text, split

CLOCK_DRIFT = 0.05  # relative change of clocks that causes a warning


def invalid_results(points):
    """One line per INVALID point."""
    return [
        f"{p.run.path}, point {p.index} ({size_text(p)}, {p.layout}) is INVALID: {p.get('reason') or 'no reason given'}"
        for p in points
        if not p.valid
    ]


def warnings(points):
    """Lines about VALID results that need care."""
    runs = list({p.run.path: p.run for p in points}.values())
    lines = []
    subjects = {}  # text -> runs and points that it applies to
    for run in runs:
        for text in run_warnings(run):
            subjects.setdefault(text, []).append(run.path)
    for p in points:
        for text in point_warnings(p):
            subjects.setdefault(text, []).append(f"{p.run.path}, point {p.index} ({size_text(p)}, {p.layout})")
    lines += [
        f"{names[0]}: {text}" if len(names) == 1 else f"{len(names)} times ({names[0]}, …): {text}"
        for text, names in subjects.items()
    ]
    unknown = [r.path for r in runs if r.attributes.get("git_commit", "unknown") == "unknown"]
    if unknown:
        lines.append(f"the commit is unknown in {name_files(unknown)}: these runs may be of different programs")
    for device in dict.fromkeys(r.device for r in runs):
        lines += version_differences([r for r in runs if r.device == device])
    series = split([p for p in points if p.modes])
    if len(series) > 1:
        names = name_differences(differences(series))
        lines.append(f"{len(series)} series that share no curve: they differ in {names}")
    lines = list(dict.fromkeys(lines + latest([p for p in points if p.modes])[1]))
    folder = common_folder([r.path for r in runs])
    return [line.replace(folder, "") for line in lines] if folder else lines


def common_folder(paths):
    """The common folder of several paths, with its last separator; empty where there is none."""
    # commonprefix compares characters, so that absolute and relative paths can be mixed.
    shared = os.path.commonprefix(paths) if len(paths) > 1 else ""
    folder = shared[: shared.rfind(os.sep) + 1]
    return "" if folder == os.sep else folder


def name_differences(names):
    """Device, backend and commit with their values, and the names of input parameters."""
    with_values = [
        f"{name} ({', '.join(dict.fromkeys(map(str, names[name])))})"
        for name in ("device", "backend", "git_commit")
        if name in names
    ]
    inputs = [name for name in names if "." in name]
    shown = ", ".join(inputs[:5]) + (f" and {len(inputs) - 5} more" if len(inputs) > 5 else "")
    return ", ".join([*with_values, *([f"the input ({shown})"] if inputs else [])])


def version_differences(runs):
    """One line per software version that differs between runs on one device."""
    lines = []
    for name in ("driver", "cuda", "nccl", "mpi", "compiler"):
        values = {}
        for run in runs:
            version = run.attributes.get(name) or "+".join(sorted(set(map(str, run.system.get(name, [])))))
            values.setdefault(version, []).append(run.path)
        if len(values) > 1:
            lines.append(
                f"{name} differs: " + "; ".join(f"{v or 'none'} in {name_files(files)}" for v, files in values.items())
            )
    return lines


def name_files(files):
    """The only file, or the number of files and the first."""
    return files[0] if len(files) == 1 else f"{len(files)} files ({files[0]}, …)"


def run_warnings(run):
    """Lines about one run, without its name."""
    get, system = run.attributes.get, run.system
    lines = []
    if get("status") != "complete":
        lines.append(f"status {get('status')}: the run did not complete; the points that it wrote are included")
    if get("resumed", 0):
        lines.append(f"was resumed {get('resumed')} times; its points are of several launches")
    if str(get("git_commit", "")).endswith("-dirty"):
        lines.append(f"commit {get('git_commit')}: the program had uncommitted changes")
    if " + " in run.device:
        lines.append(f"its ranks ran on different devices: {run.device}")
    if run.oversubscribed:
        ranks, threads, cores = run.oversubscribed
        lines.append(
            f"more threads than cores ({ranks:.0f} ranks of {threads:.0f} on {cores:.0f}): "
            "they share cores, so its times do not count for scaling"
        )
    before, after = (np.array(system.get(f"clock_mhz_{when}", []), dtype=float) for when in ("before", "after"))
    if len(before) and len(before) == len(after) and (before > 0).all() and (after > 0).all():
        drift = np.abs(after / before - 1).max()
        if drift > CLOCK_DRIFT:
            lines.append(f"clocks changed by {drift:.0%} during the run")
        if before.max() / before.min() - 1 > CLOCK_DRIFT:
            lines.append(f"clocks of its ranks differ by {before.max() / before.min() - 1:.0%}")
    errors = [v for when in ("before", "after") for v in system.get(f"ecc_{when}", []) if v > 0]
    if errors:
        lines.append(f"uncorrected memory errors (ECC), up to {max(errors):.0f}")
    return lines


def point_warnings(p):
    """Lines about one point, without its name."""
    lines = [f"fallback {line}" for line in str(p.get("fallbacks", "")).splitlines()]
    lines += [f"NOISY: {line}" for line in str(p.get("noisy", "")).splitlines()]
    samples = p.step_summary()["n"]
    if p.modes and samples < 6:
        lines.append(f"{samples} samples; a 95% interval needs 6")
    if p.get("max_abs_err", 0) == -1:
        lines.append("not checked against float64 (run.check = false)")
    if p.get("stop_reason") == "interrupted":
        lines.append("interrupted")
    if p.unknown_stages:
        lines.append(f"stages {', '.join(p.unknown_stages)} are unknown to this version and left out")
    if p.bytes is not None and math.isnan(p.get("copy_bandwidth", math.nan)):
        lines.append("no copy bandwidth was measured")
    return lines
