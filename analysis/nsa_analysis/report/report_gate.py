"""The gate section of the report. `nsa gate` runs once per device and commit, because a verdict is of one program."""

import dataclasses
import shlex

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


def is_evidence(point):
    """Whether the gate uses a point: selection kernels, and decode with ablations."""
    return (point.kernels is not None and point.get("kernels.branch") == "sel") or any(
        mode.startswith("ablation_") for mode in point.modes
    )


def gate_decisions(points, csvs, program):
    """A Decision per device and commit that has evidence, and one for the CSVs."""
    groups = {}
    for p in filter(is_evidence, points):
        run = p.run
        key = run.device, run.attributes.get("backend"), run.attributes.get("git_commit")
        groups.setdefault(key, {})[run.path] = None
    decisions = [d for files in groups.values() for d in decide_groups(list(files), program)]
    return decisions + ([decide(csvs, program)] if csvs else [])


def decide(files, program):
    """Decision on these files together."""
    try:
        return Decision(files, gate.call_gate(files, program))
    except AnalysisError as reason:
        return Decision(files, None, str(reason))


def decide_groups(files, program):
    """One Decision if the gate accepts all files together. Else each file joins the first group that accepts it."""
    together = decide(files, program)
    if together.answer is not None or len(files) == 1:
        return [together]
    groups = []
    for file in files:
        for i, decision in enumerate(groups):
            joined = decide([*decision.files, file], program)
            if joined.answer is not None:
                groups[i] = joined
                break
        else:
            groups.append(decide([file], program))
    return groups


def gate_section(decisions):
    begin = '<h2 id="gate">M4 gate: is a custom selection kernel worth it?</h2>'
    if not decisions:
        return begin + (
            "<p>Nothing to decide: none of these files has kernel points (inputs/m4_kernels.toml) or decode "
            "with ablations (inputs/m4_decode.toml).</p>"
        )
    text = (
        "Decided by <code>nsa gate --json</code>, separately for each device and commit, and for each "
        "input where inputs differ. This page only shows its answers."
    )
    parts = [decision_part(decision, f"g{i}x") for i, decision in enumerate(decisions)]
    return begin + f"<p class=muted>{text}</p>" + "".join(parts)


def decision_part(decision, prefix):
    command = html.command_line(shlex.join(["nsa-analysis", "gate", *decision.files, "--figure", "gate.svg"]))
    if decision.answer is None:
        return command + f"<p>Not decided: {html.escape(decision.reason)}.</p>"
    table = gate.gate_table(decision.answer)
    parts = []
    for v in gate.verdicts(decision.answer).itertuples():
        facts = ", ".join(filter(None, [v.device, v.precision, v.commit and f"commit {v.commit[:12]}"]))
        parts.append(f"<h3>{html.escape(facts)}: {html.escape(v.verdict)}</h3><p>{html.escape(v.why)}</p>")
        parts.append(f"<p class=muted>{html.escape(v.notes)}</p>" if v.notes else "")
    parts += [command, html.figures(plots.gate_panels(table), prefix)]
    if len(table):
        parts.append(html.table(table, GATE_COLUMNS, "Conditions; shares and errors are fractions"))
    return "".join(parts)
