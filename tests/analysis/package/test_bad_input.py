"""Bad files and options: one message that names the file, the exit code, no traceback."""

import json
import os
import pathlib
import random
import shlex
import subprocess
import sys
import types

import h5py
import numpy as np
import pytest
import synthetic
from nsa_analysis.cli import main
from nsa_analysis.data import hdf5

COMMANDS = ["points", "scaling", "branches", "reads", "ranks", "roofline", "model", "report"]


@pytest.fixture
def run(capsys):
    """Runs the command line in this process: exit code and output. An exception fails the test."""

    def call(*arguments):
        code = main([str(a) for a in arguments])
        said = capsys.readouterr()
        return types.SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return call


@pytest.fixture
def refused(run):
    def check(path, said, code=6, command="report"):
        done = run(command, path, *(["-o", "/dev/null"] if command == "report" else []))
        assert done.returncode == code, done.stderr
        assert done.stderr.startswith("nsa-analysis: error: ") and done.stderr.count("\n") == 1, done.stderr
        assert str(path) in done.stderr and said in done.stderr, done.stderr
        assert done.stdout == ""

    return check


def test_as_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nsa_analysis", "points", tmp_path / "none.h5"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (
        6,
        "",
        1,
    ) and "none.h5: no such file" in done.stderr


@pytest.fixture
def good(tmp_path):
    return synthetic.write(tmp_path / "good.h5", [synthetic.point(synthetic.times(2, 8, 1e-4, attend_cmp=1e-5), 2)])


@pytest.fixture
def sweep_of_two(tmp_path):
    return synthetic.sweep(tmp_path, layouts=[(1, 1), (2, 1)])


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.99])
def test_truncated(refused, good, tmp_path, kept):
    data = good.read_bytes()
    cut = tmp_path / "cut.h5"
    cut.write_bytes(data[: int(kept * len(data)) if 0 < kept < 1 else kept])
    refused(cut, "cannot be read as HDF5")


def test_missing(refused, tmp_path):
    refused(tmp_path / "none.h5", "no such file")


def test_other_kinds_of_file(refused, tmp_path):
    text = tmp_path / "text.h5"
    text.write_text("a,b\n1,2\n")
    refused(text, "cannot be read as HDF5")
    foreign = tmp_path / "foreign.h5"
    with h5py.File(foreign, "w") as file:
        file["x"] = np.zeros(3)
    refused(foreign, "not a result of nsa")


def test_unknown_schema(refused, run, tmp_path):
    point = synthetic.point(synthetic.times(1, 8, 1e-4))
    refused(synthetic.write(tmp_path / "later.h5", [point], schema="2.0"), "schema 2.0 (this version reads 1.x)")
    assert run("points", synthetic.write(tmp_path / "minor.h5", [point], schema="1.9")).returncode == 0


def test_empty_sweep(refused, tmp_path):
    refused(synthetic.write(tmp_path / "empty.h5", [], status="running"), "has no point (status running)")


def test_a_folder_without_results(refused, tmp_path):
    refused(tmp_path, "no .h5 file", code=2)


@pytest.mark.parametrize(
    "broken, said",
    [
        (lambda p: p.attrs.__delitem__("heads"), "'heads'"),
        (lambda p: p.attrs.__setitem__("kv", "two"), "'kv'"),
        (lambda p: p.attrs.__setitem__("kv", 7), "times of 2 ranks"),
        (lambda p: p.attrs.__setitem__("warmup_reps", 99), "warmup_reps"),
        (lambda p: p.__delitem__("stage"), "stage"),
        (lambda p: p["time"].__setitem__((0, 3), -1.0), "negative or infinite samples"),
        (
            lambda p: (
                p.__delitem__("time"),
                p.create_dataset("time", shape=(2, 11, 2**30, 2**20), dtype="f8", chunks=(1, 1, 1, 1)),
            ),
            "larger than its file",
        ),
        (lambda p: (p.__delitem__("time"), p.create_dataset("time", data=np.zeros(3))), "1 dimensions"),
        (lambda p: (p.__delitem__("reads"), p.create_dataset("reads", data="none")), "'reads' is not numeric"),
        (lambda p: (p.__delitem__("time"), p.__setitem__("time", h5py.SoftLink("/gone"))), "'time'"),
    ],
)
def test_broken_points(refused, good, broken, said):
    with h5py.File(good, "r+") as file:
        broken(file["points/0000"])
    refused(good, said)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses(refused, tmp_path, command):
    bad = tmp_path / "bad.h5"
    bad.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(1000))
    refused(bad, "cannot be read as HDF5", command=command)


