"""Machine files: the program predicts from one what the fitted model predicts; a file made here is one it reads."""

import json
import os
import pathlib
import subprocess
import types

import nsa_analysis
import pytest
import synthetic
from nsa_analysis.errors import FileError
from nsa_analysis.models import cost_model, machine, traffic

ROOT = pathlib.Path(__file__).resolve().parents[3]
INPUT = """[task]
kind = "{kind}"
[model]
dim = 256
n_heads = 8
n_kv_groups = 4
d_k = 64
d_v = 64
layers = 3
precision = "bf16"
[nsa]
phi = "mlp"
[run]
context = [300, 65536, 100000]
batch = [2]
steps = 32
scope = "layer"
check = false
[parallel]
kv_chunk_blocks = 16
"""


@pytest.mark.skipif("NSA" not in os.environ, reason="NSA does not name the program")
@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_program_predicts_the_same_times(tmp_path, kind, fused):
    """Every layout of 16 ranks on nodes of 4: bytes, FLOPs, scored blocks and exchanges, within and between nodes."""
    network = nsa_analysis.Network("a network", latency=10e-6, bandwidth=1e9, node=4)
    phase = machine.Phase((3e-6, 1e-12, 1e-14, 2e-9), (4e-6, 2e-6, 1e-10), fused, (0.05,), 4, "here", {})
    plans = frozenset({"fused" if fused else "staged"})
    model = cost_model.CostModel({}, phase.comm, phase.step, phase.comm, plans, (1,))
    (tmp_path / "m.toml").write_text(
        'name = "m"\nbackend = "host"\nmemory = 1e12\nnode = 4\n' + phase.text(kind) + machine.network_text(network)
    )
    (tmp_path / "in.toml").write_text(INPUT.format(kind=kind))
    command = [os.environ["NSA"], *"run in.toml --dry-run --ranks 16 --advise m.toml --json p.json".split()]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    advice = json.loads((tmp_path / "p.json").read_text())["advice"]
    compared = 0
    for point in advice["points"]:
        times = [layout["seconds"] for layout in point["layouts"]]
        assert times == sorted(times) and len(times) == 3
        for layout in point["layouts"]:
            parameters = synthetic.PARAMETERS | {
                "task.kind": kind, "model.layers": 3, "nsa.phi": "mlp", "run.scope": "layer", "run.batch": 2,
                "run.context": point["context"], "heads": layout["heads"], "kv": layout["kv"],
            }  # fmt: skip
            shape = traffic.shape_of(types.SimpleNamespace(kind=kind, parameters=parameters))
            predicted = model.predict(shape, network)["step"]
            assert layout["seconds"] == pytest.approx(predicted, rel=1e-6)
            compared += 1
    assert compared == 9


@pytest.mark.skipif("NSA" not in os.environ, reason="NSA does not name the program")
def test_a_machine_file_from_results(tmp_path):
    """`nsa-analysis model --machine` on two H200s; the program reads it and says the error of held-out layouts."""
    files = [str(f) for f in sorted((ROOT / "docs/results/h200").glob("scaling_gpu_decode_r[12]*.h5"))]
    points = nsa_analysis.read(files)
    text = machine.machine_text(points, nsa_analysis.Network())
    assert "\n[gpu]  # whose workspace is planned\ncapability = 90\nsms = 132\n" in text
    path = tmp_path / "h200.toml"
    machine.write_machine(path, text)
    machine.write_machine(path, text)  # its own file may be replaced
    errors = cost_model.held_out(cost_model.usable(points)).query("stage == 'step'").error.abs()
    path_of_input = str(ROOT / "inputs/scaling/scaling_gpu_decode.toml")
    command = [os.environ["NSA"], "run", path_of_input, "--dry-run", "--ranks", "2"]
    said = subprocess.run([*command, "--advise", str(path)], capture_output=True, text=True, check=True).stdout
    assert f"{100 * errors.median():.0f}% in the median and {100 * errors.max():.0f}% at worst" in said
    # One launch and the exchange against half of the heads: 2 x 1 is the fastest, as it was measured.
    fastest = [line.split()[:3] for line in said.splitlines() if "the fastest:" in line]
    assert f"compute capability 9.0, 132 SMs ({path})" in said
    assert fastest == [["2", "x", "1"]] * 2


def test_what_is_no_machine_file_is_not_replaced(tmp_path):
    path = tmp_path / "in.toml"
    path.write_text("[task]\n")
    with pytest.raises(FileError, match="no machine file"):
        machine.write_machine(path, "# x")
    assert path.read_text() == "[task]\n"


def test_a_sharded_step_in_one_launch_is_fused():
    """Its bytes are those of a fused step: the raw scores of 23 of 32 numbers are not stored."""
    from nsa_analysis.models.roofline import plan_of

    point = types.SimpleNamespace(kind="decode", get=lambda name: ["sharded_step", "sharded_step", "sharded_step"])
    assert plan_of(point) == "fused"
