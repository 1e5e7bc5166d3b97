"""The examples of analysis/README.md run as they stand, and give what the tables give."""

import pathlib
import re

import made_up
import nbclient
import nbformat
import pandas as pd
import pytest

README = pathlib.Path(__file__).resolve().parents[3] / "analysis/README.md"
BLOCKS = re.findall(r"```(python|jupyter)\n(.*?)```", README.read_text(), flags=re.S)


@pytest.fixture
def results(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    made_up.sweep(tmp_path / "results", lambda p: 110e-6 * (0.25 + 0.75 / p))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def example(word):
    kind, code = next((k, c) for k, c in BLOCKS if word in c)
    return code


def test_there_are_three():
    assert [kind for kind, _ in BLOCKS] == ["python", "python", "jupyter"]


def test_pandas(results, capsys):
    names = {}
    exec(example("pivot"), names)
    assert isinstance(names["frame"], pd.DataFrame)
    assert capsys.readouterr().out.split()[-3:] == ["1.0", "0.8", "0.571429"]


def test_xarray(results, capsys):
    names = {}
    exec(example("xarray"), names)
    assert "attend_sel    0.272727" in capsys.readouterr().out  # 0.3 of 0.5 + 0.2 + 0.3 + 0.1


def test_jupyter(results):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(example("plots"))])
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(results)}}
    ).execute()
    outputs = notebook.cells[0].outputs
    assert any("image/png" in o.get("data", {}) for o in outputs), outputs
