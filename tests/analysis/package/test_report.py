"""The page: its content, the commands it shows, and that a browser renders it without errors or horizontal scrolling,
on a desktop and on a phone, light and dark."""

import html.parser
import json
import pathlib
import re
import shlex
import shutil
import subprocess

import h5py
import pytest
import synthetic
from nsa_analysis.cli import main
from nsa_analysis.data.reading import find_files
from nsa_analysis.report import make_report

ROOT = pathlib.Path(__file__).resolve().parents[3]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Parser(html.parser.HTMLParser):
    """Ids, addresses, open elements."""

    VOID = {"meta", "link", "br", "img", "hr", "input"}

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href", "action"):
                self.addresses.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two contexts on six layouts, one INVALID point, one straggler, a second device: all sections of a page."""
    folder = tmp_path_factory.mktemp("sweep")
    synthetic.sweep(folder, contexts=(65536, 1048576))
    slow = synthetic.times(4, 11, 50e-6, attend_cmp=20e-6, rank=9e-6, attend_sel=9e-6, comm=5e-6)
    slow[0, synthetic.STAGES.index("attend_cmp"), 2] *= 2
    synthetic.write(
        folder / "h2k2.h5",
        [synthetic.point(slow, 2, 2), synthetic.point(slow * 3, 2, 2, valid=False, run_context=1048576)],
        status="running",
    )
    synthetic.sweep(folder / "..", layouts=[(1, 1)], device="Other <GPU> & co")
    shutil.move(folder / "../h1k1.h5", folder / "other.h5")
    return folder


@pytest.fixture(scope="module")
def page(sweep):
    return make_report([sweep])


def test_is_well_formed_and_self_contained(page):
    parser = Parser(page)
    assert parser.open == [] and len(parser.ids) == len(set(parser.ids))
    assert all(a.startswith(("#", "data:")) for a in parser.addresses), parser.addresses
    assert {a[1:] for a in parser.addresses if a.startswith("#")} <= set(parser.ids)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "Other &lt;GPU&gt; &amp; co" in page and "<GPU>" not in page


def test_series_have_distinct_names(tmp_path):
    points = [synthetic.point(synthetic.times(1, 8, 1e-4, attend_cmp=1e-5), nsa_w=w) for w in (512, 256)]
    page = make_report([synthetic.write(tmp_path / "two.h5", points)])
    assert "H=8 G=4 D=64/64 bf16, attention, nsa.w 512</h2>" in page and "attention, nsa.w 256</h2>" in page
    assert "--where nsa.w=256" in page


def test_warnings_come_first(page):
    top = page[: page.index('id="runs"')]
    assert "h2k2.h5, point 1 (context 1M, batch 1, 2x2) is INVALID: test reason" in top
    assert "status running" in top and "2 series that share no curve: they differ in device" in top
    assert "12 of 13" in top


def test_every_figure_has_axes_with_units_and_a_legend(page):
    figures = re.findall(r"<figure.*?</figure>", page, flags=re.S)
    assert len(figures) > 10
    for figure in figures:
        texts = re.findall(r"<text[^>]*>([^<]+)</text>", figure)
        title = re.search('aria-label="([^"]+)"', figure).group(1)
        assert any(re.search(r"^(ranks|stage|rank|cause)$|\(.+\)$|heads × kv", t) for t in texts), (title, texts)
        assert (
            sum(
                bool(re.search(r"\((µs|ms|s|%|times|tokens|1|%.*)\)|^(ranks|stage|rank|cause)$|heads × kv", t))
                for t in texts
            )
            >= 2
        ), (title, texts)
        assert 'id="' in figure and ("legend" in figure or "image" in figure), title
        assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'base64,[^"]*', "", figure).replace("fill: #ffffff", "")), title


def test_invalid_and_predicted_are_marked(page):
    assert "<tr class=invalid>" in page
    assert page.count('class="predicted"') == page.count('class="predicted-part"') > 0
    measured = re.sub(r'<div class="predicted-part">.*?</table>', "", page, flags=re.S)
    assert "PREDICTED" not in measured


def test_the_commands_of_the_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [html.unescape(c) for c in re.findall(r'<pre class="command"[^>]*><code>(.*?)</code>', page, flags=re.S)]
    verbs = [shlex.split(c)[1] for c in commands]
    assert {"report", "scaling", "branches", "ranks", "roofline", "model", "points"} <= set(verbs)
    for command in commands:
        words = shlex.split(command)
        if words[1] == "report":  # made the page; test_examples.py runs the command
            assert words[0] == "nsa-analysis" and words[-2:] == ["-o", "report.html"] and find_files(words[2:-2])
            continue
        assert words[0] == "nsa-analysis" and main(words[1:]) == 0, command
        assert (tmp_path / words[-1]).stat().st_size > 500


def test_the_page_names_the_command_that_made_it(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["report", str(sweep / "h1k1.h5"), "-o", "my page.html", "--title", "A title", "--node", "4"]
    assert main([*words, "--latency", "2.5"]) == 0
    text = (tmp_path / "my page.html").read_text()
    command = html.unescape(re.search(r'<pre class="command"[^>]*><code>(.*?)</code>', text, flags=re.S)[1])
    assert shlex.split(command) == ["nsa-analysis", *words[:-2], "--latency", "2.5", "--node", "4"]


def test_a_straggler_has_a_card(page):
    (card,) = re.findall(r'<div class="card"><b>rank 2: 2.00×</b><span>(.*?)</span>', page)
    assert card == "straggler of 2×2 on node, context 64K: attend_cmp 2.00x"


def test_one_run_on_shared_cores_has_a_table_at_a_glance(tmp_path):
    """As the quick start on two cores: no speedup, and yet times in every row."""
    table = synthetic.times(4, 11, 50e-6, attend_sel=1e-5, comm=3e-5)
    path = synthetic.write(tmp_path / "q.h5", [synthetic.point(table, 2, 2)])
    with h5py.File(path, "r+") as file:
        file.attrs["backend"] = "host"
        for name, value in (("threads", 1), ("cores", 2), ("sharers", 4)):
            synthetic.add_dataset(file["system"], name, [value] * 4, ["rank"])
    page = make_report([path])
    top = page[page.index('id="glance"') : page.index('class="section"')]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", top)
    assert cells == ["64K, shared cores", "4 (2×2)", "50.0 µs", "[50.0, 50.0] µs", "25%", "75%"]


@pytest.fixture(scope="module")
def committed():
    return make_report([ROOT / "docs/results"])


def test_a_page_of_committed_results(committed):
    assert "NVIDIA H200" in committed and committed.count("<svg") > 80
    assert committed.count('<details class="section"') > 15 and '<details class="section" id="s0" open' not in committed


# The page in a frame of the screen's width. A script checks it and writes the result into the title of the outer page.
PROBE = """<!doctype html><title>none</title><iframe id=f style="border:0;width:%dpx;height:800px"></iframe><script>
const errors = []; const frame = document.getElementById("f");
frame.onload = () => { const page = frame.contentDocument, root = page.documentElement,
    height = root.scrollHeight;
  frame.contentWindow.dispatchEvent(new Event("beforeprint"));
  const wide = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, svg") &&
    e.getBoundingClientRect().right > %d + 1).map(e => e.tagName + "." + e.className);
  const spilt = [...page.querySelectorAll(".card *, h1, h2, h3, p, li")].filter(e =>
    e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(e => e.textContent);
  const small = [...page.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().width < 250).length;
  document.title = "probe " + JSON.stringify({scroll: root.scrollWidth, wide, spilt, small, errors,
    figures: page.querySelectorAll("svg").length, folded: page.querySelectorAll("details:not([open])").length,
    height, background: frame.contentWindow.getComputedStyle(page.body).backgroundColor}); };
