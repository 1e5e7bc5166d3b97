"""Files of several devices and commits: separate sections on the page, refused in one figure."""

import json
import os
import re
import stat
import sys

import h5py
import nsa_analysis
import pytest
import synthetic
from nsa_analysis.cli import main
from nsa_analysis.data import series
from nsa_analysis.figures import plots, style
from nsa_analysis.report import make_report, report_gate, report_head

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


def kernels(folder, name, seconds, device, commit, **parameters):
    parameters = {"kernels_branch": "sel", "kernels_rows": 256, "kernels_heads": 4, "kernels_head_size": 64,
                  "kernels_blocks": 8, "kernels_spans": "mixed"} | parameters  # fmt: skip
    return synthetic.write(folder / name, [synthetic.kernel_point(seconds, **parameters)], device=device, commit=commit)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """h200/ on up to 4 ranks, h100/ at a later commit on up to 2; kernels of one device at two commits."""
    tmp_path = tmp_path_factory.mktemp("results")
    for name in "h200", "h100":
        (tmp_path / name).mkdir()
    synthetic.sweep(tmp_path / "h200", contexts=(65536, 1048576), device=H200, commit="aaaa")
    layouts = [(1, 1), (2, 1), (1, 2)]
    synthetic.sweep(tmp_path / "h100", lambda p: 200e-6 / p, layouts, (65536, 1048576), device=H100, commit="bbbb")
    kernels(tmp_path / "h200", "old.h5", {"fused": 2e-6, "sdpa": 8e-6}, H200, "aaaa")
    kernels(tmp_path / "h200", "new.h5", {"sdpa": 8e-6, "fused": 1e-6}, H200, "cccc")
    return tmp_path


@pytest.fixture(scope="module")
def asked(results):
    return results.parent / "asked"


@pytest.fixture(scope="module")
def page(results, asked):
    """The report; its gate is decided by a program that refuses files of two commits, as the real one does, and logs
    its arguments."""
    path = results.parent / "nsa"
    path.write_text(f"""#!{sys.executable}
import json, sys
import h5py
commits = {{h5py.File(f, "r").attrs["git_commit"] for f in sys.argv[3:]}}
if len(commits) > 1:
    sys.exit("nsa: error: one verdict needs one program")
open({str(asked)!r}, "a").write(json.dumps(sys.argv[3:]) + "\\n")
print(json.dumps({{"devices": [{{"device": "{H200}", "git_commit": commits.pop(), "precision": "bf16",
                                 "verdict": "STAY", "why": "slow", "contexts": [], "shapes": []}}]}}))
""")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return make_report([results], str(path))


def test_each_has_its_section_and_none_shares_a_figure(page):
    sections = dict(re.findall(r'<details class="section" id="(s\d+)".*?<h2>(.*?)</h2>', page, flags=re.S))
    titles = list(sections.values())
    assert len(titles) == 2 and H100 in titles[0] and H200 in titles[1]
    for title, other in (H100, H200), (H200, H100):
        section = next(s for s in page.split('<details class="section"') if f"on {title}:" in s[:200])
        assert other not in section and f"--where &#x27;device={title}&#x27;" in section
    assert "they differ in device (NVIDIA H100 80GB HBM3, NVIDIA H200), git_commit (bbbb, aaaa)" in page


def test_the_first_screen_answers(page):
    """Of each device: the time on one rank, that of the fastest layout on the most, speedup and efficiency."""
    top = page[page.index('id="glance"') : page.index('class="section"')]
    rows = [re.sub(r"<[^>]+>", "|", row) for row in re.findall(r"<tr.*?</tr>", top)]
    cells = [[c for c in row.split("|") if c] for row in rows]
    assert [row[0] for row in cells[1:]] == [cells[1][0], "64K", "1M", cells[4][0], "64K", "1M"]
    # 200 us on one rank, 100 on two; 11 samples, a tenth of a percent apart, bound the median 0.4% to each side.
    assert cells[2][1:] == ["1", "200 µs", "2 (2×1)", "100 µs", "2.00", "[1.98, 2.02]", "100%", "0%"]
    # 110 us on one rank, 100/4 + 10 on four.
    assert cells[5][1:] == ["1", "110 µs", "4 (4×1)", "35.0 µs", "3.14", "[3.12, 3.17]", "79%", "0%"]


def test_invalid_points_count_for_nothing_at_a_glance(tmp_path):
    synthetic.sweep(tmp_path)
    wrong = synthetic.point(synthetic.times(4, 11, 1e-6), 4, 1, valid=False)
    synthetic.write(tmp_path / "h4k1.h5", [wrong])
    groups = report_head.in_order(series.split(nsa_analysis.read(tmp_path)))
    row = re.search(r"<tr[^>]*><td[^>]*>64K \(.*?</tr>", report_head.glance(groups))[0]
    assert "class=invalid" in row and "1 of 6 INVALID" in row and "1.00 µs" not in row and "4 (2×2)" in row


