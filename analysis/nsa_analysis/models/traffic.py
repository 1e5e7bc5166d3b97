"""Modelled bytes, FLOPs and exchanges of a step on any layout, from the shape (docs/METRICS.md, "Bytes and rates").

The C++ counterpart is lib/nsa/model/traffic.cpp: its modelled_bytes fills the `bytes` dataset of result files, for the
layouts that were run. The formulas here give the same bytes, also for layouts that were not run, which the cost model
needs.
"""

import dataclasses
import functools
import math

import numpy as np

from ..data.reading import BRANCHES, STAGES

CANDIDATE_BYTES = 8  # of one (score, index) pair


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One collective of a layer step."""

    name: str
    collective: str  # "all_gather" | "all_reduce"
    ranks: int
    bytes: int  # contribution of each rank


@dataclasses.dataclass(frozen=True)
class Shape:
    """Problem size and heads x kv layout, as one rank sees them."""

    kind: str
    context: int
    prefix: int  # prefill: tokens before the context
    prefill_chunk: int  # tokens of a prefill chunk
    batch: int
    last: int  # last position, 0-based
    dim: int
    heads_total: int
    groups_total: int
    d_k: int
    d_v: int
    layers: int
    storage: int  # bytes of a stored element
    shared_kv: bool
    whole_layer: bool
    l: int  # noqa: E741, the symbol of the paper
    d: int
    l_sel: int
    n_sel: int
    w: int
    phi_hidden: int  # 0: phi is the mean
    chunk: int  # tokens of a kv chunk
    heads: int  # head shards
    kv: int  # kv shards
    replayed: bool = False  # the blocks are given (input.selection): nothing is ranked

    @property
    def groups(self):
        return self.groups_total // self.heads

    @property
    def query_heads(self):
        return self.heads_total // self.heads

    @property
    def prefill(self):
        return self.kind == "prefill"

    @property
    def width(self):
        """Bytes of K and V of one token and group."""
        return (self.d_k + self.d_v) * self.storage

    @property
    def branches_kv(self):
        return 1 if self.shared_kv else len(BRANCHES)

    @property
    def qkv_columns(self):
        return self.query_heads * self.d_k + self.groups * (self.d_k + self.d_v) * self.branches_kv


def shape_of(point, heads=None, kv=None):
    """Shape of a decode or prefill point, on the given layout or its own.

    None for points of other tasks, for a ragged batch, whose sequences have no length in common, for steps of several
    query tokens, which the model does not know, and for FP8 caches, whose rows depend on the backend.
    """
    p = point.parameters
    ragged = p.get("batch.context") or p.get("batch.distribution", "equal") != "equal"
    fp8 = any(p.get(f"model.{caches}_precision", "same") != "same" for caches in ("kv", "cmp"))
    if point.kind not in ("decode", "prefill") or ragged or fp8 or p.get("run.query_tokens", 1) > 1:
        return None
    steps = p["run.steps"] if point.kind == "decode" else 0
    prefix, prefill_chunk = p.get("run.prefix", 0), p.get("run.prefill_chunk", "auto")
    hidden = (p.get("nsa.phi_hidden") or 2 * p["model.d_k"]) if p["nsa.phi"] == "mlp" else 0
    return Shape(
        point.kind,
        p["run.context"],
        prefix,
        p["run.context"] if prefill_chunk == "auto" else prefill_chunk,
        p["run.batch"],
        prefix + p["run.context"] + steps - 1,
        p["model.dim"],
        p["model.n_heads"],
        p["model.n_kv_groups"],
        p["model.d_k"],
        p["model.d_v"],
        p["model.layers"],
        4 if p["model.precision"] == "fp32" else 2,
        bool(p["model.shared_kv"]),
        p.get("run.scope", "layer") == "layer",
        p["nsa.l"],
        p["nsa.d"],
        p["nsa.l_sel"],
        p["nsa.n_sel"],
        p["nsa.w"],
        hidden,
        p.get("parallel.kv_chunk_blocks", 16) * p["nsa.l_sel"],
        heads or p["heads"],
        kv or p["kv"],
        bool(p.get("input.selection")),
    )


def compressed_tokens(s, t):
    """Compressed tokens that a query at position t sees."""
    return np.where(t + 1 < s.l, 0, (t + 1 - s.l) // s.d + 1)


def expected_reads(s, t):
    """Tokens that one query at position t reads, by branch."""
    t = np.asarray(t)
    blocks = np.minimum(s.n_sel, t // s.l_sel + 1)
    return {
        "cmp": compressed_tokens(s, t),
        "sel": (blocks - 1) * s.l_sel + t % s.l_sel + 1,
        "win": np.minimum(s.w, t + 1),
    }


@functools.lru_cache(maxsize=512)
def summed_reads(s):
    """Reads of all queries of one sequence and group, by branch: decode, the last step; prefill, the whole context."""
    t = np.arange(s.prefix, s.prefix + s.context) if s.prefill else s.last
    return {branch: int(np.sum(count)) for branch, count in expected_reads(s, t).items()}


def shard_rows(rows, chunk, kv, halo=0):
    """(stored rows, owned rows) of the first kv rank. A sequence of `rows` is cut into chunks, dealt round-robin."""
    if kv == 1:
        return rows, rows
    padded = rows + halo if rows else 0
    chunks = math.ceil(math.ceil(padded / chunk) / kv)
    owned = sum(min(rows, (c + 1) * chunk) - c * chunk for c in range(0, math.ceil(rows / chunk), kv))
    return chunks * (halo + chunk), owned


def prefill_chunks(s):
    """Positions (first, end) of the chunks of a prefill."""
    return [(first, min(first + s.prefill_chunk, s.last + 1)) for first in range(s.prefix, s.last + 1, s.prefill_chunk)]


def prefill_kv_rows(s, branch):
    """K/V rows of a branch that a prefill reads where every chunk reads each row once, for one (sequence, group)."""
    rows = {
        "cmp": lambda first, end: int(compressed_tokens(s, end - 1)),
        "sel": lambda first, end: end,
        "win": lambda first, end: end - max(0, first + 1 - s.w),
    }[branch]
    return sum(rows(first, end) for first, end in prefill_chunks(s))


def modelled_bytes(s):
    """Modelled bytes of the first rank by stage, equal to the `bytes` dataset of the program."""
    prefill, storage, planes = s.prefill, s.storage, s.batch * s.groups
    owned = [shard_rows(count, s.chunk, s.kv)[1] for count in (s.prefix, s.last + 1)]
    rows = s.batch * (owned[1] - owned[0] if prefill else 1)
    reads = {k: int(v) for k, v in expected_reads(s, s.last).items()}

    def kv_rows(branch):
        return planes * (prefill_kv_rows(s, branch) if prefill else reads[branch]) // (1 if prefill else s.kv)

    completed = int(compressed_tokens(s, s.last) - compressed_tokens(s, s.prefix - 1))
    q, o = rows * s.query_heads * s.d_k * storage, rows * s.query_heads * s.d_v * 4
    scores = 0 if prefill else kv_rows("cmp") * (s.query_heads // s.groups) * 4
    layer = {
        "project": (s.qkv_columns * (s.dim + rows) + rows * s.dim) * storage if s.whole_layer else 0,
        "append": 2 * rows * s.groups * s.branches_kv * s.width,
        "compress": rows * s.groups * s.width + planes * completed * s.width // s.kv
        if prefill
        else planes * s.width * (s.l + 1) // s.d,
        "attend_cmp": kv_rows("cmp") * s.width + q + o + scores,
        "rank": 0 if s.replayed else scores,
        "attend_sel": kv_rows("sel") * s.width + q + o,
        "attend_win": kv_rows("win") * s.width + q + o,
        "combine": o * len(BRANCHES) * (1 if prefill else s.kv) + rows * s.query_heads * s.d_v * storage,
        "output": s.query_heads * s.d_v * (s.dim + rows) * storage + rows * s.dim * 4 if s.whole_layer else 0,
        "comm": sum(e.bytes * (e.ranks - 1) for e in exchanges(s)),
    }
    table = {stage: s.layers * layer[stage] for stage in STAGES[:-1]}
    return table | {"step": sum(table.values())}


def handed_over(s, plan):
    """Part of the raw scores that a step of this plan hands from attend_cmp to rank (docs/METRICS.md).

    A fused step leaves 9 numbers, a sharded one 10, for 32 raw scores of a head, where blocks are scored by tile.
    """
    by_tile = (
        s.l == 2 * s.d
        and s.l_sel == 4 * s.d
        and s.n_sel <= 16
        and s.heads_total <= 16 * s.groups_total
        and s.chunk // s.d % 32 == 0
    )
    return {"fused": 9 / 32, "sharded": 10 / 32}.get(plan, 1.0) if by_tile else 1.0


def scored_blocks(s, plan):
    """Selection blocks of one sequence that a rank scores in a decode step that is not staged; 0 of others.

    However many ranks share the heads, some work item scores them all, and the step waits for it. Stages, and prefill,
    spread the blocks of one sequence over all processors.
    """
    return 0.0 if s.prefill or plan == "staged" else (s.last // s.l_sel + 1) / s.kv


def step_bytes(s, plan, stages=None):
    """Modelled bytes of a whole step without comm: those of its stages, less what a fused one keeps.

    `plan`: how the step runs attention, "staged", "fused" or "sharded". `stages`: bytes by stage, each a number or an
    array over ranks; those of the model by default. A fused step reads q once, keeps the outputs of the branches on
    chip and hands fewer numbers to rank. With kv > 1 that is a sharded step in one launch: the ranks' outputs of the
    branches arrive as exchanges, and a rank has o, and reads W_O, of 1 / kv of its heads.
    """
    stages = stages or modelled_bytes(s)
    whole = stages["step"] - stages["comm"]
    if s.prefill or plan == "staged":
        return whole
    whole = whole - 2 * stages["rank"] * (1 - handed_over(s, plan))
    if plan == "fused":
        rows = s.layers * s.batch * s.query_heads
        whole = whole - rows * (2 * s.d_k * s.storage + 3 * (1 + s.kv) * s.d_v * 4)
        projected = np.maximum(stages["output"] - s.layers * s.batch * s.dim * 4, 0)  # without y
        whole = whole - (rows * s.d_v * s.storage + projected) * (1 - 1 / s.kv)
    return whole


def token_gathers(s, whole):
    """Selected and window rows of one plane that a prefill gathers from each rank. `whole`: rows of a cache."""
    chunks = prefill_chunks(s)
    if s.prefix == 0 and len(chunks) == 1:
        return whole, whole
    dealt = s.chunk * s.kv
    piece = max(((end - 1) // dealt - first // dealt + 1) * s.chunk for first, end in chunks)
    wholes = len(chunks) if s.layers > 1 else int(s.prefix > 0)
    return wholes * whole + (len(chunks) - wholes) * piece, len(chunks) * piece


def may_run_in_one_launch(s):
    """Whether a decode step over KV ranks may run in one launch (lib/nsa/model/partition.hpp)."""
    return 1 < s.kv <= 8 and 24 % s.kv == 0


def exchanges(s, one_launch=False):
    """Exchanges of one layer step, without those that send nothing.

    `one_launch`: of a sharded decode step in one launch, which leaves o cut by heads, so that y is summed over the kv
    ranks too.
    """
    planes = s.batch * s.groups
    stored = shard_rows(s.last + 1, s.chunk, s.kv)[0]
    rows = s.batch * (stored - shard_rows(s.prefix, s.chunk, s.kv)[1] if s.prefill else 1)
    if s.prefill:
        chunks = stored // s.chunk if s.kv > 1 else 0
        times, tokens = len(prefill_chunks(s)), chunks * s.chunk
        sel, win = token_gathers(s, tokens)
        compressed = shard_rows(int(compressed_tokens(s, s.last)), s.chunk // s.d, s.kv, s.l // s.d - 1)[0]
        gathers = [
            ("raw halo", times * planes * chunks * (s.l - s.d) * s.width),
            ("k_cmp, v_cmp", times * planes * compressed * s.width),
            ("k_sel, v_sel", planes * sel * s.width),
            ("k_win, v_win", 0 if s.shared_kv else planes * win * s.width),
            ("raw ring", times * planes * s.l * s.width),
        ]
    else:
        gathers = [
            ("lse", (math.lcm(24, s.kv) // s.kv + 1) * rows * s.query_heads * 2 * 4),  # + 1: the window's (m, sum)
            ("candidates", 0 if s.replayed else rows * s.groups * s.n_sel * CANDIDATE_BYTES),
            ("partials", len(BRANCHES) * rows * s.query_heads * (s.d_v + 2) * 4),
        ]
    result = [Exchange(name, "all_gather", s.kv, size) for name, size in gathers if s.kv > 1 and size > 0]
    if one_launch and s.kv > 1 and s.whole_layer:
        result.append(Exchange("outputs over kv", "all_reduce", s.kv, rows * s.dim * 4))
    if s.heads > 1 and s.whole_layer:
        result.append(Exchange("outputs", "all_reduce", s.heads, rows * s.dim * 4))
    return result


def modelled_flops(s):
    """FLOPs of an average rank by stage. A multiply-add counts two; stage `rank` counts two per score read."""
    rows = s.batch * (s.context / s.kv if s.prefill else 1)
    reads = {branch: s.batch * count / s.kv for branch, count in summed_reads(dataclasses.replace(s, kv=1)).items()}
    attend = {branch: 2.0 * s.query_heads * reads[branch] * (s.d_k + s.d_v) for branch in BRANCHES}
    width = s.d_k + s.d_v
    token = s.l * width if not s.phi_hidden else 2 * s.phi_hidden * (s.l + 1) * width
    layer = {
        "project": 2.0 * rows * s.dim * s.qkv_columns if s.whole_layer else 0.0,
        "append": 0.0,
        "compress": rows / s.d * s.groups * token,
        "attend_cmp": attend["cmp"],
        "rank": 0.0 if s.replayed else 2.0 * s.query_heads * reads["cmp"],
        "attend_sel": attend["sel"],
        "attend_win": attend["win"],
        "combine": 2.0 * len(BRANCHES) * rows * s.query_heads * s.d_v * (1 if s.prefill else s.kv),
        "output": 2.0 * rows * s.query_heads * s.d_v * s.dim if s.whole_layer else 0.0,
    }
    table = {stage: s.layers * count for stage, count in layer.items()}
    return table | {"step": sum(table.values())}


def point_flops(point):
    """FLOPs by stage of a decode or prefill point; {} for points of other tasks."""
    shape = shape_of(point)
    return {} if shape is None else modelled_flops(shape)
