"""The M4 gate. The rule stands in the program: this calls `nsa gate --json` and turns its answer into tables."""

import json
import os
import shutil
import subprocess

import pandas as pd

from ..data.tables import NAN
from ..errors import AnalysisError


def find_nsa(program=None):
    """The program: as given, else $NSA, else `nsa` on the PATH."""
    name = program or os.environ.get("NSA") or "nsa"
    found = shutil.which(name)
    if not found:
        raise AnalysisError(
            f"cannot find the program {name} (the rule of the gate stands in it); "
            "give --nsa PATH, set NSA, or put nsa on the PATH"
        )
    return found


def call_gate(files, program=None):
    """What `nsa gate --json FILES` answers, as a dict. Raises AnalysisError with the program's own message."""
    command = [find_nsa(program), "gate", "--json", *map(str, files)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AnalysisError(f"cannot run {command[0]} ({error}); give --nsa PATH") from None
    if run.returncode != 0:
        said = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        failure = AnalysisError(f"nsa gate: {said[-1].removeprefix('nsa: error: ')}")
        failure.code = run.returncode if run.returncode in (2, 3, 6) else AnalysisError.code
        raise failure
    try:
        answer = json.loads(run.stdout)
        if not isinstance(answer["devices"], list):
            raise ValueError("'devices' is no list")
        return answer
    except (ValueError, KeyError, TypeError) as error:
        raise AnalysisError(
            f"{command[0]} gate --json gave no answer this reader knows ({error}); use the nsa of the same version"
        ) from None


def condition_row(device, name, where, measured, threshold, outcome):
    measured = measured or {}
    number = lambda key: NAN if measured.get(key) is None else float(measured[key])
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
    """DataFrame, a row a condition: the deciding ones ("share", "speedup", "speedup_packed", "error") and what they are
    the worst of ("shape_...", outcome empty). Shares and errors are fractions, speedups ratios."""
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
            for key, of in ("with_gather", "speedup"), ("packed", "speedup_packed"), ("error", "error"):
                if shape.get(key):
                    rows.append(
                        condition_row(device, f"shape_{of}", shape["name"], shape[key], thresholds.get(of, NAN), "")
                    )
    return pd.DataFrame(rows, columns=list(condition_row({}, "", "", {}, NAN, "")))


def verdicts(answer):
    """DataFrame, a row a device, or a CSV that was audited: its verdict and the sentence that says why."""
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
