#!/usr/bin/env python3
"""Writes x and the weights of one layer for `[input] file = "x.h5"`: make_input.py x.h5. Needs h5py and numpy.

The file must be new. The sizes below are those of [model] and of the point; T is its context, plus run.steps in decode.
Any float type is accepted. Names and shapes are in docs/SCHEMA.md, "Tensors".
"""

import sys

import h5py
import numpy as np

B, T = 1, 128 + 32
dim, H, G, Dk, Dv = 256, 4, 2, 64, 64
shapes = {"w_q": (dim, H * Dk), "w_o": (H * Dv, dim)}
for branch in ("cmp", "sel", "win"):
    shapes[f"w_k_{branch}"] = (dim, G * Dk)
    shapes[f"w_v_{branch}"] = (dim, G * Dv)
shapes |= {"gate_w1": (Dk, Dk // 2), "gate_b1": (Dk // 2,), "gate_w2": (Dk // 2, 3), "gate_b2": (3,)}

rng = np.random.default_rng(1)
with h5py.File(sys.argv[1], "x") as file:
    file["x"] = rng.standard_normal((B, T, dim)).astype("f4")
    for name, shape in shapes.items():
        file[f"weights/{name}"] = (rng.standard_normal(shape) / np.sqrt(shape[0])).astype("f4")