def test_the_gate_is_asked_for_each_commit_by_itself(page, asked):
    files = [[os.path.basename(f) for f in json.loads(line)] for line in asked.read_text().splitlines()]
    assert sorted(files) == [["new.h5"], ["old.h5"]]
    assert "Not decided" not in page
    for commit in "aaaa", "cccc":
        assert f"<h3>{H200}, bf16, commit {commit}: STAY</h3>" in page
        assert f"<b>STAY</b><span>ship a custom selection kernel? {H200}, commit {commit}</span>" in page


def test_what_the_gate_refuses_is_said_where_it_belongs(results):
    section = report_gate.gate_section(report_gate.gate_decisions(nsa_analysis.read(results), [], "/nowhere/nsa"))
    assert section.count("Not decided: cannot find the program /nowhere/nsa") == 2


def test_kernels_of_two_commits_share_no_panel_and_keep_their_colours(results):
    frame = nsa_analysis.kernels(nsa_analysis.read(results))
    assert frame.series.unique().tolist() == [f"{H200}, git_commit cccc", f"{H200}, git_commit aaaa"]
    panels = plots.kernel_panels(frame)
    assert [p.title for p in panels] == [f"{name}: sel, blocks mixed" for name in frame.series.unique()]
    colours = []
    for panel in panels:
        axes = style.render(panel).axes[0]
        colours.append({c.get_label(): c.lines[0].get_color() for c in axes.containers})
    assert colours[0] == colours[1] and set(colours[0]) == {"fused", "sdpa"}


def test_an_invalid_kernel_is_a_cross(tmp_path):
    path = kernels(tmp_path, "k.h5", {"fused": 1e-6}, H200, "aaaa")
    with h5py.File(path, "r+") as file:
        file["points/0000"].attrs["validity"] = "INVALID"
    (panel,) = plots.kernel_panels(nsa_analysis.kernels(nsa_analysis.read(path)))
    axes = style.render(panel).axes[0]
    assert not axes.containers and [line.get_label() for line in axes.lines] == ["INVALID"]


def test_the_latest_commit_of_a_device_comes_first(tmp_path):
    for commit, month in ("aaaa", 1), ("bbbb", 3), ("cccc", 2):
        (tmp_path / commit).mkdir()
        synthetic.sweep(tmp_path / commit, layouts=[(1, 1), (2, 1)], commit=commit, start=f"2026-0{month}-01T00:00:00Z")
    synthetic.sweep(tmp_path, layouts=[(1, 1)], commit="dddd", start="2026-04-01T00:00:00Z")  # alone: after the curves
    groups = report_head.in_order(series.split(nsa_analysis.read(tmp_path)))
    assert [g[0].run.attributes["git_commit"] for g in groups] == ["bbbb", "cccc", "aaaa", "dddd"]
    assert [t.rsplit(" ", 1)[1] for t in series.titles(groups)] == ["bbbb", "cccc", "aaaa", "dddd"]


@pytest.mark.parametrize("command", ["scaling", "branches", "reads", "ranks", "roofline", "model"])
def test_no_figure_of_two_devices(results, tmp_path, capsys, command):
    sweeps = [str(results / d / "h1k1.h5") for d in ("h100", "h200")]
    assert main([command, *sweeps, "--figure", str(tmp_path / "x.svg")]) == 2
    said = capsys.readouterr().err
    assert "cannot share" in said and f"{H100} ({sweeps[0]})" in said and f"{H200} ({sweeps[1]})" in said
    assert not (tmp_path / "x.svg").exists()
    one = ["--where", f"device={H200}", "--figure", str(tmp_path / "x.svg")]
    assert main([command, str(results / "h200"), "--where", "kind=decode", *one]) == 0


def test_many_differences_are_named_and_few_spelt_out(tmp_path, capsys):
    table = synthetic.times(1, 8, 1e-4)
    other = {"nsa_w": 256, "nsa_l": 16, "nsa_d": 8, "model_dim": 512, "run_scope": "layer", "task_kind": "prefill"}
    synthetic.write(tmp_path / "a.h5", [synthetic.point(table)])
    synthetic.write(tmp_path / "b.h5", [synthetic.point(table, **other)], device=H200)
    assert main(["scaling", str(tmp_path), "--figure", str(tmp_path / "s.svg")]) == 2
    said = capsys.readouterr().err
    assert "device Test GPU" in said and "task.kind decode" in said
    assert "and 3 more: nsa.w, run.scope, run.steps" in said
