"""The quickstart with a tiny model: its reports agree with each other, and a second one replaces the first."""

import io
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html import unescape

import pytest
from commands import adapter_settings, assert_refused, qadapter, succeeded
from rich.console import Console

from qadapter import quickstart
from qadapter.evaluation.intervals import Interval
from qadapter.evaluation.report import html, markdown, print_report
from qadapter.generation import Answer
from qadapter.modeling.bases import resolve_base


@pytest.fixture(scope="module")
def tiny(long_base):
    """The quickstart's model and numbers made tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "resolve_base", lambda _: resolve_base(long_base))
        patch.setattr(quickstart, "FIRST_ADAPTED_LAYER", 1)
        patch.setattr(quickstart, "MAX_NEW_TOKENS", 5)
        yield


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """The folder of a quickstart; not to be changed."""
    folder = tmp_path_factory.mktemp("quick") / "start"
    folder.mkdir()
    (folder / "said.txt").write_text(succeeded(qadapter("quickstart", "--output-dir", folder, "--steps", 2)))
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


def headline(results):
    """The cells of the report's table, written from the numbers of results.json."""
    rate = "{value:.0%} [{low:.0%}, {high:.0%}] of {n}".format
    number = "{value:.4f} [{low:.4f}, {high:.4f}]".format
    signed = "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format
    style, pairs, neutral = results["house_style"], results["pairs"], results["neutral"]
    return [
        (rate(**style["base"]), rate(**style["policy"])),
        (rate(**pairs["base"]["prefers_chosen"]), rate(**pairs["policy"]["prefers_chosen"])),
        ("50% (by definition)", rate(**pairs["policy"]["accuracy"])),
        ("0", number(**results["chosen"]["policy"]["kl"])),
        (f"{neutral['base']['loss']['value']:.3f}", f"{neutral['policy']['loss']['value']:.3f}"),
        ("0", signed(**neutral["policy"]["loss_change"])),
        ("0", signed(**neutral["plain"]["loss_change"])),
        ("0", number(**neutral["policy"]["kl"])),
    ]


def test_the_quickstart_writes_an_adapter_and_its_reports(folder):
    assert {"adapter", "report.md", "report.html", "results.json"} <= {path.name for path in folder.iterdir()}
    assert adapter_settings(folder / "adapter")["beta"] == quickstart.METHOD.beta
    succeeded(qadapter("generate", folder / "adapter", "--prompt", "Why?", "--max-new-tokens", 3))


def test_the_terminal_names_the_files_and_the_next_step(folder):
    said = " ".join((folder / "said.txt").read_text().split())
    for name in ("report.md", "report.html", "results.json"):
        assert str(folder / name) in said
    assert f"qadapter chat {folder / 'adapter'} --threshold 0.1" in said
    assert "trained to step 2 in 0:0" in said  # lines, where no bar can be watched


def test_results_hold_every_judged_answer_of_both(results):
    assert len(results["prompts"]) == quickstart.JUDGED_PROMPTS
    for name in ("base", "policy"):
        assert len(results["answers"][name]) == quickstart.JUDGED_PROMPTS
        assert results["house_style"][name]["n"] == quickstart.JUDGED_PROMPTS
    assert results["settings"]["steps"] == 2


def test_the_numbers_of_the_markdown_report_are_those_of_the_results(folder, results):
    lines = (folder / "report.md").read_text().splitlines()
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("| ")]
    assert [row[1:] for row in cells[2:]] == headline(results)


def test_the_numbers_of_the_page_are_those_of_the_results(folder, results):
    page = (folder / "report.html").read_text()
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", page)
    assert [tuple(map(unescape, row[1:])) for row in rows] == headline(results)


def test_the_page_needs_nothing_from_outside(folder):
    page = (folder / "report.html").read_text()
    assert re.findall(r"https?:|//|src=|href=|url\(|@import", page) == []


def test_the_page_shows_the_training_curve(folder):
    [curve] = re.findall(r"<svg.*?</svg>", (folder / "report.html").read_text(), re.DOTALL)
    assert ElementTree.fromstring(curve).get("aria-label") == "Training curve"


REPORTS = ("report.md", "report.html", "results.json")


@pytest.fixture
def earlier(folder, tmp_path):
    """The folder of an earlier quickstart whose reports say so, with a file of the user's."""
    shutil.copytree(folder, tmp_path / "start")
    for name in (*REPORTS, "adapter/audit.json", "mine.txt"):
        (tmp_path / "start" / name).write_text("earlier")
    return tmp_path / "start"


def test_a_second_quickstart_replaces_the_first_and_measures_the_same(tiny, earlier, results):
    succeeded(qadapter("quickstart", "--output-dir", earlier, "--steps", 2))
    second = json.loads((earlier / "results.json").read_text())
    measured = ("pairs", "chosen", "neutral", "house_style", "answers")
    assert {name: second[name] for name in measured} == {name: results[name] for name in measured}
    kept = [path.name for path in earlier.rglob("*") if path.is_file() and path.read_bytes() == b"earlier"]
    assert kept == ["mine.txt"]


def test_a_quickstart_that_fails_leaves_no_report_of_another(tiny, earlier, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("boom")

    monkeypatch.setattr(quickstart.QAdapterTrainer, "train", fail)
    outcome = qadapter("quickstart", "--output-dir", earlier, "--steps", 1)
    assert outcome.code == 1
    assert "error: RuntimeError: boom" in outcome.err  # below a warning: the tiny tokenizer drops pairs
    assert not any((earlier / name).exists() for name in (*REPORTS, "adapter/qadapter_config.json"))


@pytest.mark.parametrize("steps", [0, -3])
def test_impossible_steps_are_refused(tmp_path, steps):
    outcome = qadapter("quickstart", "--output-dir", tmp_path / "out", "--steps", steps)
    assert_refused(outcome, f"--steps {steps}: must be at least 1")
    assert not (tmp_path / "out").exists()


NASTY = "[/bold] [red]x\\[/b] <script>alert('&')</script>"


@pytest.fixture
def nasty_result():
    """A result whose prompts and answers look like the markup of every format that they are written in."""
    interval = Interval(0.5, 0.25, 0.75, 8)
    return quickstart.QuickstartResult(
        settings={"base": NASTY, "threshold": 0.1},
        pairs=dict.fromkeys(("base", "policy"), dict.fromkeys(("accuracy", "prefers_chosen"), interval)),
        chosen={"policy": {"kl": interval}},
        neutral=dict.fromkeys(("base", "policy", "plain"), dict.fromkeys(("loss", "loss_change", "kl"), interval)),
        house_style=dict.fromkeys(("base", "policy"), interval),
        prompts=[NASTY],
        answers={name: [Answer(NASTY, False)] for name in ("base", "policy")},
        seconds=dict.fromkeys(("prepare", "train", "measure", "total"), 1.0),
    )


def test_what_a_model_says_is_no_markup(nasty_result, tmp_path):
    said = io.StringIO()
    print_report(nasty_result, tmp_path / "runs[new]", Console(width=300, file=said))
    assert said.getvalue().count(NASTY) == 3
    assert "runs[new]/report.html" in said.getvalue()
    assert "<script>" not in html(nasty_result, "<svg/>")
    assert NASTY in markdown(nasty_result)
