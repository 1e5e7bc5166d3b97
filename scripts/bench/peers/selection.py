"""Inputs of a selection shape on the GPU, and its measurement by several implementations. Needs torch with CUDA."""

import functools
import sys

import torch

from . import shapes, timing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_ERROR = {"bf16": 2e-2, "fp16": 2e-2, "fp32": 1e-4}  # lib/nsa/results/error_bound.hpp


class Inputs:
    """q [rows, H, D], copies of K and V [context, D], and of the packed ones [rows, n * l', D]."""

    def __init__(self, point):
        rows, heads, d = point["kernels.rows"], point["kernels.heads"], point["kernels.head_size"]
        self.point, self.dtype = point, DTYPES[point["model.precision"]]
        generator = torch.Generator("cuda").manual_seed(point["run.seed"])
        random = functools.partial(torch.randn, generator=generator, device="cuda", dtype=self.dtype)
        self.q = random(rows, heads, d)
        self.blocks = torch.from_numpy(shapes.choose_blocks(point)).cuda().long()  # [rows, n]
        context, cold, size = point["run.context"], point["kernels.cold"], self.dtype.itemsize
        k, v = random(context, d), random(context, d)
        copies = timing.copies_of(2 * context * d * size, cold)
        self.kv = [(k, v)] + [(k.clone(), v.clone()) for _ in range(copies - 1)]
        packed = self.gathered(0)
        copies = timing.copies_of(2 * packed[0].numel() * size, cold)
        self.packed = [packed] + [tuple(x.clone() for x in packed) for _ in range(copies - 1)]

    def gathered(self, copy):
        """The chosen blocks of K and V of each row, [rows, n * l', D]: whole blocks are copied, not tokens."""
        rows, l_sel, d = self.point["kernels.rows"], self.point["nsa.l_sel"], self.point["kernels.head_size"]
        chosen = self.blocks.view(-1)
        whole = self.point["run.context"] // l_sel * l_sel
        return tuple(x[:whole].view(-1, l_sel * d).index_select(0, chosen).view(rows, -1, d) for x in self.kv[copy])

    def exact(self):
        """Attention in float64, [rows, H, D] on the host."""
        outputs = []
        for rows in torch.arange(len(self.q), device="cuda").split(64):
            q, k, v = (x[rows].double() for x in (self.q, *self.packed[0]))
            p = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)
            outputs.append((p @ v).cpu())
        return torch.cat(outputs).numpy()


def measure(point, inputs, candidates):
    """The point for result_file.write(), or None where nothing of `candidates` runs; says what is left out and why.

    `candidates`: (name, variant, call, copies); call(copy) gives the output [rows, H, D] from one copy of the inputs.
    """
    exact, kept = inputs.exact(), []
    for name, variant, call, copies in candidates:
        try:
            error = shapes.error_of(call(0).float().cpu().numpy(), exact)
            if not error["max"] <= MAX_ERROR[point["model.precision"]]:
                raise RuntimeError(f"its error against float64 is {error['max']:.1e}")
            kept.append((name, variant, error, timing.CudaGraphs(call, copies)))
        except Exception as reason:  # of a library, which may not support the shape
            print(f"  {name} is left out: {(str(reason) or repr(reason)).splitlines()[0]}", file=sys.stderr)
            torch.cuda.synchronize()
    if not kept:
        return None
    names, variants, errors, samplers = (list(x) for x in zip(*kept))
    return {"parameters": point, "implementations": names, "variants": variants, "errors": errors,
            "warmup": point["run.warmup"], "seconds": timing.alternate(samplers, point["run.steps"])}


def system():
    """What system_columns() has to know of the card."""
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "uuid": f"GPU-{properties.uuid}", "cuda": torch.version.cuda or ""}
