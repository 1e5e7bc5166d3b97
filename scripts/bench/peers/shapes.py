"""The shapes of an input of `kind = "kernels"`, as `nsa run` sweeps them, and the blocks that their rows choose."""

import itertools

import numpy as np
import tomllib  # Python 3.11

DEFAULTS = {  # lib/nsa/config/config.hpp
    "model": {"precision": "bf16"},
    "nsa": {"l_sel": 64},
    "run": {"context": [128, 256, 512, 1024], "steps": 32, "warmup": 8, "seed": 1, "overlap": 0.0},
    "kernels": {"branch": "sel", "rows": 256, "heads": 4, "head_size": 64, "blocks": 16, "spans": "scattered",
                "cold": True},
    "input": {"selection": ""},
}
SWEPT = ["run.context", "kernels.branch", "kernels.rows", "kernels.heads", "kernels.head_size", "kernels.blocks",
         "kernels.spans"]


def points_of(input_toml):
    """The points of the selected branch: dicts "section.key" -> value. Raises ValueError for another kind of run."""
    given = tomllib.loads(input_toml)
    if given.get("task", {}).get("kind") != "kernels":
        raise ValueError('the input is not of kind = "kernels"; give inputs/gate/m4_kernels.toml')
    values = {"task.kind": "kernels"}
    for section, defaults in DEFAULTS.items():
        for key, default in defaults.items():
            values[f"{section}.{key}"] = given.get(section, {}).get(key, default)
    lists = [value if isinstance(value, list) else [value] for value in (values[key] for key in SWEPT)]
    points = [{**values, **dict(zip(SWEPT, choice))} for choice in itertools.product(*lists)]
    return [point for point in points if point["kernels.branch"] == "sel"]


def choose_blocks(point):
    """[rows, n] ascending: n neighbours, n / 2 neighbours and the rest anywhere, all anywhere, or those of a file
    (kernels.spans).

    A row repeats the one before it with probability run.overlap.
    """
    rows, n = point["kernels.rows"], point["kernels.blocks"]
    if point["kernels.spans"] == "recorded":
        return recorded_blocks(point["input.selection"], rows, n)
    blocks = (point["run.context"] - rows) // point["nsa.l_sel"]
    together = {"contiguous": n, "mixed": n // 2, "scattered": 0}[point["kernels.spans"]]
    if blocks < n:
        raise ValueError(f"{n} blocks do not fit in front of {rows} rows of {point['run.context']} tokens")
    random = np.random.default_rng(point["run.seed"])
    order = random.random((rows, blocks))
    first = random.integers(0, blocks - together + 1, rows)
    run = np.arange(blocks)[None, :] - first[:, None]
    order[(run >= 0) & (run < together)] = -1  # chosen in any case
    chosen = np.sort(np.argsort(order, axis=1)[:, :n], axis=1).astype(np.int32)
    source = np.where(random.random(rows) < point["run.overlap"], 0, np.arange(rows))
    return chosen[np.maximum.accumulate(source)]


def recorded_blocks(path, rows, n):
    """[rows, n]: the last rows of the first sequence and group of a file (docs/SCHEMA.md, "Selections")."""
    import h5py

    with h5py.File(path) as file:
        for group in [file, *(point.get("tensors", {}) for point in file.get("points", {}).values())]:
            if "selected" in group and group["selected"].shape[1] >= rows and group["selected"].shape[3] == n:
                return group["selected"][0, -rows:, 0].astype(np.int32)
    raise ValueError(f"{path} holds no {rows} rows of {n} blocks; record them by nsa run --record-selection")


def least_work(point, blocks, size):
    """(bytes, FLOPs) of an execution at the least, elements of `size` bytes.

    Bytes: q, the output, and where K and V are in no cache (kernels.cold) each chosen block of them once.
    """
    rows, heads, d, l_sel = (point[key] for key in ("kernels.rows", "kernels.heads", "kernels.head_size", "nsa.l_sel"))
    kv = 2 * len(np.unique(blocks)) * l_sel * d if point["kernels.cold"] else 0
    return (kv + 2 * rows * heads * d) * size, 4 * rows * heads * d * blocks.shape[1] * l_sel


def error_of(output, exact):
    """Errors of outputs [rows, ...] against float64: mean, its standard error over rows, and the largest."""
    absolute = np.abs(np.asarray(output, "f8") - exact).reshape(len(exact), -1)
    absolute[np.isnan(absolute)] = np.inf
    means = absolute.mean(axis=1)
    spread = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 and np.isfinite(means).all() else 0.0
    return {"mean": means.mean(), "standard_error": spread, "max": absolute.max()}
