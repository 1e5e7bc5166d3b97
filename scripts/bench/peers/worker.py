"""The process of one package of kernels, as isolation.measure_package() starts it. Needs torch with CUDA.

usage: python3 -m peers.worker PACKAGE FOLDER
"""

import sys

from . import isolation, kernels, measure, selection, torch_sdpa


def candidates_of(package):
    """Functions of selection.Inputs that give candidates, in the order in which they are tried."""
    if package == "torch":
        return torch_sdpa.fast_implementations, torch_sdpa.implementations  # fp32: only torch's own arithmetic
    return (lambda inputs: kernels.implementations(inputs, {package: kernels.ADAPTERS[package][0]}),)


def main(package, folder):
    def measure_point(point):
        inputs = selection.Inputs(point)
        found = (measure.measure(point, inputs, make(inputs)) for make in candidates_of(package))
        return next(filter(None, found), None)

    def about():
        return {"program": torch_sdpa.program(), "system": selection.system()}

    isolation.serve(folder, about, measure_point)


if __name__ == "__main__":
    main(*sys.argv[1:])
