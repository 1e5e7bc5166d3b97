"""The gate is decided by the program: a fake one with a given answer, and the real one."""

import itertools
import json
import os
import pathlib
import stat
import sys

import h5py
import nsa_analysis
import numpy as np
import pytest
import synthetic
from nsa_analysis.cli import main
from nsa_analysis.errors import AnalysisError
from nsa_analysis.figures import plots
from nsa_analysis.models import gate
from nsa_analysis.report import report_gate

RESULTS = pathlib.Path(__file__).resolve().parents[3] / "docs/results"
MEASURED = {"value": 0.31, "low": 0.3, "high": 0.32, "n": 24}
NONE = {"value": None, "low": None, "high": None, "n": 0}
ANSWER = {
    "gate": 1,
    "devices": [
        {
            "device": "Test GPU",
            "backend": "cuda",
            "git_commit": "c0ffee",
            "precision": "bf16",
            "files": ["a.h5"],
            "verdict": "PROCEED",
            "why": "all three are met",
            "speedup": {
                "name": "speedup",
                "threshold": 1.2,
                "measured": {"value": 8.5, "low": 8, "high": 9, "n": 40},
                "outcome": "met",
                "why": "",
            },
            "speedup_packed": {
                "name": "packed",
                "threshold": 1.2,
                "measured": NONE,
                "outcome": "open",
                "why": "not measured",
            },
            "error": {
                "name": "error",
                "threshold": 1e-3,
                "measured": {"value": 1e-4, "low": 9e-5, "high": 2e-4, "n": 3},
                "outcome": "met",
                "why": "",
            },
            "contexts": [
                {
                    "context": 65536,
                    "batch": 1,
                    "verdict": "PROCEED",
                    "why": "",
                    "accounts": [],
                    "share": {"name": "share", "threshold": 0.25, "measured": MEASURED, "outcome": "met", "why": ""},
                    "share_30": {"name": "share", "threshold": 0.3, "measured": MEASURED, "outcome": "open", "why": ""},
                    "share_ablation": MEASURED,
                    "share_attention": NONE,
                }
            ],
            "shapes": [
                {
                    "name": "N=256 H=4 D=64 n=8",
                    "with_gather": {"value": 8.5, "low": 8, "high": 9, "n": 40},
                    "packed": NONE,
                    "error": {"value": 1e-4, "low": 9e-5, "high": 2e-4, "n": 3},
                }
            ],
            "notes": ["one note"],
        }
    ],
    "audits": [
        {"file": "v2.csv", "verdict": "NOT EVIDENCE", "findings": ["305% of the total"], "notes": [], "rows": []}
    ],
}


ANSWER_TEXT = json.dumps(ANSWER)


