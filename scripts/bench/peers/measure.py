"""Measures implementations of one shape and refuses times of what did not do the work. Needs no GPU itself."""

import statistics
import sys

from . import shapes, timing

MAX_ERROR = {"bf16": 2e-2, "fp16": 2e-2, "fp32": 1e-4}  # lib/nsa/results/error_bound.hpp


class Invalid(Exception):
    """Why a time of an implementation that ran is not the time of the work."""


def first_line(reason):
    return (str(reason) or repr(reason)).splitlines()[0]


def check_replays(sampler, exact, bound):
    """Raises Invalid unless every output of the replays since the last check is that of the values V has now."""
    error = sampler.worst_error(exact)
    if not error <= bound:
        raise Invalid(f"outputs of its replays are off by {error:.1e} after V has changed, though a call by itself is "
                      "right: what was timed is other work")


def check_floor(seconds, floor):
    """Raises Invalid for a median below `floor` s, in which no program does the work."""
    median = statistics.median(seconds)
    if median < floor:
        raise Invalid(f"{median * 1e6:.2f} us are less than the floor of {floor * 1e6:.2f} us")


def prepare(inputs, candidates, exact, bound):
    """(name, variant, error, sampler) of each candidate whose call is right, and a replay with twice the values."""
    for name, variant, call, copies in candidates:
        try:
            error = shapes.error_of(inputs.on_host(call(0)), exact)
            if not error["max"] <= bound:
                raise RuntimeError(f"its error against float64 is {error['max']:.1e}")
            sampler = inputs.sampler(call, copies)
            inputs.scale_values(2)
            try:
                sampler.sample()
                check_replays(sampler, 2 * exact, bound)
            finally:
                inputs.scale_values(0.5)
            yield name, variant, error, sampler
        except Invalid as reason:
            print(f"  {name} is INVALID: {reason}", file=sys.stderr)
        except Exception as reason:  # of a library, which may not support the shape
            print(f"  {name} is left out: {first_line(reason)}", file=sys.stderr)
            inputs.synchronize()  # throws, and ends the process, where the GPU cannot be used any more


def measure(point, inputs, candidates):
    """The point for result_file.write(), or None where nothing of `candidates` runs; says what is left out and why.

    `candidates`: (name, variant, call, copies); call(copy) gives the output [rows, H, D] from one copy of the inputs.
    `inputs`: exact(), floor(), on_host(output), scale_values(factor), sampler(call, copies), synchronize(), as of
    selection.Inputs. A sampler has sample() and worst_error(exact), over the outputs of the replays since its last
    call. Outputs of the checked replay are of twice the values, those of the timed ones of the values: what a timed
    replay does not write is seen.
    """
    exact, bound = inputs.exact(), MAX_ERROR[point["model.precision"]]
    kept = list(prepare(inputs, candidates, exact, bound))
    times = timing.alternate([sampler for *_, sampler in kept], point["run.steps"])
    rows = []
    for (name, variant, error, sampler), seconds in zip(kept, times):
        try:
            check_replays(sampler, exact, bound)
            check_floor(seconds[point["run.warmup"]:], inputs.floor())
            rows.append((name, variant, error, seconds))
        except Invalid as reason:
            print(f"  {name} is INVALID: {reason}", file=sys.stderr)
    if not rows:
        return None
    names, variants, errors, seconds = (list(x) for x in zip(*rows))
    return {"parameters": point, "implementations": names, "variants": variants, "errors": errors,
            "warmup": point["run.warmup"], "seconds": seconds}
