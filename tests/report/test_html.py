"""report.html: what it says and draws, that it needs no network, and how it is kept up to date while runs go on."""

import json
import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import yaml

from abn_exp.report import build
from abn_exp.report.build import build_report, page_of, update_page
from abn_exp.report.html import html_page
from abn_exp.report.interactive import ForestRow, forest, spread_ratios
from tests.helpers.records import BN, CLEARLY_ABOVE, finish_run, start_run, study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study(tmp_path_factory.mktemp("study") / "claims", {"bn": BN, "abn": CLEARLY_ABOVE})


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return html_page(build_report(folder))


def figures(page: str) -> list[dict]:
    (text,) = re.findall(r"^const FIGURES = (.*);$", page, re.MULTILINE)
    return json.loads(text)


def test_the_answer_stands_on_top(page: str, folder: Path) -> None:
    body = page[page.index("<main>") :]
    answer = re.findall(r'<p class="answer">(.*?)</p>', body)
    assert answer == [build_report(folder).answer()[0]]
    assert body.index('class="answer"') < body.index("<section>")


def test_figures_hold_every_seed_and_the_zone_of_delta(page: str) -> None:
    forest, curves, seeds, slopes, *_ = figures(page)
    zone = next(shape for shape in forest["layout"]["shapes"] if shape["type"] == "rect")
    assert (zone["x0"], zone["x1"]) == (-0.5, 0.5)
    abn = next(trace for trace in seeds["data"] if trace["meta"] == "abn" and "customdata" in trace)
    assert abn["x"] == pytest.approx([100 * score for score in CLEARLY_ABOVE])
    assert abn["customdata"] == [0, 1, 2, 3, 4]
    assert "shaded: less than delta, 0.5 points</h2>" in page
    assert "the mean of finished ones; band: ±1 standard deviation</h2>" in page
    hover = [trace["hovertemplate"] for trace in curves["data"] if "hovertemplate" in trace]
    assert {f"abn, seed {seed}<br>epoch %{{x}}: %{{y:.2f}} %<extra></extra>" for seed in range(5)} <= set(hover)
    (pairs,) = slopes["data"]
    assert pairs["y"][:2] == pytest.approx([70.0, 70.8])
    assert pairs["y"][2] is None


def test_every_panel_has_a_title_and_no_place_is_left_empty(tmp_path: Path) -> None:
    """On a phone the page puts panels below each other, and takes the titles in their order."""
    for model in ("binarynet", "vgg_small", "resnet18"):
        study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE}, model=model)
    for figure in figures(html_page(build_report(tmp_path)))[1:4]:
        axes = [key for key in figure["layout"] if key.startswith("xaxis")]
        titles = [note for note in figure["layout"]["annotations"] if not note["showarrow"]]
        assert len(axes) == len(titles) == 3


def test_norms_that_share_a_colour_differ_in_their_lines(tmp_path: Path) -> None:
    norms = ["bn", "abn_gate", "iebn", "abn_paper", "abn_backward"]
    text = html_page(build_report(study(tmp_path, dict.fromkeys(norms, BN))))
    assert "<h2>Learning curves: every seed, and the mean of finished ones</h2>" in text  # too many for bands
    lines = {t["meta"]: t["line"] for t in figures(text)[1]["data"] if t.get("line", {}).get("dash")}
    assert len({(line["color"], line["dash"]) for line in lines.values()}) == len(norms)


def test_text_of_a_record_is_never_markup(tmp_path: Path) -> None:
    study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE}, model="<b>x")
    text = html_page(build_report(tmp_path))
    assert "&lt;b&gt;x" in text
    assert "<b>x" not in text


def test_one_seed_of_one_norm_is_a_page(tmp_path: Path) -> None:
    finish_run(tmp_path, "abn", 0, 0.7)
    text = html_page(build_report(tmp_path))
    assert "was not run" in text
    assert len(figures(text)) == 2  # a learning curve and a dot


