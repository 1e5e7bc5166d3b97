"""DataFrames of points and of their stages. Times are in seconds, sizes in bytes."""

import math

import numpy as np
import pandas as pd

from .reading import BRANCHES, STAGES
from .series import split, titles
from .statistics import median_of_others, summarise

NAN = float("nan")


def stage_median(point, stage, mode="branches"):
    """Median of the slowest rank in seconds; NaN where the mode did not run."""
    times = point.times(mode)
    return NAN if times is None else float(times.summary["median"][STAGES.index(stage)])


def stage_medians(point, mode="branches"):
    """Medians of the slowest rank by stage, without `step` and without stages that were not timed."""
    medians = {s: stage_median(point, s, mode) for s in STAGES[:-1]}
    return {s: m for s, m in medians.items() if not math.isnan(m)}


def stage_share(point, stages):
    """Share of these stages in the sum of all stages, medians of mode `branches`; NaN without it or at 0 s."""
    medians = stage_medians(point)
    whole = sum(medians.values())
    return sum(medians.get(s, 0.0) for s in stages) / whole if whole > 0 else NAN


def rank_compute_times(point):
    """[rank] seconds of COMPUTE_STAGES in mode `branches`, or of `step` in `total` where `branches` did not run."""
    if times := point.times("branches"):
        return times.compute_median
    times = point.times("total")
    return np.array([]) if times is None else times.rank_median[STAGES.index("step")]


def imbalance(times):
    """(slowest rank over the median of the others, slowest rank) of times [rank]; (NaN, -1) where none was timed."""
    times = np.asarray(times, dtype=float)
    if len(times) == 0 or np.isnan(times).all():
        return NAN, -1
    if len(times) == 1:
        return (1.0 if times[0] > 0 else NAN), 0
    slowest = int(np.nanargmax(times))
    others = median_of_others(times)[slowest]
    return (float(times[slowest] / others), slowest) if others > 0 else (NAN, -1)


def queries_per_step(point):
    """(sequence, group, layer) triples of a step. Reads are reported per triple."""
    return point.get("run.batch", 1) * point.get("model.n_kv_groups", 1) * point.get("model.layers", 1)


def reads_per_query(point):
    """Columns of reads at the last step for one sequence and group: counted, expected, nsa-vibe's formula."""
    row = {}
    for key, values in point.reads.items():
        row |= {f"reads_{branch}_{key}": value / queries_per_step(point) for branch, value in zip(BRANCHES, values)}
        row[f"reads_{key}"] = values.sum() / queries_per_step(point)
    if point.reads:
        row["reads_nsa_vibe"] = NAN if point.kind == "prefill" else point.reads_nsa_vibe
    return row


def identity_row(point):
    """The first columns of every table."""
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
    """One row per point: parameters, statistics of `total`, shares, balance, reads, memory, routes."""
    rows = []
    for point in points:
        ratio, slowest = imbalance(rank_compute_times(point))
        total = point.step_summary()
        rows.append(
            identity_row(point)
            | {"reason": point.get("reason", ""), "noisy": point.get("noisy", "")}
            | total
            | {
                "selection_share": stage_share(point, ("rank", "attend_sel")),
                "comm_share": stage_share(point, ("comm",)),
                "max_over_median": ratio,
                "slowest_rank": slowest,
            }
            | reads_per_query(point)
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
    """One row per (point, mode, stage): statistics of the slowest rank, max/median over ranks, share of all stages."""
    rows = []
    for point in points:
        identity = identity_row(point)
        for mode in modes:
            if (times := point.times(mode)) is None:
                continue
            all_stages = sum(stage_medians(point, mode).values())
            columns = [values.tolist() for values in times.summary.values()]
            for i, (stage, values) in enumerate(zip(STAGES, zip(*columns))):
                summary = dict(zip(times.summary, values))
                if summary["n"] == 0:
                    continue
                ratio, slowest = imbalance(times.rank_median[i])
                share = summary["median"] / all_stages if all_stages and stage != "step" else NAN
                rows.append(
                    identity
                    | {"mode": mode, "stage": stage}
                    | summary
                    | {"share": share, "max_over_median": ratio, "slowest_rank": slowest}
                )
    return pd.DataFrame(rows)


# Columns of `kernels` that the terminal and the report show.
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
    """One row per (point, implementation) of kind = "kernels".

    Columns: the shape, statistics of the slowest rank in s, errors against float64, and `series`: the device, with
    commit or input where one device has several.
    """
    points = [p for p in points if p.kernels]
    groups = split(points)
    series_names = {id(p): name for g, name in zip(groups, titles(groups, lambda p: p.run.device)) for p in g}
    rows = []
    for point in points:
        for name, result in (point.kernels or {}).items():
            shape = {
                key.removeprefix("kernels."): value
                for key, value in point.parameters.items()
                if key.startswith("kernels.") and key != "kernels.implementations"
            }
            rows.append(
                identity_row(point)
                | {"series": series_names[id(point)]}
                | shape
                | {"implementation": name}
                | summarise(result["samples"])
                | {key: result.get(key, NAN) for key in ("mean_abs_err", "max_abs_err")}
            )
    return pd.DataFrame(rows)
