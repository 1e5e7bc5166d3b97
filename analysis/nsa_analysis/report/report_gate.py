"""The gate section of the report. `nsa gate` runs once for each pair of a decode input and a kernels input of one
program, because a verdict is of one program and one input of each kind."""

import dataclasses
import shlex

import pandas as pd

from ..data.parallel import parallel
from ..errors import AnalysisError
from ..figures import plots
from ..models import gate
from . import html

GATE_COLUMNS = ["device", "condition", "at", "value", "bound_low", "bound_high", "n", "threshold", "outcome"]


@dataclasses.dataclass(frozen=True)
class Decision:
    """Answer of `nsa gate` on the files of one device and commit, or the reason why there is none."""

    files: list
    answer: dict | None = None
    reason: str = ""

    def verdicts(self):
        """Verdicts of devices, without those of audited CSVs."""
        if self.answer is None:
            return []
        return gate.verdicts(self.answer).iloc[: len(self.answer["devices"])].itertuples()


def gate_decisions(points, csvs, program):
    """A Decision for each list of gate.paired_files, and one for the CSVs."""
    return parallel(decide, [(files, program) for files in [*gate.paired_files(points), *([csvs] if csvs else [])]])


def decide(files, program):
    """Decision on these files together."""
    try:
        return Decision(files, gate.call_gate(files, program))
    except AnalysisError as reason:
        return Decision(files, None, str(reason))


def gate_section(decisions):
    heading = "M4 gate: is a custom selection kernel worth it?"
    if not decisions:
        return html.section(
            "gate",
            heading,
            "<p>Nothing to decide: none of these files has kernel points (inputs/gate/m4_kernels.toml) or decode "
            "with ablations (inputs/gate/m4_decode.toml).</p>",
        )
    text = (
        "Decided by <code>nsa gate --json</code>: each decode input with each kernels input of the same device and "
        "commit. This page only shows its answers; a figure that several decisions share is drawn once."
    )
    drawn = set()
    parts = [decision_part(decision, f"g{i}x", drawn) for i, decision in enumerate(decisions)]
    return html.section("gate", heading, f"<p class=muted>{text}</p>" + "".join(parts))


def decision_part(decision, prefix, drawn):
    """HTML of one decision. `drawn` holds the titles and rows of the figures that the page has already."""
    command = html.command_line(shlex.join(["nsa-analysis", "gate", *decision.files, "--figure", "gate.svg"]))
    if decision.answer is None:
        return command + f"<p>Not decided: {html.escape(decision.reason)}.</p>"
    table = gate.gate_table(decision.answer)
    parts = []
    for v in gate.verdicts(decision.answer).itertuples():
        facts = ", ".join(filter(None, [v.device, v.precision, v.commit and f"commit {v.commit[:12]}"]))
        parts.append(f"<h3>{html.escape(facts)}: {html.escape(v.verdict)}</h3><p>{html.escape(v.why)}</p>")
        parts.append(f"<p class=muted>{html.escape(v.notes)}</p>" if v.notes else "")
    rows = list(table.astype(str).itertuples(index=False, name=None))
    fresh = table[pd.Series([row not in drawn for row in rows], dtype=bool)]
    drawn |= set(rows)
    parts += [command, html.figures(plots.gate_panels(fresh[fresh.condition != "shape_error"]), prefix)]
    if len(table):
        parts.append(html.table(table, GATE_COLUMNS, "Conditions; shares and errors are fractions"))
    return "".join(parts)
