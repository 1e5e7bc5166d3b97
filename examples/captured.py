"""Writes captured q, K and V as an input file of nsa (docs/SCHEMA.md, "Tensors"). Needs numpy and h5py."""

import h5py
import numpy as np


def print_settings(source, q_shape, kv_shape, queries, path):
    """The input of a run of the last `queries` positions of q_shape [T, H, Dk] and K/V [G, Dv].

    One of them is a decode step; all T a prefill; else a prefill onto the prefix before them.
    """
    positions, heads, d_k = q_shape
    groups, d_v = kv_shape
    decode = queries == 1 and positions > 1
    if decode:
        run = f"context = {positions - 1}\nsteps = 1\nwarmup = 0"
    else:
        run = f"context = {queries}" + (f"\nprefix = {positions - queries}" if queries < positions else "")
    print(f'# {source}\n[task]\nkind = "{"decode" if decode else "prefill"}"\n[model]\nn_heads = {heads}\n'
          f"n_kv_groups = {groups}\nd_k = {d_k}\nd_v = {d_v}\nshared_kv = true\n[run]\nscope = \"attention\"\n{run}" +
          (f'\n[input]\nfile = "{path}"' if path else ""))


def write_input(path, q, k, v, source, queries=None):
    """q [T, H, Dk] and k [T, G, Dk], v [T, G, Dv], as attention gets them: K and q rotated. Gates of 1/3.

    The last `queries` positions are run, by default all.
    """
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
    print_settings(source, q.shape, v.shape[1:], queries or positions, path)