frame.srcdoc = %s;
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; on Debian install chromium")
@pytest.mark.parametrize("width, dark", [(1280, False), (1280, True), (390, False), (390, True)])
def test_in_a_browser(page, tmp_path, width, dark):
    seen = probe(page, tmp_path, width, dark)
    assert seen["small"] == 0 and seen["figures"] > 10 and seen["folded"] == 0, seen
    assert (sum(map(int, re.findall(r"\d+", seen["background"]))) < 200) == dark, seen


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; on Debian install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_of_many_series_is_short_until_it_is_unfolded(committed, tmp_path, width):
    assert probe(committed, tmp_path, width, False)["height"] <= 8000


def probe(page, tmp_path, width, dark):
    """What PROBE sees in a window of this width. No error, and nothing wider than the window."""
    caught = page.replace(
        "<head>", "<head><script>addEventListener('error', e => parent.eval('errors').push(e.message))</script>", 1
    )
    outer = tmp_path / "probe.html"
    outer.write_text(PROBE % (width, width, json.dumps(caught).replace("</", "<\\/")))
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width + 200},1000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            "--dump-dom",
            outer.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r"<title>probe (\{.*?\})</title>", done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(html.unescape(found.group(1)))
    assert seen["errors"] == [] and "CONSOLE" not in done.stderr, done.stderr[-2000:]
    assert seen["wide"] == seen["spilt"] == [] and seen["scroll"] <= width, seen
    return seen
