"""The examples of the documents run unchanged and agree with the tables."""

import glob
import os
import pathlib
import re
import shlex

import nbclient
import nbformat
import pandas as pd
import pytest
import synthetic
from nsa_analysis import cli

ROOT = pathlib.Path(__file__).resolve().parents[3]
README = ROOT / "analysis/README.md"
BLOCKS = re.findall(r"```(python|jupyter)\n(.*?)```", README.read_text(), flags=re.S)


@pytest.fixture
def results(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    synthetic.sweep(tmp_path / "results", lambda p: 110e-6 * (0.25 + 0.75 / p))
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


def test_the_python_of_the_first_page(results):
    """README.md: medians of the quick start by stage and rank."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    code = re.sub(r"print\((.*)\)  ", r"\1  ", code)  # the last line as an expression
    (results / "results/h1k2.h5").rename(results / "quickstart.h5")
    *lines, last = code.strip().splitlines()
    names = {}
    exec("\n".join(lines), names)
    median = eval(last, names)
    whole = 110e-6 * (0.25 + 0.75 / 2) + 1e-6
    assert median.sel(stage="attend_sel").values.tolist() == pytest.approx([0.3 * whole] * 2)


def shell_lines():
    """Every nsa-analysis command line of the documents and of --help; test_gate.py tests that of the gate."""
    texts = [README.read_text(), (ROOT / "README.md").read_text(), (ROOT / "docs/results/README.md").read_text()]
    blocks = [block for text in texts for block in re.findall(r"```sh\n(.*?)```", text, flags=re.S)]
    lines = [line for block in [*blocks, cli.EXAMPLES] for line in block.splitlines()]
    commands = [re.split(r" #|   +", line.strip())[0] for line in lines if line.strip().startswith("nsa-analysis ")]
    return sorted({c for c in commands if " gate " not in c})


def test_command_lines_are_found():
    assert len(shell_lines()) >= 5


@pytest.mark.parametrize("line", shell_lines())
def test_command_lines(results, line):
    os.symlink(ROOT / "docs", results / "docs")
    os.symlink(results / "results/h1k2.h5", results / "quickstart.h5")
    for side in "before", "after":
        os.symlink(results / "results", results / side)
    words = [w for word in shlex.split(line)[1:] for w in (sorted(glob.glob(word)) if "*" in word else [word])]
    assert cli.main(words) == 0
    for option in "-o", "--figure", "--csv":
        if option in words:
            assert (results / words[words.index(option) + 1]).stat().st_size > 100
