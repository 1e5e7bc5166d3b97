#!/usr/bin/env python3
"""GPU kernels of nsa against dense SDPA of PyTorch, on the same GPU in one call.

Runs bench_decode and bench_prefill and, for the shapes in their tables, torch's dense SDPA with each of its backends.
--selection adds the shapes of an input of kind = "kernels" (default: the M4 shapes): torch's SDPA over packed K and V,
with and without the gather that packs them, by each backend that works, checked against float64. --output writes those
samples as a file of peers for `nsa gate` (docs/SCHEMA.md, "Peers"; needs h5py). Both sides are CUDA graphs, timed with
events; printed times are medians of the replays. Both sides rotate over sets of K and V, so that no set is in the L2
cache when it is read. Prints the ratio for each row. Needs torch with CUDA.

usage: bench_gpu.py [BUILD_DIR] [--selection] [--input INPUT.toml] [--output FILE.h5] [--json FILE]
e.g.   scripts/bench/bench_gpu.py build/cuda
Without BUILD_DIR only the shapes of --selection run.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys

COLD_BYTES = 250e6  # read between two uses of a set: several times the L2
REPLAYS = 15
HEADS, GROUPS, D = 64, 4, 128
M4_SHAPES = pathlib.Path(__file__).resolve().parents[2] / "inputs/gate/m4_kernels.toml"


def graph_seconds(calls):
    """Median seconds of one of `calls`, replayed together as a CUDA graph."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # libraries select and load their kernels outside the graph
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    samples = []
    for replay in range(REPLAYS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if replay >= 3:
            samples.append(begin.elapsed_time(end) * 1e-3 / len(calls))
    return statistics.median(samples)


def best_backend(make_calls):
    """(seconds, backend) of the fastest SDPA backend that supports the shape."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    best = (float("inf"), "none")
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend), torch.no_grad():
                best = min(best, (graph_seconds(make_calls()), backend.name))
        except RuntimeError as error:  # this backend does not support the shape
            print(f"  torch {backend.name}: {str(error).splitlines()[0]}", file=sys.stderr)
            torch.cuda.synchronize()
    return best


def random(*shape):
    import torch

    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def sdpa(q, k, v, **options):
    import torch.nn.functional as functional

    return functional.scaled_dot_product_attention(q, k, v, **options)


def dense_decode(batch, context):
    """Dense decode. The heads of a group are query rows over their shared K and V, so nothing is read twice."""
    bytes_of_set = 4 * batch * GROUPS * context * D
    q_shape, kv_shape = (batch, GROUPS, HEADS // GROUPS, D), (batch, GROUPS, context, D)
    sets = [
        (random(*q_shape), random(*kv_shape), random(*kv_shape))
        for _ in range(max(1, min(64, int(COLD_BYTES / bytes_of_set) + 1)))
    ]
    return best_backend(lambda: [lambda s=s: sdpa(*s) for s in sets])


def dense_prefill(context):
    q, k, v = random(1, HEADS, context, D), random(1, GROUPS, context, D), random(1, GROUPS, context, D)
    wide_k, wide_v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    return min(
        best_backend(lambda: [lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True)]),
        best_backend(lambda: [lambda: sdpa(q, wide_k, wide_v, is_causal=True)]),
    )


def run_selection(args, results):
    """Measures and prints the shapes in a process of their own, and writes the file of peers."""
    from peers import report, shapes

    input_toml = args.input.read_text()
    rows = report.run({"torch": report.worker_command("torch")}, shapes.points_of(input_toml), [], input_toml,
                      args.output)
    results += [{"what": "selection", **row} for row in rows]


def decode_rows(build):
    """Rows of the table of bench_decode for Dk = Dv = 128, us per step."""
    text = subprocess.run([build / "tests/bench/bench_decode"], check=True, capture_output=True, text=True).stdout
    table = text.split("Dk = Dv =")[1]
    for batch, context, us, floor in re.findall(r"^ *(\d+) x +(\d+)K +([\d.]+) +([\d.]+) ", table, re.M):
        yield {"batch": int(batch), "context": int(context) * 1024, "us": float(us), "floor_us": float(floor)}


def prefill_rows(build):
    """Rows of the table of bench_prefill, in us."""
    text = subprocess.run([build / "tests/bench/bench_prefill"], check=True, capture_output=True, text=True).stdout
    # context, tile, ms fused, ms by stages, floor
    for context, ms, floor in re.findall(r"^ *(\d+)K +\d+ +([\d.]+) +[\d.]+ +([\d.]+) ", text, re.M):
        yield {"batch": 1, "context": int(context) * 1024, "us": float(ms) * 1e3, "floor_us": float(floor) * 1e3}


def compare(what, row, seconds, backend, results):
    results.append({"what": what, **row, "torch_us": seconds * 1e6, "torch_backend": backend})
    print(
        f"{what:8} {row['batch']:3} x {row['context'] // 1024:4}K {row['us']:10.1f} us | floor {row['floor_us']:8.1f} "
        f"({row['us'] / row['floor_us']:5.2f}x) | torch dense {seconds * 1e6:10.1f} us ({backend}): "
        f"{seconds * 1e6 / row['us']:6.2f}x ours",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=pathlib.Path, nargs="?", help="a build folder of the cuda preset")
    parser.add_argument("--selection", action="store_true", help="add torch's packed selection on the M4 shapes")
    parser.add_argument("--input", type=pathlib.Path, default=M4_SHAPES,
                        help='the input of kind = "kernels" whose shapes --selection takes (default: the M4 shapes)')
    parser.add_argument("--output", type=pathlib.Path, help="write the samples of --selection to this file of peers")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file")
    args = parser.parse_args()
    if args.output and not args.selection:
        parser.error("--output holds the samples of --selection; give that too")

    import torch

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, {HEADS} heads, {GROUPS} groups, D = {D}")
    results = []
    for row in decode_rows(args.build) if args.build else ():
        compare("decode", row, *dense_decode(row["batch"], row["context"]), results)
    for row in prefill_rows(args.build) if args.build else ():
        compare("prefill", row, *dense_prefill(row["context"]), results)
    if args.selection:
        run_selection(args, results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
