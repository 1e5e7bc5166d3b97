"""Synthetic result files with known answers, after docs/SCHEMA.md, written with h5py and not by the program."""

import h5py
import numpy as np

STAGES = "project append compress attend_cmp rank attend_sel attend_win combine output comm step".split()
PARAMETERS = {
    "task.kind": "decode",
    "model.dim": 256,
    "model.n_heads": 8,
    "model.n_kv_groups": 4,
    "model.d_k": 64,
    "model.d_v": 64,
    "model.layers": 1,
    "model.precision": "bf16",
    "model.gate": "softmax",
    "model.shared_kv": 0,
    "nsa.l": 32,
    "nsa.d": 16,
    "nsa.l_sel": 64,
    "nsa.n_sel": 16,
    "nsa.n_init": 1,
    "nsa.n_local": 2,
    "nsa.w": 512,
    "nsa.phi": "mean",
    "nsa.phi_hidden": 0,
    "run.backend": "cuda",
    "run.context": 65536,
    "run.batch": 1,
    "run.steps": 32,
    "run.warmup": 2,
    "run.modes": "branches,total",
    "run.force_branch": "none",
    "run.scope": "attention",
    "run.fill": "synthetic",
    "route.sel": "auto",
    "parallel.heads": "auto",
    "parallel.kv": "auto",
    "parallel.kv_chunk_blocks": 16,
    "output.file": "result.h5",
}


def add_scale(group, name, labels):
    data = np.array(labels, dtype=h5py.string_dtype()) if isinstance(labels[0], str) else np.array(labels)
    dataset = group.create_dataset(name, data=data)
    dataset.make_scale(name)
    dataset.attrs["units"] = "1"
    dataset.attrs["long_name"] = name


def add_dataset(group, name, values, dimensions, units="1"):
    dataset = group.create_dataset(name, data=np.asarray(values))
    dataset.attrs["units"] = units
    dataset.attrs["long_name"] = name
    for i, dimension in enumerate(dimensions):
        dataset.dims[i].attach_scale(group[dimension])


def times(ranks, reps, total, **stages):
    """time [mode, stage, rank, rep] in s, from numbers or arrays [rank, rep].

    The two warm-up repetitions take 1000 s, so a statistic that includes them is far off.
    """
    table = np.full((2, len(STAGES), ranks, 2 + reps), np.nan)
    for stage, value in stages.items():
        table[0, STAGES.index(stage), :, 2:] = value
        table[0, STAGES.index(stage), :, :2] = 1e3
    table[1, STAGES.index("step"), :, 2:] = total
    table[1, STAGES.index("step"), :, :2] = 1e3
    return table


def point(time, heads=1, kv=1, valid=True, moved=None, **parameters):
    """One point for `write`. Names of `parameters` have _ instead of the dot (`run_context=1024`)."""
    given = {k.replace("_", ".", 1): v for k, v in parameters.items()}
    return {"time": time, "heads": heads, "kv": kv, "valid": valid, "moved": moved, "parameters": PARAMETERS | given}


def kernel_point(seconds, **parameters):
    """A point of kind = "kernels" from {implementation: s}."""
    p = point(None, **({"task_kind": "kernels"} | parameters))
    return p | {"kernels": seconds}


def write(
    path,
    points,
    device="Test GPU",
    commit="c0ffee",
    status="complete",
    start="2026-01-01T00:00:00Z",
    schema="1.0",
    **system,
):
    with h5py.File(path, "w") as file:
        file.attrs.update(
            {
                "schema_version": schema,
                "status": status,
                "run_uuid": str(path),
                "start": start,
                "end": start,
                "argv": "nsa run made_up.toml",
                "input_toml": "",
                "input_sha256": "0",
                "git_commit": commit,
                "compiler": "GNU 13",
                "backend": "cuda",
            }
        )
        ranks = max(p["heads"] * p["kv"] for p in points) if points else 1
        group = file.create_group("system")
        add_scale(group, "rank", list(range(ranks)))
        for name, value in (
            {
                "host": "node",
                "cpu": "Test CPU",
                "gpu": device,
                "uuid": "GPU-",
                "driver": "580",
                "cuda": "13.0",
                "nccl": "2.28",
                "mpi": "Open MPI",
            }
            | system
        ).items():
            if isinstance(value, str):
                value = [value + (str(r) if name == "uuid" else "") for r in range(ranks)]
            add_dataset(group, name, np.array(value, dtype=h5py.string_dtype()), ["rank"])
        for name in "clock_mhz_before", "clock_mhz_after", "ecc_before", "ecc_after":
            add_dataset(group, name, [1980.0 if "clock" in name else 0] * ranks, ["rank"])
        file.create_group("points")
        for i, p in enumerate(points):
            write_point(file.create_group(f"points/{i:04d}"), p)
    return path