def test_mixed_good_and_bad(run, good, tmp_path):
    bad = tmp_path / "bad.h5"
    bad.write_bytes(b"")
    done = run("points", good, bad)
    assert done.returncode == 6 and str(bad) in done.stderr and "good.h5" not in done.stderr


@pytest.mark.parametrize("command", [*COMMANDS, "linearity", "kernels", "gate", "compare", "export"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and "--" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, said",
    [
        (["--figure", "x.bmp"], "x.bmp"),
        (["--where", "context"], "no '='"),
        (["--figure", "/nowhere/x.svg"], "/nowhere/x.svg"),
        (["--csv", "/nowhere/x.csv"], "/nowhere"),
    ],
)
def test_bad_options(run, tmp_path, options, said):
    done = run("scaling", *synthetic.sweep(tmp_path, layouts=[(1, 1), (2, 1)]), *options)
    assert done.returncode in (2, 6) and said in done.stderr


@pytest.mark.parametrize(
    "options, said",
    [
        (["--csv", "./good.h5"], "cannot write ./good.h5 (it is an input)"),
        (["--json", "link"], "cannot write link (it is an input)"),
        (["--figure", "other.svg"], "cannot write other.svg (it is an HDF5 file)"),
        (["--csv", "x", "--json", "./x"], "--csv and --json name one file (x)"),
        (["--csv", ""], "--csv is empty"),
    ],
)
def test_an_output_replaces_nothing(run, tmp_path, good, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.svg").write_bytes(good.read_bytes())
    (tmp_path / "link").symlink_to("good.h5")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = run("scaling", "good.h5", *options)
    assert done.returncode == 6 and said in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "options, said",
    [
        (["--cs", "x.csv"], "unrecognized arguments: --cs"),
        (["--csv", "x.csv", "--csv", "y.csv"], "--csv: given twice"),
    ],
)
def test_options_are_whole_and_given_once(run, good, options, said, capsys):
    with pytest.raises(SystemExit) as ended:
        run("points", good, *options)
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert run("points", good, "--where", "run.batch=1", "--where", "layout=1x2").returncode in (0, 2)


@pytest.mark.parametrize("command", [["points"], ["points", "good.h5"], ["compare", "good.h5"]])
def test_empty_names_are_no_folder(run, good, monkeypatch, command):
    monkeypatch.chdir(good.parent)
    done = run(*command, "")
    assert done.returncode == 6 and "a name of FILES is empty" in done.stderr


def test_only_tables_go_to_standard_output(run, good, monkeypatch):
    monkeypatch.chdir(good.parent)
    for command in (["report", "good.h5", "-o", "-"], ["ranks", "good.h5", "--figure", "-"]):
        done = run(*command)
        assert done.returncode == 6 and " - (no standard output here)" in done.stderr
    assert run("points", "good.h5", "--csv", "-").stdout.startswith("file,point,")
    assert [path.name for path in good.parent.iterdir()] == ["good.h5"]


def test_what_is_no_plain_file_is_not_waited_for(refused, tmp_path):
    os.mkfifo(tmp_path / "pipe.h5")
    refused(tmp_path / "pipe.h5", "not a plain file")


def test_hidden_files_of_a_folder_are_left_out(run, good):
    (good.parent / "._good.h5").write_bytes(b"\x00\x05\x16\x07")  # macOS makes them on other file systems
    assert run("points", good.parent).returncode == 0


def test_names_and_terminals_of_other_encodings(good):
    name = os.fsencode(good.parent) + b"/\xff.h5"
    os.rename(good, name)
    program = [sys.executable, "-m", "nsa_analysis"]
    for command in (["points"], ["points", "--csv", "p.csv"], ["export", "-o", "e.csv"], ["report", "-o", "r.html"]):
        done = subprocess.run([*program, command[0], name, *command[1:]], cwd=good.parent, capture_output=True,
                              env=os.environ | {"PYTHONIOENCODING": "ascii"})  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b""), command
    for file in ("p.csv", "e.csv", "r.html"):
        assert "?.h5" in (good.parent / file).read_text("utf-8")
    closed = f"{shlex.join(program)} points *.h5 --csv again.csv >&-"
    assert subprocess.run(["bash", "-c", closed], cwd=good.parent).returncode == 0
    assert (good.parent / "again.csv").exists()


