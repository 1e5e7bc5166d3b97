"""A cost model that is fitted to measured points and extrapolated to more ranks.

Stage of a rank: fixed + bytes / rate + FLOPs / rate, with bytes and FLOPs from the shape (traffic.py).
Exchange: fixed + latency x (ranks - 1) + bytes received / rate.
Step: the same six terms, with coefficients of its own, because a whole step fuses stages and overlaps exchanges, and a
time for each block of one sequence that a rank scores (traffic.scored_blocks). Its bytes are those of what runs
(traffic.step_bytes). Exchanges of a decode step in several launches have coefficients of their own, which hold what the
further launches cost.

The coefficients are non-negative and minimise the squares of relative errors. Its error is that on layouts that were
held out (held_out). Beyond one node an exchange uses an assumed network: each node receives the bytes of other nodes
through one link per GPU, waits one latency per doubling of nodes, and shares the network with no other job.
"""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd

from ..data.reading import COMPUTE_STAGES
from ..data.series import keep_latest, leave_out, one_series
from ..data.tables import NAN, stage_median, stage_medians
from ..errors import AnalysisError
from . import traffic
from .roofline import plan_of
from .scaling import measured_time


@dataclasses.dataclass(frozen=True)
class Network:
    """The assumed network between nodes."""

    name: str = "InfiniBand NDR, one 400 Gbit/s link a GPU"
    latency: float = 5e-6  # s, of one message between two nodes
    bandwidth: float = 45e9  # byte/s of a link
    node: int = 8  # ranks per node

    def text(self):
        """One line for tables and reports."""
        return (
            f"{self.name}: {self.latency * 1e6:g} us, {self.bandwidth / 1e9:g} GB/s a link, "
            f"{self.node} ranks a node (assumed)"
        )


def non_negative_fit(columns, times):
    """Coefficients c >= 0 of `columns` [n, k] that minimise the squares of (columns @ c - times) / times.

    Tries every subset of columns, smaller subsets first; k is small.
    """
    a, ones = columns / times[:, None], np.ones(len(times))
    best, best_error = np.zeros(columns.shape[1]), math.inf
    used = np.flatnonzero(a.any(axis=0))
    for size in range(len(used) + 1):
        for subset in itertools.combinations(used, size):
            scale = np.linalg.norm(a[:, subset], axis=0)
            c = np.linalg.lstsq(a[:, subset] / scale, ones, rcond=None)[0] / scale
            error = np.sum((a[:, subset] @ c - 1) ** 2)
            if (c >= 0).all() and error < best_error * (1 - 1e-9) - 1e-12:
                best, best_error = np.zeros(columns.shape[1]), error
                best[list(subset)] = c
    return best


def exchange_terms(exchange):
    """(1, hops, bytes received) of one exchange within a node. An all-reduce is a reduce-scatter and an all-gather."""
    k = exchange.ranks
    if exchange.collective == "all_reduce":
        return 1, 2 * (k - 1), 2 * exchange.bytes * (k - 1) / k
    return 1, k - 1, exchange.bytes * (k - 1)


def plans_of(points):
    """How decode steps of these points ran: "staged", "fused", "sharded" of plan_of; "one launch" over kv ranks."""
    plans = {plan_of(p) for p in points}
    return frozenset(plans | {"one launch" for p in points if p["kv"] > 1 and plan_of(p) == "fused"})


def plan_on(shape, plans):
    """How a step of this shape runs, "staged", "fused" or "sharded", where steps that ran by `plans` were measured.

    One launch over kv ranks is "fused", and taken where one was measured.
    """
    if plans <= {"staged"} or shape.prefill or shape.replayed:
        return "staged"
    one_launch = "one launch" in plans and traffic.may_run_in_one_launch(shape)
    return "fused" if shape.kv == 1 or one_launch else "sharded"


