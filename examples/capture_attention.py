#!/usr/bin/env python3
"""q, K and V of one attention layer of your own PyTorch model, as an input file of nsa (docs/SCHEMA.md, "Tensors").

Works for every model whose attention calls torch.nn.functional.scaled_dot_product_attention once a layer, as those of
Hugging Face's transformers do by default. Heads of K and V that a model repeats for its query heads are stored once.

As a module, around any forward pass of one sequence:
  with capture(layer=12) as captured:
      model(tokens)
  captured.write("q12.h5", source="my model, layer 12")

As a program, for a model of transformers (a folder or a name) and a text: needs torch, transformers, numpy, h5py.
usage: capture_attention.py MODEL TEXT --output FILE.h5 [--layer N] [--tokens T]
"""

import argparse
import contextlib
import pathlib

import torch
from captured import write_input
from torch.nn import functional


class Captured:
    """What the chosen call of attention got; q is None until it was made."""

    q = k = v = None

    def keep(self, q, k, v, scale):
        """[1, heads, T, d] each."""
        if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
            raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)}: give one sequence, without a cache")
        if scale is not None:
            q = q * (scale * q.shape[-1] ** 0.5)
        self.q, self.k, self.v = (x[0].transpose(0, 1).float().cpu().numpy() for x in (q, *distinct_heads(k, v)))

    def write(self, path, source):
        if self.q is None:
            raise ValueError("the layer was not reached; choose a smaller one")
        write_input(path, self.q, self.k, self.v, source)


def distinct_heads(k, v):
    """K and V [1, heads, T, d] without the copies that neighbouring heads have."""
    heads = k.shape[1]
    for repeats in range(heads, 1, -1):
        if heads % repeats == 0 and all(torch.equal(x, x[:, ::repeats].repeat_interleave(repeats, 1)) for x in (k, v)):
            return k[:, ::repeats], v[:, ::repeats]
    return k, v


@contextlib.contextmanager
def capture(layer):
    """Keeps the inputs of the layer-th call of attention (from 0) in the `with` block."""
    captured, original, calls = Captured(), functional.scaled_dot_product_attention, 0

    def attention(query, key, value, *args, **options):
        nonlocal calls
        if calls == layer:
            captured.keep(query.detach(), key.detach(), value.detach(), options.get("scale"))
        calls += 1
        return original(query, key, value, *args, **options)

    functional.scaled_dot_product_attention = attention
    try:
        yield captured
    finally:
        functional.scaled_dot_product_attention = original


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name, of transformers' AutoModelForCausalLM")
    parser.add_argument("text", type=pathlib.Path, help="a text file")
    parser.add_argument("--output", required=True, help="the input file to write")
    parser.add_argument("--layer", type=int, default=0, help="whose attention is stored (default 0)")
    parser.add_argument("--tokens", type=int, default=8192, help="at most so many (default 8192)")
    args = parser.parse_args()
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="sdpa").eval()
    tokens = tokenizer(args.text.read_text(), return_tensors="pt").input_ids[:, :args.tokens]
    with torch.no_grad(), capture(args.layer) as captured:
        model(tokens, use_cache=False)
    captured.write(args.output, f"{args.model}, layer {args.layer}, {tokens.shape[1]} tokens")


if __name__ == "__main__":
    main()