def test_a_text_that_cannot_be_written_leaves_the_earlier_one(good):
    folder, program = good.parent, f"ulimit -f 0; {shlex.join([sys.executable, '-m', 'nsa_analysis'])}"
    (folder / "old").write_text("earlier")
    for command in ("points good.h5 --csv old", "points good.h5 --json old", "export good.h5 --csv old"):
        done = subprocess.run(["bash", "-c", f"{program} {command}"], cwd=folder, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (6, ""), done.stderr
        assert done.stderr.startswith("nsa-analysis: error: old: File too large;")
        assert (folder / "old").read_text() == "earlier" and len(list(folder.iterdir())) == 2


def test_settings_of_matplotlib_change_no_figure(sweep_of_two):
    """A matplotlibrc of the current folder, whose LaTeX may not even be installed."""
    program = [sys.executable, "-m", "nsa_analysis", "scaling", *sweep_of_two, "--figure"]
    folder = pathlib.Path(sweep_of_two[0]).parent
    subprocess.run([*program, "plain.svg"], cwd=folder, check=True, capture_output=True)
    (folder / "matplotlibrc").write_text("text.usetex: True\nlines.linewidth: 9\naxes.facecolor: red\n")
    subprocess.run([*program, "again.svg"], cwd=folder, check=True, capture_output=True)
    assert (folder / "again.svg").read_bytes() == (folder / "plain.svg").read_bytes()


def test_groups_of_other_programs_are_left_out(run, good):
    with h5py.File(good, "r+") as file:
        file["points"].create_group("notes")
    assert run("points", good).returncode == 0


def test_a_run_that_was_never_timed(run, tmp_path, good):
    with h5py.File(good, "r+") as file:
        del file["points/0000/time"]
    done = run("scaling", good)
    assert done.returncode == 2 and "was timed" in done.stderr
    assert run("report", good, "-o", tmp_path / "r.html").returncode == 0


@pytest.mark.parametrize(
    "lacking", [["reads"], ["bytes"], ["memory_peak"], ["reads", "bytes", "reads_nsa_vibe", "memory_peak"]]
)
def test_tables_that_a_task_does_not_fill(run, good, tmp_path, lacking):
    with h5py.File(good, "r+") as file:
        for name in lacking:
            del file["points/0000"][name]
    for command in COMMANDS[:-1]:
        assert run(command, good).returncode in (0, 2), command
    assert run("report", good, "-o", tmp_path / "r.html").returncode == 0


def test_times_of_zero(run, tmp_path):
    """As a clock that is too coarse gives: a table or one message, no traceback."""
    folder = tmp_path / "zero"
    folder.mkdir()
    for heads, kv in ((1, 1), (2, 1), (1, 2)):
        zeros = synthetic.times(heads * kv, 11, 0.0, attend_cmp=0.0, comm=0.0, step=0.0)
        points = [synthetic.point(zeros, heads, kv, run_context=context) for context in (1024, 65536)]
        synthetic.write(folder / f"h{heads}k{kv}.h5", points)
    for command in [*COMMANDS[:-1], "linearity", "export"]:
        done = run(command, folder)
        assert done.returncode in (0, 2), command
        done = run(command, folder, "--json", "-")
        for line in done.stdout.splitlines():
            json.loads(line, parse_constant=pytest.fail)
    for command in "scaling", "branches", "reads", "roofline":
        assert run(command, folder, "--figure", tmp_path / "x.svg").returncode in (0, 2), command
    assert "no times above 0" in run("compare", folder, folder).stderr
    assert run("report", folder, "-o", tmp_path / "r.html").returncode == 0


def test_mutated_files_are_read_or_refused(good, tmp_path, run):
    """Random changes of the first bytes, which hold HDF5's own structures."""
    random_ = random.Random(5)
    data, changed = good.read_bytes(), tmp_path / "changed.h5"
    for _ in range(100):
        mutant = bytearray(data)
        for _ in range(random_.choice((1, 4, 30))):
            mutant[random_.randrange(8000)] = random_.randrange(256)
        changed.write_bytes(mutant)
        assert run("scaling", changed, "--csv", "-").returncode in (0, 2, 6)


def test_attributes_of_other_types_in_each_point(tmp_path):
    """What is known of the attributes of one point says nothing wrong about another."""
    values = [3, 2.5, "three", np.array([3, 4]), np.bytes_(b"sixteen bytes 16"), np.float32(0.5)]
    values += [np.array(["a", "b"], dtype=h5py.string_dtype()), h5py.Empty("f8"), True, np.int64(-1), "", 7]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for i, value in enumerate(values):
            file.create_group(str(i)).attrs["value"] = value
    shapes = {}
    with h5py.File(tmp_path / "a.h5") as file:
        found = [hdf5.attributes_of(file[str(i)], shapes)["value"] for i in range(len(values))]
        again = [hdf5.attributes_of(file[str(i)], shapes)["value"] for i in range(len(values))]
        alone = [hdf5.attributes_of(file[str(i)])["value"] for i in range(len(values))]
    assert list(map(repr, found)) == list(map(repr, again)) == list(map(repr, alone))
    assert alone[:5] == [3, 2.5, "three", [3, 4], "sixteen bytes 16"] and alone[-1] == 7
