"""The M4 gate. The program holds the rule: this module calls `nsa gate --json` and converts the answer to tables."""

import json
import os
import shutil
import subprocess

import pandas as pd

from ..data.series import identity, keep_latest
from ..data.tables import NAN
from ..errors import AnalysisError


def find_nsa(program=None):
    """Path of the program: as given, else $NSA, else `nsa` on the PATH."""
    name = program or os.environ.get("NSA") or "nsa"
    found = shutil.which(name)
    if not found:
        raise AnalysisError(
            f"cannot find the program {name} (it decides the gate); give --nsa PATH, set NSA, or put nsa on the PATH"
        )
    return found


def call_gate(files, program=None):
    """The answer of `nsa gate --json FILES` as a dict. Raises AnalysisError with the message of the program."""
    command = [find_nsa(program), "gate", "--json", *map(str, files)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AnalysisError(f"cannot run {command[0]} ({error}); give --nsa PATH") from None
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        failure = AnalysisError(f"nsa gate: {lines[-1].removeprefix('nsa: error: ')}")
        failure.code = run.returncode if run.returncode in (2, 3, 6) else AnalysisError.code
        raise failure
    try:
        answer = json.loads(run.stdout)
        if not isinstance(answer["devices"], list):
            raise ValueError("'devices' is not a list")
        return answer
    except (ValueError, KeyError, TypeError) as error:
        raise AnalysisError(
            f"{command[0]} gate --json gave no answer that this version can read ({error}); "
            "use the nsa of the same version"
        ) from None


def is_evidence(point):
    """Whether the gate uses a point: selection kernels, and decode with ablations."""
    return (point.kernels is not None and point.get("kernels.branch") == "sel") or any(
        mode.startswith("ablation_") for mode in point.modes
    )


def evidence_inputs(points):
    """Lists of files whose evidence is of one input: one series on one layout, the files in the order of their names.

    Returns (decode, kernels), each sorted by its files. Of runs of the same points the later counts (series.latest).
    """
    found = {"decode": {}, "kernels": {}}
    for p in keep_latest([p for p in points if is_evidence(p)]):
        inputs = found["kernels" if p.kernels is not None else "decode"]
        inputs.setdefault((tuple(identity(p).items()), p.layout), {})[p.run.path] = p
    return [
        sorted(((sorted(files), next(iter(files.values()))) for files in kind.values()), key=lambda one: one[0])
        for kind in found.values()
    ]


def paired_files(points):
    """Lists of files that are decided together: each decode input with each kernels input of its program.

    A program is a device, a backend and a commit. An input without a partner is decided alone. The order in which the
    files were given does not matter.
    """
    decode, kernels = evidence_inputs(points)
    pairs = [[*d, *k] for d, p in decode for k, q in kernels if program_of(p) == program_of(q)]
    paired = {path for files in pairs for path in files}
    return pairs + [files for files, _ in (*decode, *kernels) if not paired & set(files)]


def program_of(point):
    """What one verdict needs: (device, backend, commit)."""
    run = point.run
    return run.device, run.attributes.get("backend"), run.attributes.get("git_commit")


def condition_row(device, name, where, measured, threshold, outcome):
    measured = measured or {}

    def number(key):
        return NAN if measured.get(key) is None else float(measured[key])

    return {
        "device": device.get("device", ""),
        "condition": name,
        "at": where,
        "value": number("value"),
        "bound_low": number("low"),
        "bound_high": number("high"),
        "n": measured.get("n", 0),
        "threshold": threshold,
        "outcome": outcome,
    }


def gate_table(answer):
    """DataFrame, one row per condition of each device.

    "share", "speedup", "speedup_packed" and "error" decide. Rows "shape_..." have an empty outcome: the condition of
    that name is the worst of them. Shares and errors are fractions, speedups are ratios.
    """
    rows = []
    for device in answer["devices"]:
        thresholds = {}
        for c in device.get("contexts", []):
            at = f"context {c['context']}, batch {c.get('batch', 1)}"
            for key, name in ("share", "share"), ("share_30", "share_30"):
                if condition := c.get(key):
                    rows.append(
                        condition_row(
                            device,
                            name,
                            at,
                            condition.get("measured"),
                            condition.get("threshold", NAN),
                            condition.get("outcome", ""),
                        )
                    )
            for key in "share_ablation", "share_attention":
                if c.get(key):
                    rows.append(condition_row(device, key, at, c[key], NAN, ""))
        for key in "speedup", "speedup_packed", "error":
            if condition := device.get(key):
                thresholds[key] = condition.get("threshold", NAN)
                rows.append(
                    condition_row(
                        device,
                        key,
                        "worst shape",
                        condition.get("measured"),
                        thresholds[key],
                        condition.get("outcome", ""),
                    )
                )
        for shape in device.get("shapes", []):
            for key, condition in ("with_gather", "speedup"), ("packed", "speedup_packed"), ("error", "error"):
                if shape.get(key):
                    threshold = thresholds.get(condition, NAN)
                    rows.append(condition_row(device, f"shape_{condition}", shape["name"], shape[key], threshold, ""))
    return pd.DataFrame(rows, columns=list(condition_row({}, "", "", {}, NAN, "")))


def verdicts(answer):
    """DataFrame, one row per device and per audited CSV: the verdict and its reason."""
    rows = [
        {
            "device": d.get("device", ""),
            "precision": d.get("precision", ""),
            "commit": d.get("git_commit", ""),
            "verdict": d.get("verdict", ""),
            "why": d.get("why", ""),
            "notes": "; ".join(d.get("notes", [])),
        }
        for d in answer["devices"]
    ]
    rows += [
        {
            "device": a.get("file", ""),
            "precision": "",
            "commit": "",
            "verdict": a.get("verdict", ""),
            "why": "; ".join(a.get("findings", [])),
            "notes": "; ".join(a.get("notes", [])),
        }
        for a in answer.get("audits", [])
    ]
    return pd.DataFrame(rows, columns=["device", "precision", "commit", "verdict", "why", "notes"])
