"""Measured attention as AIConfigurator's perf database holds it, for planners of inference deployments.

The format is that of ai-dynamo/aiconfigurator, `systems/data/SYSTEM/FAMILY/FRAMEWORK/VERSION/` (schema version 1 of its
collection_meta.yaml): one row per shape of one rank and layer, latency in ms. Attention alone goes into family
`attention`, whose decode times it raises to the bound of dense attention. A layer with its projections goes into family
`msa`, the modules of block-sparse attention, which are taken as they are. In decode isl + step is the length of the
cache; in prefill isl is the context and step what came before it.
"""

import pandas as pd

from ..errors import AnalysisError
from .series import keep_latest, leave_out
from .statistics import median_and_interval

FRAMEWORK = "nsa"
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
TABLES = {
    ("attention", "decode"): "generation_attention_perf",
    ("attention", "prefill"): "context_attention_perf",
    ("layer", "decode"): "msa_generation_module_perf",
    ("layer", "prefill"): "msa_context_module_perf",
}
FAMILIES = {"attention": "attention", "layer": "msa"}
ARCHITECTURE = "MiniMaxM3ForCausalLM"  # the one whose rows AIConfigurator reads from the tables of family msa


def tables(points):
    """{family: {table name: DataFrame}} of the VALID points, each by its whole step.

    Points that the format has no words for are left out, each kind with its reason: sequences shared by ranks (no
    column says how many), fp32, heads of two sizes, and given blocks. Raises AnalysisError where none is left.
    """
    points = leave_out(points, lambda p: p.kind in ("decode", "prefill"), "neither decode nor prefill")
    points = leave_out(keep_latest(points), lambda p: p.valid, "INVALID")
    for keep, why in (
        (lambda p: p["kv"] == 1, "ranks share their sequences, which the format does not say"),
        (lambda p: p["model.precision"] in DTYPES, "fp32, which the format does not know"),
        (lambda p: p["model.d_k"] == p["model.d_v"], "K and V of two sizes, which the format does not know"),
        (lambda p: p.get("run.force_branch", "none") == "none", "only one branch counts"),
        (lambda p: not p.get("input.selection", ""), "blocks are given, so that none is ranked"),
    ):
        kept = leave_out(points, keep, why)
        if points and not kept:
            raise AnalysisError(f"no point can be exported to AIConfigurator (all: {why})")
        points = kept
    found = {}
    for p in points:
        if len(p.step_samples()):
            scope = p.get("run.scope", "layer")
            found.setdefault(FAMILIES[scope], {}).setdefault(TABLES[scope, p.kind], []).append(row(p, scope))
    if not found:
        raise AnalysisError("no VALID, timed decode or prefill to export to AIConfigurator; give such result files")
    return {family: {name: pd.DataFrame(rows) for name, rows in of.items()} for family, of in found.items()}


def row(point, scope):
    """Columns of a point: what one rank runs in one layer."""
    decode, dtype = point.kind == "decode", DTYPES[point["model.precision"]]
    # The steps of a decode see caches that grow: the median step, one of its middle.
    tokens = point["run.context"] + (point["run.steps"] // 2 if decode else 0)
    heads = point["model.n_heads"] // point["heads"]
    common = {
        "framework": FRAMEWORK,
        "version": version(point),
        "device": point.run.device,
        "op_name": TABLES[scope, point.kind].removesuffix("_perf"),
        "kernel_source": "default",
    }
    sizes = {"batch_size": point["run.batch"], "isl": 1 if decode else tokens}
    last = {
        "step": tokens - 1 if decode else point.get("run.prefix", 0),
        "latency": float(median_and_interval(point.step_samples())[1]) * 1e3 / point["model.layers"],
    }
    if scope == "layer":
        module = {"model": "nsa", "architecture": ARCHITECTURE, "mla_dtype": dtype, "kv_cache_dtype": dtype,
                  "gemm_type": dtype, "num_heads": heads, "tp_size": point["heads"]}  # fmt: skip
        return common | module | sizes | last
    of_heads = {
        "num_heads": heads,
        "num_key_value_heads": point["model.n_kv_groups"] // point["heads"],
        "head_dim": point["model.d_k"],
        "window_size": 0,
        "beam_width": 1,
        "attn_dtype": dtype,
        "kv_cache_dtype": dtype,
    }
    return common | sizes | of_heads | last


def version(point):
    return str(point.run.attributes.get("git_commit", "unknown"))


def collection_meta(tables):
    """The YAML that lies beside the tables {name: DataFrame} of a family."""
    versions = {v for table in tables.values() for v in table.version}
    if len(versions) > 1:
        raise AnalysisError(
            f"points of {len(versions)} commits; a folder holds one version: export each alone"
        )
    lines = ["schema_version: 1", "provenance: collected", "runtime:", f"  framework: {FRAMEWORK}",
             f"  version: {versions.pop()}", "tables:"]  # fmt: skip
    return "\n".join(lines + [f"  {name}:\n    status: complete" for name in sorted(tables)]) + "\n"
