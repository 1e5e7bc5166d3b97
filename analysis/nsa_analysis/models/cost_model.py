"""A cost model fitted to measured points and carried to rank counts that nobody ran. Its answers are predictions:
they stand in tables and figures of their own.

A stage of a rank takes  fixed + bytes / rate + FLOPs / rate, of bytes and FLOPs counted from the shape (work.py). An
exchange takes  fixed + latency x (ranks - 1) + bytes received / rate. A step takes the sum of its own stages, plus
the part of the exchanges that nothing hides, less what a whole step saves for each stage that is not timed apart. The
coefficients are the non-negative ones with the least squares of relative errors. Beyond one node an exchange goes
through a network that is assumed, not measured: each node receives what it lacks through one link a GPU, and waits one
latency for each doubling of nodes; nobody else is on the network.
"""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd

from ..data.reading import WORK
from ..data.series import SWEPT, latest, one_series
from ..data.tables import NAN, stage_median, stage_medians
from ..errors import AnalysisError
from . import traffic
from .scaling import measured


@dataclasses.dataclass(frozen=True)
class Network:
    """Between nodes. Nothing of it was measured."""

    name: str = "InfiniBand NDR, one 400 Gbit/s link a GPU"
    latency: float = 5e-6  # s, of one exchange between two nodes
    bandwidth: float = 45e9  # byte/s of a link
    node: int = 8  # ranks of a node

    def text(self):
        return (
            f"{self.name}: {self.latency * 1e6:g} us, {self.bandwidth / 1e9:g} GB/s a link, "
            f"{self.node} ranks a node (assumed)"
        )


def non_negative_fit(columns, times):
    """Coefficients >= 0 of `columns` [n, k] with the least squares of (columns @ c - times) / times; k is small, so
    every subset of columns is tried, fewer columns first."""
    a, ones = columns / times[:, None], np.ones(len(times))
    best, best_error = np.zeros(columns.shape[1]), math.inf
    for size in range(columns.shape[1] + 1):
        for subset in itertools.combinations(range(columns.shape[1]), size):
            scale = np.linalg.norm(a[:, subset], axis=0)
            if (scale == 0).any():
                continue
            found = np.linalg.lstsq(a[:, subset] / scale, ones, rcond=None)[0] / scale
            error = np.sum((a[:, subset] @ found - 1) ** 2)
            if (found >= 0).all() and error < best_error * (1 - 1e-9) - 1e-12:
                best, best_error = np.zeros(columns.shape[1]), error
                best[list(subset)] = found
    return best


def exchange_terms(exchange):
    """(1, hops, bytes received) of one exchange within a node; an all-reduce goes round twice with a part each."""
    k = exchange.ranks
    if exchange.collective == "all_reduce":
        return 1, 2 * (k - 1), 2 * exchange.bytes * (k - 1) / k
    return 1, k - 1, exchange.bytes * (k - 1)


def comm_columns(shape):
    """The three terms summed over the exchanges of a step."""
    terms = [exchange_terms(e) for e in traffic.exchanges(shape)]
    return shape.layers * np.sum(terms, axis=0, dtype=float) if terms else np.zeros(3)


