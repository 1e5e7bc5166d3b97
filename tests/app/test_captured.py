"""Inputs captured from a model, and imported from a data set of FlashInfer-Trace, run as what they are."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import struct
import sys
import unittest

import h5py
import numpy as np

from harness import AppTest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))
import import_trace  # noqa: E402

SMALL_BLOCKS = ("nsa.l=8", "nsa.d=4", "nsa.l_sel=8", "nsa.n_sel=4", "nsa.w=16", 'run.backend="host"',
                'model.precision="fp32"')
H, G, D = 4, 2, 16


def write_safetensors(path, tensors):
    """As the format's documentation has it."""
    header, data = {"__metadata__": {"by": "a test"}}, b""
    for name, (kind, values) in tensors.items():
        header[name] = {"dtype": kind, "shape": values.shape, "data_offsets": [len(data), len(data) + values.nbytes]}
        data += values.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def to_bf16(values):
    """(bits, the values they stand for)."""
    bits = (values.astype("f4").view("u4") >> 16).astype("u2")
    return bits, (bits.astype("u4") << 16).view("f4")


class Run(AppTest):
    def captured_run(self, settings, name):
        """Runs the settings that a tool has printed; the file's given tensors as the run used them."""
        self.write("in.toml", settings)
        done = self.assert_ok(self.nsa("run", "in.toml", "--output", name, "--set", "output.tensors=true", *(
            word for setting in SMALL_BLOCKS for word in ("--set", setting))))
        self.assertEqual(done.out.splitlines()[-1], "RESULT: VALID")
        with h5py.File(os.path.join(self.folder, name)) as file:
            given = file["points/0000/tensors/given"]
            return {name: given[name][0] for name in ("q", "k_sel", "v_sel", "gate")}


