"""A cost model that is fitted to measured points and extrapolated to more ranks. Predictions have tables and figures
of their own.

Stage of a rank: fixed + bytes / rate + FLOPs / rate, with bytes and FLOPs from the shape (traffic.py).
Exchange: fixed + latency x (ranks - 1) + bytes received / rate.
Step: the sum of its stages, plus the exposed part of the exchanges, less a saving per stage, because a whole step does
not time its stages separately.

The coefficients are non-negative and minimise the squares of relative errors. Beyond one node an exchange uses an
assumed network: each node receives the bytes of other nodes through one link per GPU, waits one latency per doubling of
nodes, and shares the network with no other job.
"""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd

from ..data.reading import COMPUTE_STAGES
from ..data.series import SWEPT, keep_latest, leave_out, one_series
from ..data.tables import NAN, stage_median, stage_medians
from ..errors import AnalysisError
from . import traffic
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
    for size in range(columns.shape[1] + 1):
        for subset in itertools.combinations(range(columns.shape[1]), size):
            scale = np.linalg.norm(a[:, subset], axis=0)
            if (scale == 0).any():
                continue
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


def comm_columns(shape):
    """The three terms of exchange_terms, summed over the exchanges of a step."""
    terms = [exchange_terms(e) for e in traffic.exchanges(shape)]
    return shape.layers * np.sum(terms, axis=0, dtype=float) if terms else np.zeros(3)


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Coefficients of a fit."""

    stages: dict  # stage -> (s, s/byte, s/FLOP)
    comm: tuple  # (s per exchange, s per hop, s/byte)
    exposed: float  # share of comm that a whole step waits for
    saved: float  # s that a whole step saves per stage
    fit_ranks: tuple  # rank counts of the fitted points

    def covers(self, shape):
        """False for a layout with exchanges where no exchange was fitted, so that they would cost nothing."""
        return any(self.comm) or not traffic.exchanges(shape)

    def stage_times(self, shape):
        """Seconds by stage of COMPUTE_STAGES."""
        size, flops = traffic.modelled_bytes(shape), traffic.modelled_flops(shape)
        return {s: float(np.dot(c, (shape.layers, size[s], flops[s]))) for s, c in self.stages.items()}

    def comm_time(self, shape, network=None):
        """Seconds of all exchanges of a step. With a network, exchanges that span nodes use it."""
        if network is None or shape.heads * shape.kv <= network.node:
            return float(np.dot(self.comm, comm_columns(shape)))
        return shape.layers * sum(self.exchange_time(e, shape, network) for e in traffic.exchanges(shape))

    def exchange_time(self, exchange, shape, network):
        """Seconds of one exchange that may span nodes."""
        # kv shards have consecutive ranks; the stride between head shards is kv.
        stride = 1 if exchange.name != "heads" else shape.kv
        inside = max(1, min(exchange.ranks, network.node // stride))
        fixed, _, received = exchange_terms(exchange)
        hops = exchange_terms(dataclasses.replace(exchange, ranks=inside))[1]
        time = float(np.dot(self.comm, (fixed, hops, received)))
        nodes = math.ceil(exchange.ranks / inside)
        if nodes == 1:
            return time
        passes = 2 if exchange.collective == "all_reduce" else 1
        from_others = exchange.bytes * (2 * (nodes - 1) / nodes if passes == 2 else exchange.ranks - inside)
        rounds = passes * math.ceil(math.log2(nodes))
        return time + rounds * network.latency + from_others / inside / network.bandwidth

    def predict(self, shape, network=None):
        """Seconds by stage, including `comm` and `step`."""
        times = self.stage_times(shape)
        comm = self.comm_time(shape, network)
        step = sum(times.values()) + self.exposed * comm - self.saved * shape.layers * len(times)
        return times | {"comm": comm, "step": max(step, max(times.values(), default=0.0))}

    def coefficients(self):
        """DataFrame, one row per stage: fixed seconds and rates; NaN where the coefficient of a term is 0."""

        def rate(c):
            return 1 / c if c > 0 else NAN

        rows = [
            {"stage": s, "fixed": c[0], "bytes_per_s": rate(c[1]), "flops_per_s": rate(c[2]), "per_hop": NAN}
            for s, c in self.stages.items()
        ]
        rows.append(
            {
                "stage": "comm",
                "fixed": self.comm[0],
                "bytes_per_s": rate(self.comm[2]),
                "flops_per_s": NAN,
                "per_hop": self.comm[1] or NAN,
            }
        )
        return pd.DataFrame(rows)


def usable(points):
    """VALID decode and prefill points of one series that have mode `branches`."""
    points = leave_out(points, stage_medians, "without stages of mode `branches`")
    points = keep_latest(one_series(points, "cost model"))
    points = leave_out(points, lambda p: p.valid, "INVALID")
    return leave_out(points, traffic.shape_of, "neither decode nor prefill")


def exchange_widths(points, counts):
    """Distinct numbers of ranks that take part in an exchange, over points with these rank counts."""
    return {e.ranks for p in points if p.ranks in counts for e in traffic.exchanges(traffic.shape_of(p))}


def default_fit_ranks(points):
    """All rank counts but one, which is held out.

    That is the largest count whose removal leaves exchanges of two widths (or of the only width): the latency per hop
    cannot be fitted from one width. All rank counts where none can be held out.
    """
    counts = sorted({p.ranks for p in points})
    wanted = min(2, len(exchange_widths(points, counts)))
    for held_out in counts[:0:-1]:
        rest = tuple(c for c in counts if c != held_out)
        if len(exchange_widths(points, rest)) >= wanted:
            return rest
    return tuple(counts)


def fit(points, fit_ranks=None):
    """CostModel of the VALID points on `fit_ranks` (default: all rank counts but one).

    Raises AnalysisError without a point to fit, or for points of several devices, commits or inputs.
    """
    points = usable(points)
    fit_ranks = tuple(fit_ranks or default_fit_ranks(points))
    chosen = [(p, traffic.shape_of(p)) for p in points if p.ranks in fit_ranks]
    if not chosen:
        raise AnalysisError(
            f"no VALID point with mode `branches` on {', '.join(map(str, fit_ranks)) or 'any'} ranks to "
            'fit a cost model to; run with run.modes = ["branches", "total"]'
        )

    stages = {stage: fit_stage(chosen, stage, stage_columns(stage)) for stage in COMPUTE_STAGES}
    stages = {stage: coefficients for stage, coefficients in stages.items() if coefficients}
    comm = fit_stage(chosen, "comm", comm_columns) or (0.0, 0.0, 0.0)
    model = CostModel(stages, comm, 1.0, 0.0, fit_ranks)
    return dataclasses.replace(model, **fit_step(model, chosen))


def stage_columns(stage):
    """Function of a shape: (layers, bytes, FLOPs) of this stage."""
    return lambda shape: (shape.layers, traffic.modelled_bytes(shape)[stage], traffic.modelled_flops(shape)[stage])


def fit_stage(chosen, stage, columns):
    """Coefficients of a stage from (point, shape) pairs; None where it was not timed."""
    rows = [(columns(shape), stage_median(p, stage)) for p, shape in chosen]
    rows = [(c, t) for c, t in rows if t > 0 and np.any(c)]
    return tuple(non_negative_fit(*map(np.array, zip(*rows))).tolist()) if rows else None


def fit_step(model, chosen):
    """{"exposed": share of comm in [0, 1], "saved": s per stage} that fit the medians of whole steps best."""
    rows = []
    for p, shape in chosen:
        total = measured_time(p, "step")[0] if p.times("total") else NAN
        own = sum(t for s in COMPUTE_STAGES if (t := stage_median(p, s)) > 0)
        comm = stage_median(p, "comm")
        if total > 0:
            rows.append((comm if comm > 0 else 0.0, -shape.layers * len(model.stages), total - own, total))
    if not rows:
        return {}
    comm, saved, target, total = map(np.array, zip(*rows))
    best, best_error = (1.0, 0.0), math.inf
    for exposed in np.linspace(0, 1, 101):
        a, b = saved / total, (target - exposed * comm) / total
        found = max(0.0, float(a @ b / (a @ a)))
        error = np.sum((a * found - b) ** 2)
        if error < best_error:
            best, best_error = (float(exposed), found), error
    return {"exposed": best[0], "saved": best[1]}


def check(model, points):
    """DataFrame, one row per (measured point, stage).

    Columns: `measured` and `predicted` in s, `error` = predicted / measured - 1, and `part`: "fitted" or "held out".
    """
    rows = []
    for p in sorted(usable(points), key=lambda p: (p.get("run.context"), p.get("run.batch"), p.ranks)):
        for stage, predicted in model.predict(traffic.shape_of(p)).items():
            time = measured_time(p, stage)[0]
            if time > 0:
                rows.append(
                    {
                        "context": p["run.context"],
                        "batch": p["run.batch"],
                        "ranks": p.ranks,
                        "layout": p.layout,
                        "stage": stage,
                        "measured": time,
                        "predicted": predicted,
                        "error": predicted / time - 1,
                        "part": "fitted" if p.ranks in model.fit_ranks else "held out",
                    }
                )
    return pd.DataFrame(rows)


def cross_validate(points):
    """DataFrame, one row per rank count, predicted by a model that is fitted to the other rank counts.

    Columns: `points` compared, the largest and the median `error` of a step, and `position`: "beyond" or "between" the
    fitted rank counts. The smallest rank count is left out, and so are layouts that the model does not cover.
    """
    points = usable(points)
    counts = sorted({p.ranks for p in points})
    rows = []
    for count in counts[1:]:
        model = fit(points, [c for c in counts if c != count])
        compared = [p for p in points if p.ranks == count and model.covers(traffic.shape_of(p))]
        if not compared:
            continue
        error = check(model, compared).query("stage == 'step'").error.abs()
        if len(error):
            position = "beyond" if count == counts[-1] else "between"
            rows.append(
                {"ranks": count, "position": position, "points": len(error)}
                | {"error": error.max(), "median_error": error.median()}
            )
    return pd.DataFrame(rows, columns=["ranks", "position", "points", "error", "median_error"])


def layouts_of(shape, ranks):
    """The shape on every heads x kv layout of `ranks` ranks; a kv shard has at least one chunk."""
    return [
        dataclasses.replace(shape, heads=h, kv=ranks // h)
        for h in range(1, shape.groups_total + 1)
        if shape.groups_total % h == 0 and ranks % h == 0 and ranks // h <= max(1, shape.context // shape.chunk)
    ]


UNRELIABLE = 0.25  # an error of a step above which predictions are called too far off


def reliability(errors, points):
    """Text that says how far to rely on predictions, from the table of `cross_validate`."""
    beyond = errors[errors.position == "beyond"]
    points = usable(points)
    widths = exchange_widths(points, {p.ranks for p in points})
    caveat = {
        0: " No exchange was timed: only layouts without exchanges are predicted.",
        1: " All exchanges were among equally many ranks: the cost of a further rank is unknown and counts as 0.",
    }.get(len(widths), "")
    if beyond.empty:
        text = "The error beyond the fitted ranks is unknown: no rank count could be held out."
    else:
        row = beyond.iloc[0]
        text = f"Fitted without {row.ranks} ranks, the model is up to {row.error:.0%} off there" + (
            ": too far to rely on." if row.error > UNRELIABLE else "."
        )
    return text + caveat


def extrapolate(model, points, ranks=1024, network=None):
    """DataFrame of predictions, one row per (context, batch, rank count), for powers of two up to `ranks`.

    Columns: the layout predicted fastest of those that the model covers, seconds by stage, speedup and efficiency
    against the predicted single rank, and the network (empty within one node).
    """
    network = network or Network()
    shapes = {tuple(p.get(k) for k in SWEPT): traffic.shape_of(p, 1, 1) for p in usable(points)}
    rows = []
    for shape in sorted(shapes.values(), key=lambda s: (s.context, s.batch)):
        one_rank = model.predict(shape)["step"]
        for count in (1 << i for i in range(int(math.log2(ranks)) + 1)):
            layouts = [s for s in layouts_of(shape, count) if model.covers(s)]
            if not layouts:
                continue
            times, layout = min(((model.predict(s, network), s) for s in layouts), key=lambda pair: pair[0]["step"])
            rows.append(
                {
                    "context": shape.context,
                    "batch": shape.batch,
                    "ranks": count,
                    "layout": f"{layout.heads}x{layout.kv}",
                    "time": times["step"],
                    "speedup": one_rank / times["step"],
                    "efficiency": one_rank / times["step"] / count,
                    **{f"time_{s}": t for s, t in times.items() if s != "step"},
                    "network": network.text() if count > network.node else "",
                }
            )
    return pd.DataFrame(rows)
