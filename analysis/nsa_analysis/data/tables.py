"""Points and their stages as DataFrames: a row a point, a row a (point, mode, stage). Seconds and bytes."""

import math

import numpy as np
import pandas as pd

from .reading import BRANCHES, STAGES, WORK
from .series import split, titles
from .statistics import summarise

NAN = float("nan")


def stage_median(point, stage, mode="branches"):
    times = point.times(mode)
    return NAN if times is None else summarise(times.slowest[STAGES.index(stage)])["median"]


def stage_medians(point, mode="branches"):
    """Medians of the slowest rank by stage, `step` left out; stages that were not timed are absent."""
    medians = {s: stage_median(point, s, mode) for s in STAGES[:-1]}
    return {s: m for s, m in medians.items() if not math.isnan(m)}


def share_of(point, stages):
    """Part of the sum of all stages, of medians in mode `branches`; NaN where that did not run."""
    medians = stage_medians(point)
    return sum(medians.get(s, 0.0) for s in stages) / sum(medians.values()) if medians else NAN


def rank_work(point):
    """Seconds by rank of its own work: stages without comm, or `step` of `total` where branches did not run."""
    if times := point.times("branches"):
        return times.work_median
    times = point.times("total")
    return np.array([]) if times is None else times.rank_median[STAGES.index("step")]


def imbalance(work):
    """(largest / median over ranks, the rank that has it); NaN, -1 where nothing was timed."""
    work = np.asarray(work, dtype=float)
    if len(work) == 0 or np.isnan(work).all() or not np.nanmedian(work) > 0:
        return NAN, -1
    return float(np.nanmax(work) / np.nanmedian(work)), int(np.nanargmax(work))


def lists_of(point):
    """Queries a step makes: (sequence, group, layer) triples that reads are divided by."""
    return point.get("run.batch", 1) * point.get("model.n_kv_groups", 1) * point.get("model.layers", 1)


def reads_of(point):
    """Counted and expected reads at the last step for one sequence and group, by branch, and nsa-vibe's formula."""
    row = {}
    for key, values in point.reads.items():
        row |= {f"reads_{branch}_{key}": value / lists_of(point) for branch, value in zip(BRANCHES, values)}
        row[f"reads_{key}"] = values.sum() / lists_of(point)
    if point.reads:
        row["reads_nsa_vibe"] = NAN if point.kind == "prefill" else point.reads_nsa_vibe
    return row


def identity_row(point):
    """The columns every table begins with."""
    run = point.run.attributes
    return {
        "file": point.run.path,
        "point": point.index,
        "kind": point.kind,
        "device": point.run.device,
        "commit": run.get("git_commit", "unknown"),
        "context": point.get("run.context", NAN),
        "batch": point.get("run.batch", NAN),
        "forced": point.get("run.force_branch", "none"),
        "ranks": point.ranks,
        "heads": point["heads"],
        "kv": point["kv"],
        "layout": point.layout,
        "validity": point["validity"],
    }


def points_table(points):
    """A row a point: what it is, `total` with its statistics, shares, balance, reads, memory, routes."""
    rows = []
    for point in points:
        ratio, slowest = imbalance(rank_work(point))
        total = summarise(point.step_samples())
        rows.append(
            identity_row(point)
            | {"reason": point.get("reason", "")}
            | total
            | {
                "selection_share": share_of(point, ("rank", "attend_sel")),
                "comm_share": share_of(point, ("comm",)),
                "max_over_median": ratio,
                "slowest_rank": slowest,
            }
            | reads_of(point)
            | {
                "max_abs_err": point.get("max_abs_err", NAN),
                "peak_memory": point.peak_memory,
                "copy_bandwidth": point.get("copy_bandwidth", NAN),
                "routes": ",".join(map(str, point.get("routes", []))),
                "fallbacks": point.get("fallbacks", ""),
                "start": point.run.attributes.get("start", ""),
            }
        )
    return pd.DataFrame(rows)


def stages_table(points, modes=("branches", "total")):
    """A row a (point, mode, stage): statistics of the slowest rank, max/median over ranks, share of all stages."""
    rows = []
    for point in points:
        for mode in modes:
            if (times := point.times(mode)) is None:
                continue
            all_stages = sum(stage_medians(point, mode).values())
            for i, stage in enumerate(STAGES):
                summary = summarise(times.slowest[i])
                if summary["n"] == 0:
                    continue
                ratio, slowest = imbalance(times.rank_median[i])
                share = summary["median"] / all_stages if all_stages and stage != "step" else NAN
                rows.append(
                    identity_row(point)
                    | {"mode": mode, "stage": stage}
                    | summary
                    | {"share": share, "max_over_median": ratio, "slowest_rank": slowest}
                )
    return pd.DataFrame(rows)


def timed_ranks(point):
    """[stage, rank] medians in mode `branches`, own stages and comm, else None."""
    times = point.times("branches")
    return None if times is None else times.rank_median[: len(WORK) + 1]


# What of `kernels` is shown first.
KERNEL_COLUMNS = [
    "branch",
    "context",
    "rows",
    "heads",
    "head_size",
    "blocks",
    "spans",
    "implementation",
    "median",
    "low",
    "high",
    "n",
    "mean_abs_err",
    "max_abs_err",
    "validity",
]


def kernels(points):
    """kind = "kernels": a row a (point, implementation): the shape, statistics of the slowest rank in s, errors against
    float64, and `series`: the device, and what sets it apart where one device has several commits or inputs."""
    points = [p for p in points if p.kernels]
    groups = split(points)
    named = {id(p): name for g, name in zip(groups, titles(groups, lambda p: p.run.device)) for p in g}
    rows = []
    for point in points:
        for name, found in (point.kernels or {}).items():
            shape = {
                key.removeprefix("kernels."): value
                for key, value in point.parameters.items()
                if key.startswith("kernels.") and key != "kernels.implementations"
            }
            rows.append(
                identity_row(point)
                | {"series": named[id(point)]}
                | shape
                | {"implementation": name}
                | summarise(found["samples"])
                | {key: found.get(key, NAN) for key in ("mean_abs_err", "max_abs_err")}
            )
    return pd.DataFrame(rows)
