"""The gate in a report: one question to `nsa gate` for each device and commit, for one verdict needs one program."""

import dataclasses
import shlex

from ..errors import AnalysisError
from ..figures import plots
from ..models import gate
from . import html

SHOWN = ["device", "condition", "at", "value", "bound_low", "bound_high", "n", "threshold", "outcome"]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What `nsa gate` said of the files of one device and commit, or why it said nothing."""

    files: list
    answer: dict | None = None
    reason: str = ""

    def verdicts(self):
        """Its devices, without the CSVs that it audited."""
        if self.answer is None:
            return []
        return gate.verdicts(self.answer).iloc[: len(self.answer["devices"])].itertuples()


def is_evidence(point):
    """Points that the gate decides on: selection kernels, and decode with its ablations."""
    return (point.kernels is not None and point.get("kernels.branch") == "sel") or any(
        mode.startswith("ablation_") for mode in point.modes
    )


def decide(points, csvs, program):
    """A Decision for each device and commit that has evidence, and one for the CSVs."""
    groups = {}
    for p in filter(is_evidence, points):
        run = p.run
        key = run.device, run.attributes.get("backend"), run.attributes.get("git_commit")
        groups.setdefault(key, {})[run.path] = None
    decisions = [d for files in groups.values() for d in judged(list(files), program)]
    return decisions + ([ask(csvs, program)] if csvs else [])


def ask(files, program):
    try:
        return Decision(files, gate.call_gate(files, program))
    except AnalysisError as reason:
        return Decision(files, None, str(reason))


def judged(files, program):
    """One Decision where the gate takes the files together; else each joins the first others that it is taken with."""
    together = ask(files, program)
    if together.answer is not None or len(files) == 1:
        return [together]
    apart = []
    for file in files:
        for i, decision in enumerate(apart):
            joined = ask([*decision.files, file], program)
            if joined.answer is not None:
                apart[i] = joined
                break
        else:
            apart.append(ask([file], program))
    return apart


def gate_section(decisions):
    begin = '<h2 id="gate">M4 gate: is a custom selection kernel worth it?</h2>'
    if not decisions:
        return begin + (
            "<p>Nothing to decide: none of these files holds kernel points (inputs/m4_kernels.toml) or decode "
            "with its ablations (inputs/m4_decode.toml).</p>"
        )
    text = (
        "Decided by <code>nsa gate --json</code>, for each device and commit by itself, and where their "
        "inputs differ for each input; this page draws its answers "
        "and holds no rule of its own."
    )
    parts = [decision_part(decision, f"g{i}x") for i, decision in enumerate(decisions)]
    return begin + f"<p class=muted>{text}</p>" + "".join(parts)


def decision_part(decision, prefix):
    command = html.command_line(shlex.join(["nsa-analysis", "gate", *decision.files, "--figure", "gate.svg"]))
    if decision.answer is None:
        return command + f"<p>Not decided: {html.escape(decision.reason)}.</p>"
    table = gate.gate_table(decision.answer)
    parts = []
    for said in gate.verdicts(decision.answer).itertuples():
        facts = ", ".join(filter(None, [said.device, said.precision, said.commit and f"commit {said.commit[:12]}"]))
        parts.append(f"<h3>{html.escape(facts)}: {html.escape(said.verdict)}</h3><p>{html.escape(said.why)}</p>")
        parts.append(f"<p class=muted>{html.escape(said.notes)}</p>" if said.notes else "")
    parts += [command, html.figures(plots.gate_panels(table), prefix)]
    if len(table):
        parts.append(html.table(table, SHOWN, "Conditions; shares and errors are fractions"))
    return "".join(parts)