ASKED = """<script>addEventListener('load', () => setTimeout(() => {
  document.title = 'asked: ' + JSON.stringify(performance.getEntriesByType('resource').map(entry => entry.name));
}, 5000));</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_draws_every_figure_and_asks_nobody(page: str, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    file = tmp_path / "report.html"
    file.write_text(page.replace("</body>", ASKED), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    drawn = figures(page)
    assert len(re.findall(r'class="figure js-plotly-plot"', done.stdout)) == len(drawn)
    assert done.stdout.count('class="scatterlayer') >= len(drawn)
    assert "<title>asked: []</title>" in done.stdout


def test_the_page_forbids_itself_the_network(page: str) -> None:
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert "*" not in policy


def test_a_page_against_another_norm_is_a_file_of_its_own(folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "claims")
    update_page(own, reference="abn", interim=False, first=0)
    assert page_of(own, "abn").is_file()
    assert not page_of(own).exists()


def test_a_ratio_is_shown_without_a_sign() -> None:
    row = ForestRow(label="digits", norm="abn", estimate=1.36, interval=(0.82, 2.21), pooled=False, note="n = 20")
    for draw, shown in ((spread_ratios, "1.36 (0.82 to 2.21)"), (partial(forest, delta=None), "+1.36 (+0.82 to")):
        figure = draw([row], reference="bn")
        assert figure is not None
        assert figure.data[0].hovertemplate.split("<br>")[1].startswith(shown)


def test_while_runs_go_on_the_page_is_written_at_most_once_a_minute(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "claims"
    shutil.copytree(folder, own)
    os.utime(own)
    update_page(own)
    assert not (own / "report.html").exists()  # the study began just now
    os.utime(own, (0, 0))
    update_page(own)
    first = (own / "report.html").stat().st_mtime_ns
    finish_run(own, "abn", 5, 0.9)
    update_page(own)
    assert (own / "report.html").stat().st_mtime_ns == first
    os.utime(own / "report.html", (0, 0))
    update_page(own)
    assert "90.00" in (own / "report.html").read_text(encoding="utf-8")


def test_when_all_runs_have_ended_the_page_has_the_verdict_and_stays_as_it_is(tmp_path: Path) -> None:
    config = yaml.safe_dump({"delta": 0.5, "primary": {"norm": "abn", "reference": "bn", "statistic": "mean"}})
    study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE}, config=config)
    update_page(tmp_path, interim=False, first=0)
    page = tmp_path / "report.html"
    assert "On digits with binarynet, abn - bn is +0.94 points" in page.read_text(encoding="utf-8")
    os.utime(page, (0, 0))
    update_page(tmp_path, interim=False, first=0)
    assert page.stat().st_mtime == 0  # what shows it would load it again
    assert "digits/binarynet/abn/fixed" in (tmp_path / "looks.json").read_text()  # who reads a verdict has looked
    start_run(tmp_path, "abn", 5, config=config)
    update_page(tmp_path, interim=False, first=0)
    assert "one of its runs has not come to an end" in page.read_text(encoding="utf-8")


def test_the_mean_curve_is_of_finished_runs(tmp_path: Path) -> None:
    study(tmp_path, {"bn": BN, "abn": CLEARLY_ABOVE})
    (start_run(tmp_path, "abn", 5, epochs=2) / "FAILED").write_text("diverged")
    _, curves, *_ = figures(html_page(build_report(tmp_path)))
    lines = {t["hovertemplate"].partition("<br>")[0]: t for t in curves["data"] if "hovertemplate" in t}
    epochs, until_it_diverged = (lines[f"abn, seed {seed}"]["x"] for seed in (0, 5))
    assert lines["abn, mean of 5 seeds"]["x"] == epochs != until_it_diverged


def test_two_processes_do_not_write_it_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object, **__: object) -> None:
        raise build.Timeout("")

    own = shutil.copytree(folder, tmp_path / "claims")
    monkeypatch.setattr(build.FileLock, "acquire", locked)
    os.utime(own, (0, 0))
    update_page(own)
    assert not (own / "report.html").exists()
