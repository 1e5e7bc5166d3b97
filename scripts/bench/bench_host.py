#!/usr/bin/env python3
"""Host backend against the copy rate of the machine and against dense attention with torch, on the same threads.

Runs the program bench_host, then torch in a virtual environment that this script creates with pip, and prints the
ratios. Exits with 1 if a target of docs is missed.

usage: bench_host.py BENCH_HOST [--threads N] [--venv DIR]
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time
import venv

COPY_FRACTION = 1 / 3  # decode attention at 64K, of the copy rate measured in the same run
DECODE_SPEEDUP = 6.0  # over dense torch
PREFILL_SPEEDUP = 1.0


def torch_seconds(case, threads):
    """Seconds of dense attention of the same shape: median of several calls of torch's fastest variant."""
    import torch
    import torch.nn.functional as functional

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case["dtype"]]
    batch, heads, groups, d, context = (case[k] for k in ("batch", "heads", "groups", "d", "context"))
    k, v = (torch.randn(batch, groups, context, d).to(dtype) for _ in range(2))
    if case["what"] == "decode":
        # The heads of a group are query rows over their shared K: equal sums, K and V are read once.
        q = torch.randn(batch, groups, heads // groups, d).to(dtype)
        variants = [lambda: functional.scaled_dot_product_attention(q, k, v)]
        repeats = 9
    else:
        q = torch.randn(batch, heads, context, d).to(dtype)
        wide = [x.repeat_interleave(heads // groups, dim=1) for x in (k, v)]
        variants = [
            lambda: functional.scaled_dot_product_attention(q, *wide, is_causal=True),
            lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        ]
        repeats = 3
    best = float("inf")
    with torch.no_grad():
        for variant in variants:
            variant()
            samples = []
            for _ in range(repeats):
                start = time.perf_counter()
                variant()
                samples.append(time.perf_counter() - start)
            best = min(best, statistics.median(samples))
    return best


def measure_torch(threads):
    for line in sys.stdin:
        case = json.loads(line)
        print(json.dumps({"seconds": torch_seconds(case, threads)}), flush=True)


def torch_python(folder):
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "torch", "numpy"], check=True)
    return python


def report(copy, cases, dense):
    """Prints the table. Returns whether every target is met."""
    met = True
    print(f"copy {copy / 1e9:.1f} GB/s (read and written)")
    print("what     dtype  B   H  G    d  context |      NSA s   GB/s  of copy |  torch s  speedup | target")
    for case, reference in zip(cases, dense):
        speedup = reference["seconds"] / case["seconds"]
        rate = case.get("bytes_per_second", 0.0)
        if case["what"] == "decode":
            good = rate >= COPY_FRACTION * copy and speedup >= DECODE_SPEEDUP
            rates = f"{rate / 1e9:6.1f} {rate / copy:8.2f}"
        else:
            good = speedup > PREFILL_SPEEDUP
            rates = " " * 15
        met = met and good
        print(
            f"{case['what']:8} {case['dtype']:5} {case['batch']:2} {case['heads']:3} {case['groups']:2} {case['d']:4} "
            f"{case['context']:8} | {case['seconds']:10.3e} {rates} | {reference['seconds']:8.2e} {speedup:7.1f}x | "
            f"{'met' if good else 'MISSED'}"
        )
    return met


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench_host", nargs="?", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--venv", type=pathlib.Path, default=pathlib.Path("build/torch-venv"))
    parser.add_argument("--torch", action="store_true", help="measure the cases of standard input (internal)")
    args = parser.parse_args()
    if args.torch:
        return measure_torch(args.threads)
    if not args.bench_host:
        parser.error("BENCH_HOST is missing; build the target bench_host and pass its path")
    python = torch_python(args.venv)
    output = subprocess.run([args.bench_host, str(args.threads)], check=True, capture_output=True, text=True).stdout
    lines = [json.loads(line) for line in output.splitlines()]
    copy = next(line["bytes_per_second"] for line in lines if line["what"] == "copy")
    cases = [line for line in lines if line["what"] in ("decode", "prefill")]
    dense = subprocess.run(
        [python, __file__, "--torch", "--threads", str(args.threads)],
        input="".join(json.dumps(case) + "\n" for case in cases),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return 0 if report(copy, cases, [json.loads(line) for line in dense.splitlines()]) else 1


if __name__ == "__main__":
    sys.exit(main())