class Trace(Run):
    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(self.folder)
        self.random = np.random.default_rng(1)
        (self.root / "definitions/gqa").mkdir(parents=True)

    def define(self, name, kind, **constants):
        axes = {"num_qo_heads": H, "num_kv_heads": G, "head_dim": D, **constants}
        (self.root / f"definitions/gqa/{name}.json").write_text(json.dumps(
            {"name": name, "op_type": kind, "axes": {axis: {"type": "const", "value": n} for axis, n in axes.items()}}))

    def workload(self, name, tensors, **scalars):
        """A file of one workload. A tensor is (type, values), or None: random."""
        write_safetensors(self.root / "blob.safetensors", {key: x for key, x in tensors.items() if x is not None})
        inputs = {key: {"type": "random"} if x is None else
                  {"type": "safetensors", "path": "blob.safetensors", "tensor_key": key} for key, x in tensors.items()}
        inputs |= {key: {"type": "scalar", "value": x} for key, x in scalars.items()}
        (self.root / "w.jsonl").write_text(json.dumps(
            {"definition": name, "workload": {"uuid": "u1", "axes": {}, "inputs": inputs}, "solution": None}) + "\n")

    def tool(self, *options):
        out, code = io.StringIO(), None
        argv, sys.argv = sys.argv, ["import_trace.py", str(self.root), str(self.root / "w.jsonl"), *options]
        try:
            with contextlib.redirect_stdout(out):
                import_trace.main()
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.argv = argv
        return out.getvalue(), code

    def values(self, *shape):
        return self.random.standard_normal(shape).astype("f4")

    def test_prefill_of_a_ragged_batch(self):
        self.define("ragged", "gqa_ragged")
        rows = np.array([0, 60, 160], "i4")
        (q, q_is), (k, k_is), (v, v_is) = (to_bf16(self.values(160, heads, D)) for heads in (H, G, G))
        self.workload("ragged", {"q": ("BF16", q), "k": ("BF16", k), "v": ("BF16", v), "qo_indptr": ("I32", rows),
                                 "kv_indptr": ("I32", rows)}, sm_scale=0.5)
        settings, code = self.tool("--sequence", "1", "--output", os.path.join(self.folder, "q.h5"))
        self.assertIsNone(code)
        self.assertIn('kind = "prefill"', settings)
        self.assertIn("context = 100\n", settings)
        given = self.captured_run(settings, "r.h5")
        np.testing.assert_allclose(given["q"], q_is[60:] * 0.5 * D ** 0.5, rtol=1e-3)
        np.testing.assert_allclose(given["k_sel"], k_is[60:], rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(given["v_sel"], v_is[60:], rtol=1e-3, atol=1e-7)

    def test_decode_over_pages(self):
        self.define("paged", "gqa_paged", page_size=4)
        k, v, q = self.values(40, 4, G, D), self.values(40, 4, G, D), self.values(2, H, D)
        pages = self.random.permutation(40).astype("i4")[:25]
        self.workload("paged", {"q": ("F32", q), "k_cache": ("F32", k), "v_cache": ("F32", v),
                                "kv_indptr": ("I32", np.array([0, 5, 25], "i4")), "kv_indices": ("I32", pages),
                                "kv_last_page_len": ("I32", np.array([4, 3], "i4"))}, sm_scale=D ** -0.5)
        settings, code = self.tool("--sequence", "1", "--output", os.path.join(self.folder, "q.h5"))
        self.assertIsNone(code)
        for line in 'kind = "decode"', "context = 78\n", "steps = 1\n":
            self.assertIn(line, settings)
        given = self.captured_run(settings, "r.h5")
        np.testing.assert_allclose(given["k_sel"], k[pages[5:]].reshape(-1, G, D)[:79], rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(given["q"][78], q[1], rtol=1e-3, atol=1e-7)

    def test_lengths_alone(self):
        self.define("paged", "gqa_paged", page_size=1)
        rows = np.array([0, 50, 150], "i4")
        queries = np.array([0, 10, 30], "i4")
        self.workload("paged", {"q": None, "k_cache": None, "v_cache": None, "qo_indptr": ("I32", queries),
                                "kv_indptr": ("I32", rows), "kv_indices": ("I32", np.arange(150, dtype="i4"))})
        settings, code = self.tool("--sequence", "1")
        self.assertIsNone(code)
        for line in 'kind = "decode"', "context = 80\n", f"n_heads = {H}\n", f"n_kv_groups = {G}\n", f"d_k = {D}\n":
            self.assertIn(line, settings)
        self.assertIn("steps = 20", settings)
        self.assertNotIn("file", settings)

    def test_what_it_does_not_take(self):
        self.define("mla", "mla_paged")
        self.workload("mla", {})
        self.assertIn("is of kind mla_paged; this tool takes gqa_paged and gqa_ragged", self.tool()[1])
        self.define("ragged", "gqa_ragged")
        self.workload("ragged", {"q": None, "k": None, "v": None, "kv_indptr": None})
        self.assertIn("kv_indptr is not stored, so that lengths are not known", self.tool()[1])
        self.assertIn("has no workload u2", self.tool("--uuid", "u2")[1])
        self.workload("gone", {})
        self.assertIn("definitions has no definition gone", self.tool()[1])


@unittest.skipUnless(importlib.util.find_spec("torch"), "needs torch")
class Model(Run):
    def test_a_layer_of_a_tiny_transformer(self):
        import torch
        from capture_attention import capture
        from torch.nn import functional

        torch.manual_seed(1)
        weights = [[torch.randn(32, heads * D) for heads in (H, G, G)] for _ in range(3)]
        seen = []

        def layer(x, w_q, w_k, w_v):
            q, k, v = ((x @ w).view(1, len(x), -1, D).transpose(1, 2) for w in (w_q, w_k, w_v))
            seen.append((q, k, v))
            wide = (y.repeat_interleave(H // G, 1) for y in (k, v))
            o = functional.scaled_dot_product_attention(q, *wide, is_causal=True)
            return functional.normalize(o.transpose(1, 2).reshape(len(x), -1)[:, :32])

        x = torch.randn(100, 32)
        with capture(layer=1) as captured:
            for w in weights:
                x = layer(x, *w)
        settings = io.StringIO()
        with contextlib.redirect_stdout(settings):
            captured.write(os.path.join(self.folder, "q.h5"), "a tiny transformer")
        given = self.captured_run(settings.getvalue(), "r.h5")
        for name, values in zip(("q", "k_sel", "v_sel"), seen[1]):
            np.testing.assert_allclose(given[name], values[0].transpose(0, 1).numpy(), rtol=1e-3, atol=1e-6)
        with capture(layer=7) as never:
            layer(torch.randn(100, 32), *weights[0])
        with self.assertRaisesRegex(ValueError, "was not reached"):
            never.write(os.path.join(self.folder, "no.h5"), "")


if __name__ == "__main__":
    unittest.main()
