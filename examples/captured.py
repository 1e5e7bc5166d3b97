"""Writes captured q, K and V as an input file of nsa (docs/SCHEMA.md, "Tensors"). Needs numpy and h5py."""

import h5py
import numpy as np


def print_settings(source, q_shape, kv_shape, context, path):
    """The input of the run: a prefill of q_shape [T, H, Dk] and K/V [G, Dv], or with `context` decode from there on."""
    positions, heads, d_k = q_shape
    groups, d_v = kv_shape
    steps = "" if context is None else f"\nsteps = {positions - context}"
    if context is not None and positions - context <= 8:  # as many as warm up by default
        steps += "\nwarmup = 0"
    print(f'# {source}\n[task]\nkind = "{"prefill" if context is None else "decode"}"\n[model]\nn_heads = {heads}\n'
          f"n_kv_groups = {groups}\nd_k = {d_k}\nd_v = {d_v}\nshared_kv = true\n[run]\nscope = \"attention\"\n"
          f"context = {positions if context is None else context}{steps}" +
          (f'\n[input]\nfile = "{path}"' if path else ""))


def write_input(path, q, k, v, source, context=None):
    """q [T, H, Dk] and k [T, G, Dk], v [T, G, Dv], as attention gets them: K and q rotated. Gates of 1/3."""
    positions, heads, _ = q.shape
    groups = v.shape[1]
    if k.shape != (positions, groups, q.shape[2]) or len(v) != positions or heads % groups:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} are not of one attention layer")
    with h5py.File(path, "w") as file:
        file.attrs["source"] = source
        given = file.create_group("given")
        for name, values in {"q": q, "k_sel": k, "v_sel": v}.items():
            given.create_dataset(name, data=np.asarray(values, np.float16)[None], compression="gzip", shuffle=True)
        given.create_dataset("gate", data=np.full((1, positions, groups, 3), 1 / 3, np.float32), compression="gzip")
    print_settings(source, q.shape, v.shape[1:], context, path)