@dataclasses.dataclass(frozen=True)
class CostModel:
    stages: dict  # stage -> (s, s/byte, s/FLOP)
    comm: tuple  # (s an exchange, s a hop, s/byte)
    exposed: float  # part of comm that a whole step waits for
    saved: float  # s that a whole step saves for each stage
    fit_ranks: tuple

    def knows(self, shape):
        """Whether it was fitted to what this layout does: exchanges that nobody timed cost nothing in it."""
        return any(self.comm) or not traffic.exchanges(shape)

    def own_stages(self, shape):
        moved, count = traffic.stage_bytes(shape), traffic.stage_flops(shape)
        return {s: float(np.dot(c, (shape.layers, moved[s], count[s]))) for s, c in self.stages.items()}

    def comm_time(self, shape, network=None):
        """Seconds of all exchanges of a step; with a network, those that leave a node go through it."""
        if network is None or shape.heads * shape.kv <= network.node:
            return float(np.dot(self.comm, comm_columns(shape)))
        return shape.layers * sum(self.exchange_time(e, shape, network) for e in traffic.exchanges(shape))

    def exchange_time(self, exchange, shape, network):
        # kv ranks are neighbours; head shards stand kv ranks apart.
        apart = 1 if exchange.name != "heads" else shape.kv
        inside = max(1, min(exchange.ranks, network.node // apart))
        fixed, _, received = exchange_terms(exchange)
        hops = exchange_terms(dataclasses.replace(exchange, ranks=inside))[1]
        time = float(np.dot(self.comm, (fixed, hops, received)))
        nodes = math.ceil(exchange.ranks / inside)
        if nodes == 1:
            return time
        there_and_back = 2 if exchange.collective == "all_reduce" else 1
        from_others = exchange.bytes * (2 * (nodes - 1) / nodes if there_and_back == 2 else exchange.ranks - inside)
        rounds = there_and_back * math.ceil(math.log2(nodes))
        return time + rounds * network.latency + from_others / inside / network.bandwidth

    def predict(self, shape, network=None):
        """Seconds by stage, `comm` and `step` among them."""
        times = self.own_stages(shape)
        comm = self.comm_time(shape, network)
        step = sum(times.values()) + self.exposed * comm - self.saved * shape.layers * len(times)
        return times | {"comm": comm, "step": max(step, max(times.values(), default=0.0))}

    def coefficients(self):
        """DataFrame: fixed seconds, and the rates the fit found (NaN: that term took no part)."""
        rate = lambda c: 1 / c if c > 0 else NAN
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
    points, _ = latest(one_series([p for p in points if stage_medians(p)], "cost model"))
    return [p for p in points if p.valid and traffic.shape_of(p) is not None]


def exchange_widths(points, counts):
    return {e.ranks for p in points if p.ranks in counts for e in traffic.exchanges(traffic.shape_of(p))}


def default_fit_ranks(points):
    """All rank counts but one: the largest, or the one before it where that leaves exchanges of one width only, from
    which no latency a hop can be told. All of them where nothing can be held out."""
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

    def fitted(stage, columns):
        rows = [(columns(shape), stage_median(p, stage)) for p, shape in chosen]
        rows = [(c, t) for c, t in rows if t > 0 and np.any(c)]
        return tuple(non_negative_fit(*map(np.array, zip(*rows))).tolist()) if rows else None

    stages = {}
    for stage in WORK:
        found = fitted(stage, lambda s: (s.layers, traffic.stage_bytes(s)[stage], traffic.stage_flops(s)[stage]))
        if found:
            stages[stage] = found
    comm = fitted("comm", comm_columns) or (0.0, 0.0, 0.0)
    model = CostModel(stages, comm, 1.0, 0.0, fit_ranks)
    return dataclasses.replace(model, **fit_whole(model, chosen))


def fit_whole(model, chosen):
    """What of comm a whole step waits for, in [0, 1], and what it saves a stage: medians against medians."""
    rows = []
    for p, shape in chosen:
        total = measured(p, "step")[0] if p.times("total") else NAN
        own = sum(t for s in WORK if (t := stage_median(p, s)) > 0)
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
    """DataFrame, a row a (measured point, stage): measured and predicted s, `error` = predicted / measured - 1, and
    `part`: "fitted" or "held out"."""
    rows = []
    for p in sorted(usable(points), key=lambda p: (p.get("run.context"), p.get("run.batch"), p.ranks)):
        for stage, predicted in model.predict(traffic.shape_of(p)).items():
            time = measured(p, stage)[0]
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


def left_out(points):
    """DataFrame, a row a rank count that a model fitted to the others predicts: `points` compared, the largest and the
    median `error` of a step, and where it lies: "beyond" or "between" the rank counts that were fitted. Layouts whose
    exchanges that model never saw are left out; so is the smallest rank count."""
    points = usable(points)
    counts = sorted({p.ranks for p in points})
    rows = []
    for count in counts[1:]:
        model = fit(points, [c for c in counts if c != count])
        compared = [p for p in points if p.ranks == count and model.knows(traffic.shape_of(p))]
        if not compared:
            continue
        error = check(model, compared).query("stage == 'step'").error.abs()
        if len(error):
            lies = "beyond" if count == counts[-1] else "between"
            rows.append(
                {"ranks": count, "lies": lies, "points": len(error)}
                | {"error": error.max(), "median_error": error.median()}
            )
    return pd.DataFrame(rows, columns=["ranks", "lies", "points", "error", "median_error"])


UNRELIABLE = 0.25  # an error of a step past which a prediction is said to be too far off


def trust(errors, points):
    """A sentence on how far to rely on predictions, from the table of `left_out`."""
    beyond = errors[errors.lies == "beyond"]
    points = usable(points)
    widths = exchange_widths(points, {p.ranks for p in points})
    exchanged = {
        0: " No exchange was timed: only layouts without exchanges are predicted.",
        1: " All exchanges were among equally many ranks: what a further rank adds is unknown and counts as nothing.",
    }.get(len(widths), "")
    if beyond.empty:
        said = "How far it is off beyond the ranks it was fitted to is unknown: no rank count could be held out."
    else:
        row = beyond.iloc[0]
        said = f"Fitted without {row.ranks} ranks, the model is up to {row.error:.0%} off there" + (
            ": too far to rely on." if row.error > UNRELIABLE else "."
        )
    return said + exchanged


def carry(model, points, ranks=1024, network=Network()):
    """DataFrame of predictions alone, a row a (context, batch, rank count): powers of two up to `ranks`, the layout the
    model finds fastest of those that it knows, seconds by stage, speedup and efficiency against the predicted single rank, and the network
    (empty within one node)."""
    shapes = {tuple(p.get(k) for k in SWEPT): traffic.shape_of(p, 1, 1) for p in usable(points)}
    rows = []
    for shape in sorted(shapes.values(), key=lambda s: (s.context, s.batch)):
        alone = model.predict(shape)["step"]
        for count in (1 << i for i in range(int(math.log2(ranks)) + 1)):
            layouts = [
                dataclasses.replace(shape, heads=h, kv=count // h)
                for h in range(1, shape.groups_total + 1)
                if shape.groups_total % h == 0 and count % h == 0 and count // h <= max(1, shape.context // shape.chunk)
            ]
            layouts = [s for s in layouts if model.knows(s)]
            if not layouts:
                continue
            times, layout = min(((model.predict(s, network), s) for s in layouts), key=lambda c: c[0]["step"])
            rows.append(
                {
                    "context": shape.context,
                    "batch": shape.batch,
                    "ranks": count,
                    "layout": f"{layout.heads}x{layout.kv}",
                    "time": times["step"],
                    "speedup": alone / times["step"],
                    "efficiency": alone / times["step"] / count,
                    **{f"time_{s}": t for s, t in times.items() if s != "step"},
                    "network": network.text() if count > network.node else "",
                }
            )
    return pd.DataFrame(rows)
