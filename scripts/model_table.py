#!/usr/bin/env python3
"""Prints the times of `inputs/models/models.sweep` beside their floors (docs/METRICS.md, "Floors") as a Markdown table.

    scripts/model_table.py RESULTS [--inputs inputs/models]      RESULTS: the folder of scripts/sweep.py
        [--before FOLDER]    the same sweep by another program: its times, in a column before
        [--kernels FILE]     what `bench_decode shapes` printed: the kernel of a decode step at 16 x 64K
        [--svg FILE]         also writes a heat map: the floor as a fraction of the time, by model and context

A row is a model, kind and context: total of the slowest rank, floor on an H200, their ratio. Exits with 1 where no
result of a model is found. Needs `pip install ./analysis` (Python 3.11).
"""
import argparse
import glob
import json
import os
import re
import sys
import types

import numpy as np
import tomllib
from nsa_analysis.models.traffic import expected_reads

READ_RATE, PRODUCT_RATE = 4.3e12, 788e12  # bytes/s and bf16 operations/s of an H200
NAME = re.compile(r"(decode|prefill)_time_context_(\d+)(?:_batch_(\d+))?$")
KERNEL = re.compile(r"\s*(\d+)/\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+([\d.]+)")


def decode_floor(model, rules, positions, batch):
    """Seconds to read K and V of a step once; 16-bit storage."""
    tokens = int(sum(expected_reads(rules, positions - 1).values()))
    return batch * model["n_kv_groups"] * tokens * (model["d_k"] + model["d_v"]) * 2 / READ_RATE


def prefill_floor(model, rules, positions, batch):
    """Seconds of the products of all positions: attention, and the scores of the blocks."""
    reads = {branch: int(tokens.sum()) for branch, tokens in expected_reads(rules, np.arange(positions)).items()}
    operations = (model["d_k"] + model["d_v"]) * sum(reads.values()) + model["d_k"] * reads["cmp"]
    return 2 * batch * model["n_heads"] * operations / PRODUCT_RATE


def models(inputs):
    """(name, configuration) of every model."""
    for path in sorted(glob.glob(os.path.join(inputs, "*.toml"))):
        with open(path, "rb") as file:
            yield os.path.splitext(os.path.basename(path))[0], tomllib.load(file)


def times(results, name):
    """{(kind, context, batch): seconds} of the results of a model."""
    found = {}
    for result in sorted(glob.glob(os.path.join(results, name + "_r1_*.json"))):
        with open(result) as file:
            figures = json.load(file)["figures"]
        for figure, content in figures.items():
            if match := NAME.match(figure):
                seconds = float(content["value"]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[content["unit"]]
                found[match[1], int(match[2]), int(match[3] or 1)] = seconds
    return found


def kernels(path):
    """{(heads, groups, d_k, d_v, l_sel, n_sel): seconds} of a bench's output."""
    found = {}
    with open(path) as file:
        for line in file:
            if match := KERNEL.match(line):
                found[tuple(map(int, match.groups()[:6]))] = float(match[7]) * 1e-6
    return found


def rows(results, inputs):
    """(model, configuration, (kind, context, batch), seconds, floor) of every time in the results."""
    for name, config in models(inputs):
        for key, seconds in times(results, name).items():
            kind, context, batch = key
            floor_of = decode_floor if kind == "decode" else prefill_floor
            rules = types.SimpleNamespace(**config["nsa"])
            yield name, config, key, seconds, floor_of(config["model"], rules, context, batch)


def kernel_of(found, config, key):
    """Seconds of the kernel of a step, where the bench has the shape."""
    model, rules = config["model"], config["nsa"]
    shape = tuple(model[k] for k in ("n_heads", "n_kv_groups", "d_k", "d_v")) + (rules["l_sel"], rules["n_sel"])
    return found.get(shape) if key == ("decode", 65536, 16) else None


def size_name(key):
    kind, context, batch = key
    return f"{kind} | {batch} × {context // 1024}K"


def print_table(found, before, kernel_times):
    """A Markdown table; columns of `before` and kernels only where these are given."""
    titles = ["model", "kind", "batch × context"] + ["before, us"] * (before is not None) + ["us"]
    titles += ["kernel, us"] * (kernel_times is not None) + ["floor, us", "of the floor"]
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for name, config, key, seconds, floor in found:
        cells = [name, size_name(key)]
        if before is not None:
            earlier = times(before, name).get(key)
            cells.append("" if earlier is None else f"{earlier * 1e6:.1f}")
        cells.append(f"{seconds * 1e6:.1f}")
        if kernel_times is not None:
            kernel = kernel_of(kernel_times, config, key)
            cells.append("" if kernel is None else f"{kernel * 1e6:.1f}")
        print("| " + " | ".join(cells + [f"{floor * 1e6:.1f}", f"{seconds / floor:.2f}"]) + " |")


def heat_map(found):
    """An SVG picture: a row a model, a column a kind and context; darker is nearer to the floor."""
    fractions = {(name, key): floor / seconds for name, _, key, seconds, floor in found}
    names, keys = sorted({name for name, _ in fractions}), sorted({key for _, key in fractions})
    left, top, width, height = 130, 48, 96, 26
    cells = []
    for column, key in enumerate(keys):
        x = left + column * width + width // 2
        kind, size = size_name(key).split(" | ")
        cells += [f'<text x="{x}" y="20" text-anchor="middle">{kind}</text>',
                  f'<text x="{x}" y="38" text-anchor="middle">{size}</text>']
    for row, name in enumerate(names):
        y = top + row * height
        cells.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{name}</text>')
        for column, key in enumerate(keys):
            if (fraction := fractions.get((name, key))) is None:
                continue
            x, shade = left + column * width, round(255 - 190 * min(1.0, fraction))
            ink = "#fff" if fraction > 0.55 else "#000"
            cells += [f'<rect x="{x}" y="{y}" width="{width - 2}" height="{height - 2}" '
                      f'fill="rgb({shade},{min(255, shade + 25)},{min(255, shade + 60)})"/>',
                      f'<text x="{x + width // 2}" y="{y + 17}" text-anchor="middle" fill="{ink}">'
                      f'{fraction * 100:.0f}%</text>']
    size = f'width="{left + len(keys) * width}" height="{top + len(names) * height}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">',
                      "<title>Floor as a fraction of the time, H200</title>", *cells, "</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    parser.add_argument("--inputs", default="inputs/models")
    parser.add_argument("--before")
    parser.add_argument("--kernels")
    parser.add_argument("--svg")
    arguments = parser.parse_args()
    found = list(rows(arguments.results, arguments.inputs))
    print_table(found, arguments.before, kernels(arguments.kernels) if arguments.kernels else None)
    if arguments.svg:
        with open(arguments.svg, "w") as file:
            file.write(heat_map(found))
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
