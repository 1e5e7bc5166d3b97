#!/usr/bin/env python3
"""Prints the times of `inputs/models.sweep` beside their floors (docs/METRICS.md, "Floors") as a Markdown table.

    scripts/model_table.py RESULTS [--inputs inputs/models]      RESULTS: the folder of scripts/sweep.py

A row is a model, kind and context: total of the slowest rank, floor on an H200, their ratio. Exits with 1 where no
result of a model is found.
"""
import argparse
import glob
import json
import os
import re
import sys

import tomllib

READ_RATE, PRODUCT_RATE = 4.3e12, 788e12  # bytes/s and bf16 operations/s of an H200
NAME = re.compile(r"(decode|prefill)_time_context_(\d+)(?:_batch_(\d+))?$")


def compressed(rules, position):
    """Compressed tokens that the token at `position` sees."""
    return max(0, (position + 1 - rules["l"]) // rules["d"] + 1)


def decode_floor(model, rules, positions, batch):
    """Seconds to read K and V of a step once; 16-bit storage."""
    tokens = (compressed(rules, positions - 1) + min(positions, rules["n_sel"] * rules["l_sel"])
              + min(positions, rules["w"]))
    return batch * model["n_kv_groups"] * tokens * (model["d_k"] + model["d_v"]) * 2 / READ_RATE


def prefill_floor(model, rules, positions, batch):
    """Seconds of the products of all positions: attention, and the scores of the blocks."""
    operations = 0
    for t in range(positions):
        cmp = compressed(rules, t)
        blocks, win = t // rules["l_sel"] + 1, min(t + 1, rules["w"])
        sel = (min(rules["n_sel"], blocks) - 1) * rules["l_sel"] + t % rules["l_sel"] + 1
        operations += (model["d_k"] + model["d_v"]) * (cmp + sel + win) + model["d_k"] * cmp
    return 2 * batch * model["n_heads"] * operations / PRODUCT_RATE


def rows(results, inputs):
    """(model, kind, context, batch, seconds, floor) of every time in the results."""
    for path in sorted(glob.glob(os.path.join(inputs, "*.toml"))):
        with open(path, "rb") as file:
            config = tomllib.load(file)
        name = os.path.splitext(os.path.basename(path))[0]
        for result in sorted(glob.glob(os.path.join(results, name + "_r1_*.json"))):
            with open(result) as file:
                figures = json.load(file)["figures"]
            for figure, content in figures.items():
                if not (match := NAME.match(figure)):
                    continue
                kind, context, batch = match[1], int(match[2]), int(match[3] or 1)
                floor_of = decode_floor if kind == "decode" else prefill_floor
                floor = floor_of(config["model"], config["nsa"], context, batch)
                seconds = float(content["value"]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[content["unit"]]
                yield name, kind, context, batch, seconds, floor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    parser.add_argument("--inputs", default="inputs/models")
    arguments = parser.parse_args()
    found = list(rows(arguments.results, arguments.inputs))
    print("| model | kind | batch × context | us | floor, us | of the floor |\n|---|---|---|---|---|---|")
    for name, kind, context, batch, seconds, floor in found:
        times = f"{seconds * 1e6:.1f} | {floor * 1e6:.1f} | {seconds / floor:.2f}"
        print(f"| {name} | {kind} | {batch} × {context // 1024}K | {times} |")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