def write_point(group, p):
    ranks, steps = p["heads"] * p["kv"], 4
    group.attrs.update(p["parameters"])
    group.attrs.update(
        {
            "validity": "VALID" if p["valid"] else "INVALID",
            "reason": "" if p["valid"] else "test reason",
            "stop_reason": "steps",
            "heads": p["heads"],
            "kv": p["kv"],
            "first_position": 0,
            "warmup_reps": 2,
            "copy_bandwidth": 1e12,
            "max_abs_err": 1e-4,
            "fallbacks": "",
            "fingerprint": "f",
        }
    )
    group.attrs["routes"] = ["fused", "fused", "fused"]
    if "kernels" in p:
        return write_kernels(group.create_group("kernels"), p["kernels"])
    for name, labels in (
        ("mode", ["branches", "total"]),
        ("stage", STAGES),
        ("rank", list(range(ranks))),
        ("rep", list(range(p["time"].shape[3]))),
        ("branch", ["cmp", "sel", "win"]),
        ("step", list(range(steps))),
        ("kind", ["weights", "caches", "activations", "workspace", "total"]),
    ):
        add_scale(group, name, labels)
    add_dataset(group, "time", p["time"], ["mode", "stage", "rank", "rep"], "s")
    queries = p["parameters"]["run.batch"] * 4  # 4 groups; all reads are on rank 0
    counts = np.zeros((3, ranks, steps), dtype=np.int64)
    counts[:, 0, :] = np.array([[100], [200], [300]]) * queries
    add_dataset(group, "reads", counts, ["branch", "rank", "step"])
    add_dataset(group, "reads_expected", counts, ["branch", "rank", "step"])
    add_dataset(group, "reads_nsa_vibe", [777] * steps, ["step"])
    moved = np.full((len(STAGES), ranks), 1000, dtype=np.int64) if p["moved"] is None else p["moved"]
    add_dataset(group, "bytes", moved, ["stage", "rank"], "byte")
    add_dataset(group, "memory_peak", np.full((5, ranks), 10**6), ["kind", "rank"], "byte")


def write_kernels(group, seconds):
    for name, labels in ("implementation", list(seconds)), ("rank", [0]), ("rep", list(range(12))):
        add_scale(group, name, labels)
    table = np.full((len(seconds), 1, 12), 1e3)
    table[:, 0, 2:] = np.array(list(seconds.values()))[:, None]
    add_dataset(group, "time", table, ["implementation", "rank", "rep"], "s")
    for name in "mean_abs_err", "max_abs_err", "mean_abs_err_se":
        add_dataset(group, name, [1e-5] * len(seconds), ["implementation"])


def sweep(
    folder,
    step=lambda ranks: 100e-6 / ranks + 10e-6,
    layouts=((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)),
    contexts=(65536,),
    **options,
):
    """One file per layout. `step(ranks)` is the median of a whole step; each kv rank beyond one adds 1 us."""
    paths = []
    for heads, kv in layouts:
        points = []
        for context in contexts:
            ranks = heads * kv
            whole = step(ranks) * context / 65536 + (kv - 1) * 1e-6
            spread = 1 + 1e-3 * np.arange(-5, 6)  # 11 samples, the median in the middle
            comm = {"comm": 0.1 * whole * spread} if kv > 1 else {}
            points.append(
                point(
                    times(
                        ranks,
                        11,
                        whole * spread,
                        attend_cmp=0.5 * whole * spread,
                        rank=0.2 * whole * spread,
                        attend_sel=0.3 * whole * spread,
                        step=1.2 * whole * spread,
                        **comm,
                    ),
                    heads,
                    kv,
                    run_context=context,
                )
            )
        paths.append(str(write(folder / f"h{heads}k{kv}.h5", points, **options)))
    return paths
