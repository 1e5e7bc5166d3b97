"""Inputs of a selection shape on the GPU, as measure.measure() takes them. Needs torch with CUDA."""

import functools

import torch

from . import shapes, timing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
READ_OVER_COPY = 1.5  # docs/METRICS.md, "Noise": reads alone are up to 1.5 times as fast as a copy


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

    def floor(self):
        """Seconds that an execution takes at the least: a launch, the bytes that it moves, or its products."""
        moved, flops = shapes.least_work(self.point, self.blocks.cpu().numpy(), self.dtype.itemsize)
        return max(launch_seconds(), moved / read_rate(), flops / product_rate())

    def scale_values(self, factor):
        """Multiplies V of all copies, and so the output, by a power of two: no rounding changes."""
        for _, v in self.kv + self.packed:
            v.mul_(factor)

    def on_host(self, output):
        return output.float().cpu().numpy()

    def sampler(self, call, copies):
        return timing.CudaGraphs(call, copies)

    def synchronize(self):
        torch.cuda.synchronize()


def fastest(call):
    """Seconds of the fastest of some executions, as samples take them."""
    graphs = timing.CudaGraphs(lambda copy: call(), 1)
    return min(graphs.sample() for _ in range(10))


@functools.cache
def launch_seconds():
    """Of a kernel that fills a word."""
    word = torch.zeros(1, device="cuda")
    return 0.9 * fastest(lambda: word.fill_(0))


@functools.cache
def read_rate():
    """Byte/s, more than any kernel reads."""
    source = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return READ_OVER_COPY * 2 * source.numel() / fastest(lambda: target.copy_(source))


@functools.cache
def product_rate():
    """FLOP/s, more than any kernel does in 16 bits."""
    a, b = (torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 1.2 * 2 * 8192**3 / fastest(lambda: a @ b)


def system():
    """What system_columns() has to know of the card."""
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "uuid": f"GPU-{properties.uuid}", "cuda": torch.version.cuda or ""}