def comm_columns(shape, one_launch=False):
    """The three terms of exchange_terms, summed over the exchanges of a step."""
    terms = [exchange_terms(e) for e in traffic.exchanges(shape, one_launch)]
    return shape.layers * np.sum(terms, axis=0, dtype=float) if terms else np.zeros(3)


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Coefficients of a fit."""

    stages: dict  # stage -> (s, s/byte, s/FLOP)
    comm: tuple  # of mode `branches`: (s per exchange, s per hop, s/byte)
    step: tuple  # of a whole step: (s, s/byte, s/FLOP, s/block)
    step_comm: tuple  # of its exchanges: (s per exchange, s per hop, s/byte)
    plans: frozenset  # how decode steps ran, of plans_of
    fit_ranks: tuple  # rank counts of the fitted points
    launch_comm: tuple = (0.0, 0.0, 0.0)  # of the exchanges of a decode step in several launches

    def covers(self, shape):
        """False for a layout with exchanges where no exchange was fitted, so that they would cost nothing."""
        return any(self.exchange_costs(shape)) or not traffic.exchanges(shape)

    def exchange_costs(self, shape):
        """Coefficients of an exchange of a whole step of this shape."""
        several = plan_on(shape, self.plans) == "sharded" and any(self.launch_comm)
        return self.launch_comm if several else self.step_comm

    def stage_times(self, shape):
        """Seconds by stage of COMPUTE_STAGES."""
        return {s: float(np.dot(c, stage_columns(s)(shape))) for s, c in self.stages.items()}

    def comm_time(self, shape, network=None, coefficients=None, one_launch=False):
        """Seconds of all exchanges of a step, by default as mode `branches` runs them.

        With a network, exchanges that span nodes use it.
        """
        c = self.comm if coefficients is None else coefficients
        if network is None or shape.heads * shape.kv <= network.node:
            return float(np.dot(c, comm_columns(shape, one_launch)))
        return shape.layers * sum(exchange_time(e, shape, network, c) for e in traffic.exchanges(shape, one_launch))

    def step_time(self, shape, network=None):
        """Seconds of a whole step."""
        own = np.dot(self.step, step_columns(shape, self.plans))
        one_launch = plan_on(shape, self.plans) == "fused"
        return float(own) + self.comm_time(shape, network, self.exchange_costs(shape), one_launch)

    def predict(self, shape, network=None):
        """Seconds by stage, including `comm` and `step`."""
        return self.stage_times(shape) | {
            "comm": self.comm_time(shape, network),
            "step": self.step_time(shape, network),
        }

    def coefficients(self):
        """DataFrame, one row per stage: fixed seconds, rates, seconds per hop; NaN where the coefficient is 0."""

        def rate(c):
            return 1 / c if c > 0 else NAN

        rows = [
            {"stage": s, "fixed": c[0], "bytes_per_s": rate(c[1]), "flops_per_s": rate(c[2])}
            for s, c in (self.stages | {"step": self.step}).items()
        ]
        rows[-1]["blocks_per_s"] = rate(self.step[3])
        costs = {"comm": self.comm, "step: exchanges": self.step_comm}
        if any(self.launch_comm):
            costs["step: exchanges, several launches"] = self.launch_comm
        for name, c in costs.items():
            rows.append(
                {
                    "stage": name,
                    "fixed": c[0],
                    "bytes_per_s": rate(c[2]),
                    "per_hop": c[1] or NAN,
                }
            )
        columns = ["stage", "fixed", "bytes_per_s", "flops_per_s", "blocks_per_s", "per_hop"]
        return pd.DataFrame(rows, columns=columns)


def exchange_time(exchange, shape, network, coefficients):
    """Seconds of one exchange that may span nodes."""
    # kv shards have consecutive ranks; the stride between head shards is kv.
    stride = 1 if exchange.name != "outputs" else shape.kv
    inside = max(1, min(exchange.ranks, network.node // stride))
    fixed, _, received = exchange_terms(exchange)
    hops = exchange_terms(dataclasses.replace(exchange, ranks=inside))[1]
    time = float(np.dot(coefficients, (fixed, hops, received)))
    nodes = math.ceil(exchange.ranks / inside)
    if nodes == 1:
        return time
    passes = 2 if exchange.collective == "all_reduce" else 1
    from_others = exchange.bytes * (2 * (nodes - 1) / nodes if passes == 2 else exchange.ranks - inside)
    rounds = passes * math.ceil(math.log2(nodes))
    return time + rounds * network.latency + from_others / inside / network.bandwidth


def usable(points):
    """VALID decode and prefill points of one series that have mode `branches`."""
    points = leave_out(points, stage_medians, "without stages of mode `branches`")
    points = keep_latest(one_series(points, "cost model"))
    points = leave_out(points, lambda p: p.valid, "INVALID")
    points = leave_out(points, lambda p: not p.run.oversubscribed, "their ranks share cores")
    points = leave_out(points, lambda p: measured_time(p, "step")[0] > 0, "without a time of a step")
    return leave_out(points, traffic.shape_of, "neither prefill nor decode of equal sequences")


def exchange_widths(points):
    """Distinct numbers of ranks that take part in an exchange of these points."""
    return {e.ranks for p in points for e in traffic.exchanges(traffic.shape_of(p))}


def fit(points, fit_ranks=None):
    """CostModel of the VALID points on `fit_ranks` (default: all).

    Raises AnalysisError without a point to fit, or for points of several devices, commits or inputs.
    """
    points = usable(points)
    fit_ranks = tuple(fit_ranks or sorted({p.ranks for p in points}))
    chosen = [p for p in points if p.ranks in fit_ranks]
    if not chosen:
        raise AnalysisError(
            f"no VALID point with mode `branches` on {', '.join(map(str, fit_ranks)) or 'any'} ranks to "
            'fit a cost model to; run with run.modes = ["branches", "total"]'
        )
    return fit_points(chosen, fit_ranks)


def fit_points(points, fit_ranks):
    """CostModel of these points."""
    shapes = [(p, traffic.shape_of(p)) for p in points]
    stages = {stage: fit_stage(shapes, stage, stage_columns(stage)) for stage in COMPUTE_STAGES}
    stages = {stage: coefficients for stage, coefficients in stages.items() if coefficients}
    comm = fit_stage(shapes, "comm", comm_columns) or (0.0, 0.0, 0.0)
    plans = plans_of(points)
    rows = [(whole_step_columns(s, plans), measured_time(p, "step")[0]) for p, s in shapes]
    rows = [(c, t) for c, t in rows if t > 0]
    step = tuple(non_negative_fit(*map(np.array, zip(*rows))).tolist()) if rows else (0.0,) * 10
    return CostModel(stages, comm, step[:4], step[4:7], plans, fit_ranks, step[7:])


def stage_columns(stage):
    """Function of a shape: (layers, bytes, FLOPs) of this stage."""
    return lambda shape: (shape.layers, traffic.modelled_bytes(shape)[stage], traffic.modelled_flops(shape)[stage])


def step_columns(shape, plans):
    """(layers, bytes, FLOPs, scored blocks) of a whole step without its exchanges."""
    plan = plan_on(shape, plans)
    moved, flops = traffic.step_bytes(shape, plan), traffic.modelled_flops(shape)["step"]
    return np.array((shape.layers, moved, flops, shape.layers * traffic.scored_blocks(shape, plan)), dtype=float)


def whole_step_columns(shape, plans):
    """step_columns, and the terms of its exchanges twice: where it runs in several launches, and elsewhere."""
    plan, none = plan_on(shape, plans), np.zeros(3)
    comm = comm_columns(shape, plan == "fused")
    return np.concatenate([step_columns(shape, plans), *((none, comm) if plan == "sharded" else (comm, none))])


def fit_stage(chosen, stage, columns):
    """Coefficients of a stage from (point, shape) pairs; None where it was not timed."""
    rows = [(columns(shape), stage_median(p, stage)) for p, shape in chosen]
    rows = [(c, t) for c, t in rows if t > 0 and np.any(c)]
    return tuple(non_negative_fit(*map(np.array, zip(*rows))).tolist()) if rows else None


def check(model, points):
    """DataFrame, one row per (measured point, stage).

    Columns: `measured` and `predicted` in s, `error` = predicted / measured - 1, and `part`: "fitted" or "held out".
    """
    rows = []
    for p in sorted(usable(points), key=lambda p: (p.get("run.context"), p.get("run.batch"), p.ranks)):
        part = "fitted" if p.ranks in model.fit_ranks else "held out"
        rows += check_rows(model, p, part)
    return pd.DataFrame(rows)


def check_rows(model, point, part):
    """Rows of `check` for one point."""
    rows = []
    for stage, predicted in model.predict(traffic.shape_of(point)).items():
        time = measured_time(point, stage)[0]
        if time > 0:
            rows.append(
                {
                    "context": point["run.context"],
                    "batch": point["run.batch"],
                    "ranks": point.ranks,
                    "layout": point.layout,
                    "stage": stage,
                    "measured": time,
                    "predicted": predicted,
                    "error": predicted / time - 1,
                    "part": part,
                }
            )
    return rows


def held_out(points):
    """DataFrame as of `check`: each layout predicted by a model that is fitted to the other layouts.

    Layouts that such a model does not cover, because it has no exchanges, are left out.
    """
    points = usable(points)
    rows = []
    for layout in dict.fromkeys(p.layout for p in sorted(points, key=lambda p: (p.ranks, p["heads"]))):
        others = [p for p in points if p.layout != layout]
        if not others:
            continue
        model = fit_points(others, tuple(sorted({p.ranks for p in others})))
        for p in (p for p in points if p.layout == layout and model.covers(traffic.shape_of(p))):
            rows += check_rows(model, p, "held out")
    return pd.DataFrame(rows, columns=["context", "batch", "ranks", "layout", "stage", "measured", "predicted", "error",
                                       "part"])  # fmt: skip


def cross_validate(points):
    """DataFrame, one row per layout: points, and the largest and the median absolute error of `held_out` steps."""
    step = held_out(points).query("stage == 'step'")
    rows = [
        {"ranks": ranks, "layout": layout, "points": len(group)}
        | {"error": group.error.abs().max(), "median_error": group.error.abs().median()}
        for (ranks, layout), group in step.groupby(["ranks", "layout"], sort=False)
    ]
    return pd.DataFrame(rows, columns=["ranks", "layout", "points", "error", "median_error"])


UNRELIABLE = 0.15  # an error of a step on held-out layouts above which predictions cannot be used


def largest_error(errors):
    """Largest error of the table of `cross_validate`; NaN where no layout could be held out."""
    return float(errors.error.max()) if len(errors) else NAN


def unusable(errors):
    """Why predictions cannot be used, from the table of `cross_validate`; empty where they can."""
    error = largest_error(errors)
    if math.isnan(error):
        return "Cannot be used: its error is unknown, no layout could be held out."
    return f"Cannot be used: up to {error:.0%} off on layouts that were held out." if error > UNRELIABLE else ""


def reliability(errors, points):
    """Text that says how far to rely on predictions, from the table of `cross_validate`."""
    widths = exchange_widths(usable(points))
    caveat = {
        0: " No exchange was timed: only layouts without exchanges are predicted.",
        1: " All exchanges were among equally many ranks: the cost of a further rank is unknown and counts as 0.",
    }.get(len(widths), "")
    text = unusable(errors) or f"Up to {largest_error(errors):.0%} off on layouts that were held out."
    return text + caveat
