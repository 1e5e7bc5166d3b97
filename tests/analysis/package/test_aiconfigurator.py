"""`export --format aiconfigurator`: rows as AIConfigurator's perf database has them, and what cannot be said there."""

import nsa_analysis
import pandas as pd
import pytest
import synthetic
from nsa_analysis.cli import main
from nsa_analysis.data import aiconfigurator
from nsa_analysis.errors import AnalysisError, LeftOut

# Columns and their order in AIConfigurator 0.12: generation_attention_perf, msa_generation_module_perf.
ATTENTION = """framework version device op_name kernel_source batch_size isl num_heads num_key_value_heads head_dim
window_size beam_width attn_dtype kv_cache_dtype step latency""".split()
MODULE = """framework version device op_name kernel_source model architecture mla_dtype kv_cache_dtype gemm_type
num_heads batch_size isl tp_size step latency""".split()


def points(folder, *layouts, **parameters):
    made = [synthetic.point(synthetic.times(h * k, 9, 2e-4), h, k, **parameters) for h, k in layouts]
    return nsa_analysis.read(synthetic.write(folder / "a.h5", made))


def test_decode_of_attention_alone(tmp_path):
    """Two head shards of 8 heads in 4 groups: 4 heads in 2 groups a rank; 65,536 + 16 tokens; ms a layer."""
    tables = aiconfigurator.tables(points(tmp_path, (2, 1), model_layers=2, run_batch=3))
    assert list(tables) == ["attention"] and list(tables["attention"]) == ["generation_attention_perf"]
    (row,) = tables["attention"]["generation_attention_perf"].to_dict("records")
    assert set(row) == set(ATTENTION)
    assert (row["op_name"], row["num_heads"], row["num_key_value_heads"], row["head_dim"]) == (
        "generation_attention", 4, 2, 64)  # fmt: skip
    assert (row["isl"], row["step"], row["batch_size"], row["kv_cache_dtype"]) == (1, 65536 + 15, 3, "bfloat16")
    assert row["latency"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("kind", "name", "isl", "step"), [("decode", "generation", 1, 65536 + 15), ("prefill", "context", 65536, 0)]
)
def test_a_whole_layer_is_a_module(tmp_path, kind, name, isl, step):
    members = points(tmp_path, (4, 1), run_scope="layer", task_kind=kind)
    tables = aiconfigurator.tables(members)
    (row,) = tables["msa"][f"msa_{name}_module_perf"].to_dict("records")
    assert set(row) == set(MODULE)
    assert (row["num_heads"], row["tp_size"], row["isl"], row["step"]) == (2, 4, isl, step)
    assert row["latency"] == pytest.approx(0.2)


def test_a_prefill_says_what_came_before_it(tmp_path):
    tables = aiconfigurator.tables(points(tmp_path, (1, 1), task_kind="prefill", run_prefix=57344))
    (row,) = tables["attention"]["context_attention_perf"].to_dict("records")
    assert (row["isl"], row["step"]) == (65536, 57344)


def test_what_the_format_cannot_say_is_left_out(tmp_path):
    members = points(tmp_path, (1, 1), (1, 2))
    with pytest.warns(LeftOut, match="1 of 2 points are left out, ranks share their sequences"):
        tables = aiconfigurator.tables(members)
    assert len(tables["attention"]["generation_attention_perf"]) == 1
    (tmp_path / "given").mkdir()
    with pytest.raises(AnalysisError, match="blocks are given"):
        aiconfigurator.tables(points(tmp_path / "given", (1, 1), input_selection="blocks.h5"))
    (tmp_path / "fp32").mkdir()
    with pytest.raises(AnalysisError, match="fp32, which the format does not know"):
        aiconfigurator.tables(points(tmp_path / "fp32", (1, 1), model_precision="fp32"))


def test_the_folder_that_is_written(tmp_path, capsys):
    """Parquet where pyarrow is, else the text that AIConfigurator's collector converts; beside it the sidecar."""
    points(tmp_path, (1, 1))
    folder = tmp_path / "perf"
    assert main(["export", str(tmp_path / "a.h5"), "--format", "aiconfigurator", "-o", str(folder)]) == 0
    (table,) = (folder / "attention").glob("generation_attention_perf.*")
    frame = pd.read_parquet(table) if table.suffix == ".parquet" else pd.read_csv(table)
    assert len(frame) == 1 and frame.latency[0] == pytest.approx(0.2)
    meta = (folder / "attention/collection_meta.yaml").read_text()
    assert meta.startswith("schema_version: 1\nprovenance: collected\nruntime:\n  framework: nsa\n")
    assert meta.endswith("tables:\n  generation_attention_perf:\n    status: complete\n")
    assert main(["export", str(tmp_path / "a.h5"), "--format", "aiconfigurator"]) == 2
    assert "give -o FOLDER" in capsys.readouterr().err