@pytest.fixture
def fake(tmp_path):
    """A program `nsa` that checks its arguments and prints ANSWER, or fails with a given code and message."""

    def make(answer=ANSWER_TEXT, code=0, error=""):
        path = tmp_path / "nsa"
        path.write_text(
            f"#!{sys.executable}\nimport sys\nassert sys.argv[1:3] == ['gate', '--json'] and len(sys.argv) > 3\n"
            f"sys.stdout.write({answer!r})\nsys.stderr.write({error!r})\nsys.exit({code})\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def test_tables_show_the_answer_of_the_program(fake):
    answer = nsa_analysis.call_gate(["a.h5"], fake())
    table = nsa_analysis.gate_table(answer).set_index("condition")
    assert table.outcome[["share", "share_30", "speedup", "speedup_packed", "error"]].tolist() == [
        "met",
        "open",
        "met",
        "open",
        "met",
    ]
    assert (table.value["speedup"], table.bound_low["speedup"], table.threshold["speedup"]) == (8.5, 8, 1.2)
    assert table.isna().value["speedup_packed"] and table["at"]["shape_error"] == "N=256 H=4 D=64 n=8"
    said = nsa_analysis.verdicts(answer)
    assert said.verdict.tolist() == ["PROCEED", "NOT EVIDENCE"] and "305%" in said.why[1]
    assert [p.title for p in plots.gate_panels(nsa_analysis.gate_table(answer))] == [
        "Test GPU: selection's share",
        "Test GPU: fused against packed SDPA",
        "Test GPU: error of fused",
    ]


def test_command(fake, tmp_path, capsys):
    assert main(["gate", "a.h5", "--nsa", fake(), "--figure", str(tmp_path / "gate.svg")]) == 0
    assert "PROCEED (all three are met)" in capsys.readouterr().out
    assert (tmp_path / "gate.svg").stat().st_size > 5000


@pytest.mark.parametrize(
    "program, said, code",
    [
        (
            {"answer": "", "code": 2, "error": "nsa: error: files differ (commit a, b); give one\n"},
            "files differ (commit a, b)",
            2,
        ),
        ({"answer": "", "code": 6, "error": "nsa: error: bad.h5: no result of nsa\n"}, "bad.h5", 6),
        ({"answer": "PROCEED\n"}, "no answer that this version can read", 2),
        ({"answer": "[1]"}, "no answer that this version can read", 2),
    ],
)
def test_failures_are_reported(fake, program, said, code, capsys):
    assert main(["gate", "a.h5", "--nsa", fake(**program)]) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_no_program(capsys):
    assert main(["gate", "a.h5", "--nsa", "/nowhere/nsa"]) == 2
    assert "/nowhere/nsa" in capsys.readouterr().err


@pytest.mark.skipif("NSA" not in os.environ, reason="NSA does not name the program")
def test_the_real_program_answers(tmp_path):
    """It decides on a decode run and refuses a file that it cannot read."""
    path = synthetic.sweep(tmp_path, layouts=[(1, 1)])[0]
    answer = gate.call_gate([path])
    assert nsa_analysis.verdicts(answer).device.tolist() == ["Test GPU"]
    assert len(nsa_analysis.gate_table(answer))
    (tmp_path / "bad.h5").write_bytes(b"")
    with pytest.raises(AnalysisError, match="bad.h5"):
        gate.call_gate([tmp_path / "bad.h5"])


def evidence(folder):
    """Two decode inputs and two kernels inputs of one program, and a decode input of another commit."""
    ablations = np.concatenate([synthetic.times(1, 8, 1e-4, attend_cmp=1e-5)] * 2)[:3]
    names = ["branches", "total", "ablation_sel"]
    for name, commit, parameters in (
        ("decode_a", "c0ffee", {}),
        ("decode_b", "c0ffee", {"model_n_heads": 64}),
        ("decode_old", "beef", {}),
    ):
        path = synthetic.write(folder / f"{name}.h5", [synthetic.point(ablations, **parameters)], commit=commit)
        with h5py.File(path, "r+") as file:
            del file["points/0000/mode"]
            synthetic.add_scale(file["points/0000"], "mode", names)
    for name, implementations in (("kernels_m4", "fused,sdpa"), ("kernels_rows", "fused,tiled,sdpa")):
        parameters = {"kernels_branch": "sel", "kernels_implementations": implementations}
        synthetic.write(folder / f"{name}.h5", [synthetic.kernel_point({"fused": 1e-6, "sdpa": 2e-6}, **parameters)])


PAIRS = [
    ["decode_a", "kernels_m4"],
    ["decode_a", "kernels_rows"],
    ["decode_b", "kernels_m4"],
    ["decode_b", "kernels_rows"],
    ["decode_old"],
]


def test_each_decode_input_is_paired_with_each_kernels_input_in_any_order(tmp_path):
    evidence(tmp_path)
    points = {f.stem: nsa_analysis.read(f) for f in tmp_path.iterdir()}
    for order in itertools.permutations(points):
        pairs = gate.paired_files([p for name in order for p in points[name]])
        assert [[pathlib.Path(f).stem for f in files] for files in pairs] == PAIRS, order


def test_committed_evidence_is_paired_by_rule():
    """m4_decode and m4_decode_64x128 each with m4_kernels and with sel_rows, in all orders."""
    names = ("m4_decode", "m4_decode_64x128", "m4_kernels", "sel_rows")
    points = {name: nsa_analysis.read(RESULTS / f"h100/{name}.h5") for name in names}  # of one commit
    for order in itertools.permutations(names):
        pairs = gate.paired_files([p for name in order for p in points[name]])
        assert [[pathlib.Path(f).stem for f in files] for files in pairs] == [
            [decode, kernels] for decode in names[:2] for kernels in names[2:]
        ]


def test_a_folder_is_decided_pair_by_pair(fake, tmp_path, capsys):
    folder = tmp_path / "results"
    folder.mkdir()
    evidence(folder)
    synthetic.sweep(folder, layouts=[(1, 1)])
    assert main(["gate", str(folder), "--nsa", fake()]) == 0
    said = capsys.readouterr()
    assert said.out.count("PROCEED (all three are met)") == len(PAIRS)
    assert "decode_a.h5" in said.out and "1 of 6 points are left out, no evidence for the gate" in said.err
    assert main(["gate", str(folder), "--nsa", fake(code=2, error="nsa: error: these differ\n")]) == 2
    assert "these differ" in capsys.readouterr().err
    for file in folder.glob("*_*.h5"):
        file.unlink()
    assert main(["gate", str(folder), "--nsa", fake()]) == 2
    assert "no evidence" in capsys.readouterr().err


def test_what_the_gate_refuses_has_a_reason(tmp_path):
    evidence(tmp_path)
    decisions = report_gate.gate_decisions(nsa_analysis.read(tmp_path), [], "/nowhere/nsa")
    assert len(decisions) == len(PAIRS) and all("cannot find the program" in d.reason for d in decisions)
