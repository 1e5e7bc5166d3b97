"""Inputs captured from a model, and imported from a data set of FlashInfer-Trace, run as what they are."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import struct
import sys
import types
import unittest
import unittest.mock

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
        for line in 'kind = "prefill"', "context = 20\n", f"n_heads = {H}\n", f"n_kv_groups = {G}\n", f"d_k = {D}\n":
            self.assertIn(line, settings)
        self.assertIn("prefix = 80", settings)
        self.assertNotIn("file", settings)
        self.write("in.toml", settings)
        self.assertIn("RESULT: VALID", self.assert_ok(self.nsa("run", "in.toml", "--output", "r.h5", *(
            word for setting in SMALL_BLOCKS for word in ("--set", setting)))).out)

    def test_queries_behind_a_prefix(self):
        """The last 20 of 100 positions have queries: a prefill onto the 80 before, whose K and V are the file's."""
        self.define("ragged", "gqa_ragged")
        q, k, v = self.values(20, H, D), self.values(100, G, D), self.values(100, G, D)
        rows = {name: ("I32", np.array([0, n], "i4")) for name, n in (("qo_indptr", 20), ("kv_indptr", 100))}
        self.workload("ragged", {"q": ("F32", q), "k": ("F32", k), "v": ("F32", v), **rows})
        settings, code = self.tool("--output", os.path.join(self.folder, "q.h5"))
        self.assertIsNone(code)
        for line in 'kind = "prefill"', "context = 20\n", "prefix = 80\n":
            self.assertIn(line, settings)
        given = self.captured_run(settings, "r.h5")
        np.testing.assert_allclose(given["q"][80:], q, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(given["k_sel"], k, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(given["v_sel"], v, rtol=1e-3, atol=1e-6)
        with h5py.File(os.path.join(self.folder, "r.h5")) as file:
            self.assertEqual((file["points/0000"].attrs["run.context"], file["points/0000"].attrs["run.prefix"]),
                             (20, 80))

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


class Tensor:
    """The few operations of torch.Tensor that capture_attention.py and this test call, over a numpy array."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def __getitem__(self, index):
        return Tensor(self.values[index])

    def __mul__(self, factor):
        return Tensor((self.values * factor).astype(self.values.dtype))

    def transpose(self, a, b):
        return Tensor(self.values.swapaxes(a, b))

    def repeat_interleave(self, repeats, dim):
        return Tensor(self.values.repeat(repeats, dim))

    def float(self):
        return Tensor(self.values.astype("f4"))

    def detach(self):
        return Tensor(self.values.view())

    def cpu(self):
        return self

    def numpy(self):
        return self.values


def causal_attention(query, key, value, is_causal=False, scale=None):
    assert is_causal
    q, k, v = query.values, key.values, value.values
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = np.where(np.tri(q.shape[-2], dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return Tensor((p / p.sum(-1, keepdims=True) @ v).astype("f4"))


def fake_torch():
    """Modules `torch` and `torch.nn`, for where torch is not installed."""
    torch, nn = types.ModuleType("torch"), types.ModuleType("torch.nn")
    torch.nn, nn.functional = nn, types.SimpleNamespace(scaled_dot_product_attention=causal_attention)
    torch.from_numpy, torch.no_grad = Tensor, contextlib.nullcontext
    torch.equal = lambda a, b: bool(np.array_equal(a.numpy(), b.numpy()))
    return {"torch": torch, "torch.nn": nn}


class Transformer:
    """Three layers of attention over 32 channels. `seen`: q, K and V [heads, T, D] of each layer, before scaling."""

    def __init__(self, scale=None):
        self.random, self.scale, self.seen = np.random.default_rng(1), scale, []
        self.weights = [[self.normal(32, heads * D) for heads in (H, G, G)] for _ in range(3)]
        self.embedding = self.normal(1000, 32)

    def normal(self, *shape):
        return self.random.standard_normal(shape).astype("f4")

    def __call__(self, tokens, use_cache):
        import torch
        from torch.nn import functional

        assert not use_cache
        x = self.embedding[tokens[0]]
        for weights in self.weights:
            q, k, v = ((x @ w).reshape(1, len(x), -1, D).swapaxes(1, 2) for w in weights)
            self.seen.append((q[0], k[0], v[0]))
            q, k, v = (torch.from_numpy(np.ascontiguousarray(y)) for y in (q, k, v))
            wide = (y.repeat_interleave(H // G, 1) for y in (k, v))
            o = functional.scaled_dot_product_attention(q, *wide, is_causal=True, scale=self.scale)
            o = o.numpy()[0].swapaxes(0, 1).reshape(len(x), -1)[:, :32]
            x = o / np.linalg.norm(o, axis=1, keepdims=True)


class Model(Run):
    """examples/capture_attention.py, on torch where it is installed, else on a fake of what it calls."""

    def setUp(self):
        super().setUp()
        if importlib.util.find_spec("torch") is None:
            patch = unittest.mock.patch.dict(sys.modules, fake_torch())
            patch.start()
            self.addCleanup(patch.stop)
        self.addCleanup(sys.modules.pop, "capture_attention", None)

    def captured(self, model, tokens, layer, name):
        """What the tool prints where it writes the layer's q, K and V to the file."""
        from capture_attention import capture

        settings = io.StringIO()
        with capture(layer) as captured:
            model(tokens, use_cache=False)
        with contextlib.redirect_stdout(settings):
            captured.write(os.path.join(self.folder, name), "a tiny transformer")
        return settings.getvalue()

    def check(self, settings, seen, q_factor=1):
        given = self.captured_run(settings, f"r{len(os.listdir(self.folder))}.h5")
        for name, values, factor in zip(("q", "k_sel", "v_sel"), seen, (q_factor, 1, 1)):
            np.testing.assert_allclose(given[name], values.swapaxes(0, 1) * factor, rtol=1e-3, atol=1e-6)

    def test_a_layer_of_a_tiny_transformer(self):
        from torch.nn import functional

        tokens, model, original = np.arange(100)[None], Transformer(), functional.scaled_dot_product_attention
        self.check(self.captured(model, tokens, 1, "q.h5"), model.seen[1])
        self.assertIs(functional.scaled_dot_product_attention, original)
        scaled = Transformer(scale=0.5)
        self.check(self.captured(scaled, tokens, 2, "scaled.h5"), scaled.seen[2], 0.5 * D ** 0.5)
        with self.assertRaisesRegex(ValueError, "was not reached; choose a smaller one"):
            self.captured(model, tokens, 7, "no.h5")
        self.assertFalse(os.path.exists(os.path.join(self.folder, "no.h5")))

    def test_a_model_of_transformers(self):
        model = Transformer()
        transformers = types.ModuleType("transformers")
        transformers.AutoTokenizer = unittest.mock.Mock()
        transformers.AutoTokenizer.from_pretrained.return_value = lambda text, return_tensors: types.SimpleNamespace(
            input_ids=np.array([[ord(c) for c in text]]))
        transformers.AutoModelForCausalLM = unittest.mock.Mock()
        transformers.AutoModelForCausalLM.from_pretrained.return_value.eval.return_value = model
        self.write("text.txt", "words of a text, " * 10)
        settings = io.StringIO()
        argv = ["capture_attention.py", "some/model", os.path.join(self.folder, "text.txt"), "--layer", "2",
                "--tokens", "90", "--output", os.path.join(self.folder, "q.h5")]
        with unittest.mock.patch.dict(sys.modules, transformers=transformers), \
                unittest.mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(settings):
            import capture_attention

            capture_attention.main()
        options = transformers.AutoModelForCausalLM.from_pretrained.call_args
        self.assertEqual((options.args, options.kwargs), (("some/model",), {"attn_implementation": "sdpa"}))
        self.assertIn("# some/model, layer 2, 90 tokens\n", settings.getvalue())
        self.assertIn("context = 90\n", settings.getvalue())
        self.check(settings.getvalue(), model.seen[2])


if __name__ == "__main__":
    unittest.main()
