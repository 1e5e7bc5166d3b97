"""Machine files of `nsa run --dry-run --advise`: the coefficients of the cost model as TOML (docs/METRICS.md).

The C++ counterpart is lib/nsa/experiment/cost_model.cpp, which predicts the same times from such a file.
"""

import dataclasses
import os

import numpy as np

from ..data.series import identity
from ..errors import AnalysisError, FileError
from ..outputs import replacing
from . import cost_model, prediction, traffic

# Parameters on which coefficients depend: those that differ in an input make its error unknown.
INPUT = ("model.precision", "model.n_heads", "model.n_kv_groups", "model.d_k", "model.d_v", "model.layers",
         "model.shared_kv", "run.scope", "nsa.l", "nsa.d", "nsa.l_sel", "nsa.n_sel", "nsa.w", "nsa.phi")  # fmt: skip
# The same, with the value of files that are older than the key.
LATER_INPUT = {
    "decode": {"batch.distribution": "equal", "input.selection": ""},
    "prefill": {"run.prefix": 0, "run.prefill_chunk": "auto", "input.selection": ""},
}


@dataclasses.dataclass(frozen=True)
class Phase:
    """What a decode step or a prefill takes, fitted to the points of one series."""

    step: tuple  # (s, s/byte, s/FLOP, s/block)
    comm: tuple  # (s, s per further rank, s/byte) of an exchange; of a decode step that runs fused, inside one launch
    fused: bool  # a decode step runs fused
    errors: tuple  # absolute errors of steps on held-out layouts
    ranks: int  # most ranks that shared an exchange
    measured: str
    parameters: dict
    launches: tuple = (0.0, 0.0, 0.0)  # of an exchange of a decode step in several launches
    launches_measured: str = ""

    @staticmethod
    def of(points):
        """Fit to points of one series."""
        points = cost_model.usable(points)
        if not points:
            raise AnalysisError('no VALID point with mode `branches`; run with run.modes = ["branches", "total"]')
        model = cost_model.fit_points(points, tuple(sorted({p.ranks for p in points})))
        in_launches = [p for p in points if cost_model.plan_of(p) == "sharded"]
        first = points[0]
        held = cost_model.held_out(points).query("stage == 'step'")
        return Phase(
            model.step,
            model.step_comm,
            not model.plans <= {"staged"},
            tuple(held.error.abs()),
            max(cost_model.exchange_widths(points), default=0),
            measured_text(points),
            {name: first.get(name) for name in INPUT}
            | {name: first.get(name, default) for name, default in LATER_INPUT[first.kind].items()},
            model.launch_comm,
            measured_text(in_launches) if in_launches else "",
        )

    def text(self, name):
        """TOML of the sections [name], [name.launches] and [name.input]."""
        fixed, byte, flop, block = self.step
        values = [
            ("fixed", fixed, "s a layer"),
            ("bandwidth", rate(byte), "byte/s of modelled bytes"),
            ("arithmetic", rate(flop), "FLOP/s"),
            ("block", block, "s for each block of a sequence that a rank scores"),
        ] + exchange_values(self.comm)
        lines = [f"\n[{name}]", f'measured = "{self.measured}"']
        lines += value_lines(values)
        lines.append(f"ranks = {self.ranks}  # most that shared a measured exchange")
        if self.errors:
            lines.append(f"error_median = {np.median(self.errors):.3f}  # on layouts that were not fitted")
            lines.append(f"error_worst = {max(self.errors):.3f}")
        if self.fused:
            lines.append("fused = true")
        if any(self.launches):
            lines.append(f"\n[{name}.launches]  # exchanges of a step over kv ranks in several launches")
            lines += [f'measured = "{self.launches_measured}"', *value_lines(exchange_values(self.launches))]
        lines.append(f"\n[{name}.input]  # what was measured; the error of other inputs is not known")
        lines += [f'"{key}" = {toml_value(value)}' for key, value in self.parameters.items() if value is not None]
        return "\n".join(lines) + "\n"


def rate(coefficient):
    return 1 / coefficient if coefficient > 0 else 0


def exchange_values(comm):
    """(key, value, unit) of the coefficients of an exchange."""
    return [
        ("exchange", comm[0], "s, of an exchange"),
        ("exchange_rank", comm[1], "s, of an exchange, for each rank but one"),
        ("exchange_bandwidth", rate(comm[2]), "byte/s received"),
    ]


def value_lines(values):
    return [f"{key} = {value:.4g}  # {unit}" for key, value, unit in values if value > 0 or key == "fixed"]


def toml_value(value):
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(int(value))


def measured_text(points):
    """Layouts, sizes, commit and files of the points."""

    def sizes(name):
        return ", ".join(str(v) for v in sorted({p[name] for p in points}))

    layouts = ", ".join(dict.fromkeys(p.layout for p in sorted(points, key=lambda p: (p.ranks, p["heads"]))))
    runs = {p.run.path: p.run for p in points}.values()
    commits = ", ".join(sorted({str(r.attributes.get("git_commit", "unknown")) for r in runs}))
    files = os.path.commonprefix(sorted(os.path.basename(r.path) for r in runs)) + ("*" if len(runs) > 1 else "")
    return f"contexts {sizes('run.context')}, batch {sizes('run.batch')}, layouts {layouts}; commit {commits}; {files}"


def machine_text(points, network, memory=None):
    """A machine file from decode and prefill points of one machine.

    `memory`: bytes of a rank; by default those of the device, where it is known. Raises AnalysisError where it is not.
    """
    phases, points_of = [], {}
    for point in points:
        if traffic.shape_of(point):
            points_of.setdefault(point.kind, []).append(point)
    if not points_of:
        raise AnalysisError("no decode and no prefill to fit a machine to; give files of either")
    first = next(iter(points_of.values()))[0]
    devices = {(p.run.device, identity(p)["backend"]) for members in points_of.values() for p in members}
    if len(devices) > 1:
        raise AnalysisError(f"points of {len(devices)} devices; a machine file is of one: select with --where device=…")
    memory = memory or prediction.device_memory(first.run.device)
    if not memory > 0:
        raise AnalysisError(f"the memory of {first.run.device} is not known; give --memory GB of a rank")
    for kind, members in sorted(points_of.items()):
        phases.append(Phase.of(members).text(kind))
    head = (
        f'# {first.run.device}, as `nsa run --dry-run --advise` needs to know it (docs/METRICS.md, "Advice").\n'
        f'name = "{first.run.device}"\n'
        f'backend = "{identity(first)["backend"]}"\n'
        f"memory = {memory:.4g}  # byte a rank\n"
        f"node = {network.node}  # ranks\n"
    )
    if gpu := prediction.device_gpu(first.run.device):
        head += f"\n[gpu]  # whose workspace is planned\ncapability = {gpu[0]}\nsms = {gpu[1]}\n"
    return head + "".join(phases) + network_text(network)


def network_text(network):
    return (
        "\n[network]  # between nodes\n"
        f'name = "{network.text()}"\nlatency = {network.latency:g}  # s\n'
        f"bandwidth = {network.bandwidth:g}  # byte/s a link\n"
    )


def write_machine(path, text):
    """Writes a machine file. Raises FileError where the path holds something else than one."""
    if os.path.exists(path):
        with open(path, "rb") as file:
            if b"--advise" not in file.readline():
                raise FileError(f"cannot write {path} (it is no machine file); choose another --machine")
    with replacing(path) as file:
        file.write(text)
