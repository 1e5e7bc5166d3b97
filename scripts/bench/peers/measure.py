"""Measures implementations of one shape and refuses times of what did not do the work. Needs no GPU itself."""

import statistics
import sys

import numpy as np

from . import shapes, timing

MAX_ERROR = {"bf16": 2e-2, "fp16": 2e-2, "fp32": 1e-4}  # lib/nsa/results/error_bound.hpp


class Invalid(Exception):
    """Why a time of an implementation that ran is not the time of the work."""


def first_line(reason):
    return (str(reason) or repr(reason)).splitlines()[0]


def check_written(sampler, exact, bound):
    """Raises Invalid unless every output of the replays since poison() was written, and is right."""
    error = sampler.worst_error(exact)
    if not error <= bound:
        unwritten = np.isinf(error) or error > timing.POISON / 2
        what = "do not write all of the output" if unwritten else f"are off by {error:.1e}"
        raise Invalid(f"replays of its graph {what}, though a call by itself is right: what was timed is other work")


def check_floor(seconds, floor):
    """Raises Invalid for a median below `floor` s, in which no program does the work."""
    median = statistics.median(seconds)
    if median < floor:
        raise Invalid(f"{median * 1e6:.2f} us are less than the floor of {floor * 1e6:.2f} us")


def prepare(inputs, candidates, exact, bound):
    """(name, variant, error, sampler) of each candidate whose call, and the replay of whose graph, is right."""
    for name, variant, call, copies in candidates:
        try:
            error = shapes.error_of(inputs.on_host(call(0)), exact)
            if not error["max"] <= bound:
                raise RuntimeError(f"its error against float64 is {error['max']:.1e}")
            sampler = inputs.sampler(call, copies)
            sampler.poison()
            sampler.sample()
            check_written(sampler, exact, bound)
            yield name, variant, error, sampler
        except Invalid as reason:
            print(f"  {name} is INVALID: {reason}", file=sys.stderr)
        except Exception as reason:  # of a library, which may not support the shape
            print(f"  {name} is left out: {first_line(reason)}", file=sys.stderr)
            inputs.synchronize()  # throws, and ends the process, where the GPU cannot be used any more


def measure(point, inputs, candidates):
    """The point for result_file.write(), or None where nothing of `candidates` runs; says what is left out and why.

    `candidates`: (name, variant, call, copies); call(copy) gives the output [rows, H, D] from one copy of the inputs.
    `inputs`: exact(), floor(), on_host(output), sampler(call, copies), synchronize(), as of selection.Inputs. A sampler
    has sample(); poison(), after which an output that no replay writes is timing.POISON; and worst_error(exact), over
    the outputs of the replays since then.
    """
    exact, bound = inputs.exact(), MAX_ERROR[point["model.precision"]]
    kept = list(prepare(inputs, candidates, exact, bound))
    for *_, sampler in kept:
        sampler.poison()
    times = timing.alternate([sampler for *_, sampler in kept], point["run.steps"])
    rows = []
    for (name, variant, error, sampler), seconds in zip(kept, times):
        try:
            check_written(sampler, exact, bound)
            check_floor(seconds[point["run.warmup"]:], inputs.floor())
            rows.append((name, variant, error, seconds))
        except Invalid as reason:
            print(f"  {name} is INVALID: {reason}", file=sys.stderr)
    if not rows:
        return None
    names, variants, errors, seconds = (list(x) for x in zip(*rows))
    return {"parameters": point, "implementations": names, "variants": variants, "errors": errors,
            "warmup": point["run.warmup"], "seconds": seconds}
