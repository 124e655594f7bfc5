"""Sweeps: points, recommendations, files."""

import json
import re
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
from evaluated import open_policy
from models import tiny_tokenizer
from rich.console import Console

from qadapter.errors import ConfigError
from qadapter.evaluation import evaluate, sweep_report
from qadapter.evaluation.columns import Column, strength_columns
from qadapter.evaluation.drift import measure_texts
from qadapter.evaluation.evaluate import Evaluation
from qadapter.evaluation.gate import Limits
from qadapter.evaluation.part_store import PartStore
from qadapter.evaluation.subjects import Subject
from qadapter.evaluation.sweep import SweepLimits, recommend, run_sweep
from qadapter.evaluation.sweep_report import (
    HTML_NAME,
    JSON_NAME,
    SVG_NAME,
    benchmark_changes,
    narrow_rows,
    page,
    print_sweep,
    recommendation,
    rows_of,
    write_sweep,
)
from qadapter.evaluation.texts import load_pairs, neutral_texts
from qadapter.evaluation.workload import Workload

STRENGTHS = [0.25, 0.5, 1.0, 1.5]


@pytest.fixture(scope="module")
def subject(base):
    return Subject("runs/tiny", open_policy(base), tiny_tokenizer())


@pytest.fixture
def workload(files):
    return Workload(dataset=str(files["pairs"]), neutral_text=files["neutral"])


@pytest.fixture
def swept(subject, workload, tmp_path):
    def run(columns=None, **budget):
        columns = columns or [Column(f"{strength:g}", strength) for strength in STRENGTHS]
        return run_sweep(subject, columns, workload, SweepLimits(**budget), PartStore(tmp_path / "parts"))

    return run


def test_points_equal_separately_evaluated_points(subject, workload, swept, tmp_path):
    sweep = swept()
    for point in sweep["points"][1:]:
        alone = Evaluation(
            subject, [Column("alone", point["strength"])], workload, PartStore(tmp_path / f"alone {point['name']}")
        )
        pairs, neutral = alone.pairs(), alone.neutral()
        expected = {
            "accuracy": pairs["columns"]["alone"]["accuracy"],
            "margin_gain": pairs["columns"]["alone"]["token_margin_gain"],
            "kl_chosen": pairs["chosen"]["columns"]["alone"]["kl"],
            "kl_neutral": neutral["columns"]["alone"]["kl"],
            "loss_change_neutral": neutral["columns"]["alone"]["loss_change"],
        }
        for name, interval in expected.items():
            assert point[name] == interval, name


def test_hidden_states_are_computed_once_whatever_the_number_of_strengths(subject, files, monkeypatch):
    decoder, passes = subject.model.get_decoder(), []
    handle = decoder.register_forward_hook(lambda *_: passes.append(1))
    texts = load_pairs(str(files["pairs"]), subject.tokenizer).texts
    for count in (1, 20):
        passes.clear()
        strengths = [index / 10 for index in range(1, count + 1)]
        measure_texts(subject.model, texts, strength_columns("policy", strengths), batch_tokens=10**6)
        assert len(passes) == 2  # one a stream
    handle.remove()


def test_the_base_is_the_first_point(swept):
    base, *others = swept()["points"]
    assert (base["name"], base["strength"], base["kl_chosen"]["value"]) == ("base", 0.0, 0.0)
    assert base["accuracy"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 9}
    assert [point["strength"] for point in others] == STRENGTHS
    kls = [point["kl_neutral"]["value"] for point in (base, *others)]
    assert kls == sorted(kls)


def test_what_the_base_has_by_definition_has_no_interval(swept):
    sweep = swept()
    assert narrow_rows(sweep)[1][0] == ("base", "0", "50%", "0", "0", "0")
    base = rows_of(sweep)[1][0]
    assert base[:3] == ("base", "0", "50%")
    assert "[" in base[3]  # whether the chosen answer is likelier is measured
    assert base[4:] == ("0", "0", "0")


def test_the_largest_measured_strength_within_the_budget_is_recommended(swept):
    points = {point["name"]: point for point in swept()["points"]}
    middle = max(points["0.5"][name]["value"] for name in ("kl_chosen", "kl_neutral"))
    found = swept(max_kl=middle + 1e-9)
    assert found["recommended"] == {"name": "0.5", "strength": 0.5, "fits": True}
    assert "Recommended strength: 0.5, the largest measured one" in recommendation(found)
    # Between two points nothing is interpolated.
    larger = max(points["1"][name]["value"] for name in ("kl_chosen", "kl_neutral"))
    assert swept(max_kl=(middle + larger) / 2)["recommended"]["strength"] == 0.5


def test_a_confident_budget_asks_for_whole_intervals(swept):
    points = {point["name"]: point for point in swept()["points"]}
    ends = max(points["0.5"][name]["high"] for name in ("kl_chosen", "kl_neutral"))
    estimates = max(points["1"][name]["value"] for name in ("kl_chosen", "kl_neutral"))
    budget = max(ends, estimates)
    assert budget < max(points["1"][name]["high"] for name in ("kl_chosen", "kl_neutral"))
    assert swept(max_kl=budget)["recommended"]["strength"] == 1.0
    confident = swept(max_kl=budget, confident=True)
    assert confident["recommended"]["strength"] == 0.5
    assert confident["budget"]["confident"]
    assert recommendation(confident).endswith(f"that fits (KL at most {budget:g}, by the whole interval).")


def test_no_strength_fits_a_budget_that_is_too_small(swept):
    sweep = swept(max_kl=1e-6)
    assert sweep["recommended"] == {"name": "base", "strength": 0.0, "fits": False}
    assert "None of the measured strengths fits (KL at most 1e-06)" in recommendation(sweep)
    assert swept()["recommended"] is None
    assert "There is no limit to fit" in recommendation(swept())


def test_drops_of_benchmarks_count():
    def task(*drops):
        names = ("0.5", "1")
        return {
            "metric": "acc",
            "higher_is_better": True,
            "n": 9,
            "columns": {name: {"value": 0.5} for name in names},
            "differences": {
                name: {"value": -lost / 100, "low": None, "high": None} for name, lost in zip(names, drops, strict=True)
            },
        }

    def chosen(limits, **tasks):
        kls = {name: {"kl": {"value": 0.0}} for name in ("0.5", "1")}
        results = {"pairs": {"chosen": {"columns": kls}}, "neutral": {"columns": kls}, "tasks": tasks}
        return recommend(results, [Column("0.5", 0.5), Column("1", 1.0)], limits)

    budget = SweepLimits(max_drop=1.0).limits(["arc", "piqa"])
    assert budget == Limits(None, {"arc": 1.0, "piqa": 1.0})
    assert chosen(budget, arc=task(0.5, 0.9), piqa=task(0, 1.1))["strength"] == 0.5
    assert chosen(Limits(None, {"arc": 1.0}), arc=task(0.5, 0.9))["strength"] == 1.0
    assert not chosen(Limits(None, {"arc": 1.0}), arc=task(1.5, 0.9))["fits"]  # a larger one that fits by luck
    assert SweepLimits(max_drop=1.0, drops={"arc": 3.0}).limits(["arc"]).max_drop == {"arc": 3.0}


def test_a_limit_on_benchmarks_needs_benchmarks(swept):
    with pytest.raises(ConfigError, match="--max-drop needs benchmarks"):
        swept(max_drop=1.0)


def test_alpha_settings_are_lines_of_their_own(swept):
    columns = [
        Column("0.5", 0.5),
        Column("1", 1.0),
        Column("0.5, alpha_0 0.2", 0.5, alpha_0=0.2),
        Column("1, alpha_0 0.2", 1.0, alpha_0=0.2),
    ]
    sweep = swept(columns, max_kl=100.0)
    assert [point["alpha_0"] for point in sweep["points"]] == [None, None, None, 0.2, 0.2]
    assert sweep["recommended"]["name"] == "1"
    assert "alpha_0 = 0.2" in page(sweep)


def test_what_all_points_share_is_said(swept, capsys):
    sweep = swept([Column(f"{strength:g}", strength, max_kl=0.5, decay=0.8) for strength in (0.5, 1.0)], max_kl=100.0)
    assert sweep["dial"] == {
        "adapter_weights": None,
        "decay": 0.8,
        "cap": 0.5,
        "threshold": None,
        "interpolation": "logits",
    }
    assert "Recommended strength: 1, decay 0.8, KL cap 0.5 nats, the largest" in page(sweep)
    print_sweep(sweep, Console(width=120))
    assert "along the dial, decay 0.8, KL cap 0.5 nats" in capsys.readouterr().out
    even = swept([Column("1", 1.0)], max_kl=100.0)
    decayed, whole = (run["points"][1]["kl_chosen"]["value"] for run in (swept([Column("1", 1.0, decay=0.8)]), even))
    assert 0 < decayed < whole


def test_files_of_a_sweep(swept, tmp_path):
    write_sweep(swept(max_kl=0.5), tmp_path / "out")
    sweep = json.loads((tmp_path / "out" / JSON_NAME).read_text())
    assert sweep["schema_version"] == 1
    assert (tmp_path / "out" / SVG_NAME).read_text().startswith("<svg")
    assert "recommended: " in (tmp_path / "out" / SVG_NAME).read_text()
    html = (tmp_path / "out" / HTML_NAME).read_text()
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)", html)
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    assert [point["name"] for point in data["lines"][0]["points"]] == ["base", "0.25", "0.5", "1", "1.5"]


def with_tasks(sweep):
    """The sweep with a benchmark of shares and one of other scores."""
    tasks = {"lambada": {"unit": "points"}, "poem": {"unit": "score"}}
    for number, point in enumerate(sweep["points"]):
        change = {"value": -0.01 * number, "low": -0.02 * number, "high": 0.0}
        point["tasks"] = {"lambada": change, "poem": {**change, "low": None, "high": None}}
    return {**sweep, "tasks": tasks}


def test_changes_of_benchmarks_are_in_percentage_points_where_they_are_shares(swept, tmp_path):
    sweep = with_tasks(swept(max_kl=0.5))
    names = {path.name for path in write_sweep(sweep, tmp_path)}
    assert {"sweep_benchmarks.svg", "sweep_benchmarks.png", "sweep.svg", "sweep.png"} <= names
    header, rows = rows_of(sweep)
    assert header[-2:] == ("change of lambada, percentage points", "change of poem")
    assert rows[2][-2:] == ("-2.0 [-4.0, +0.0]", "-0.0200")
    assert narrow_rows(sweep)[1][2][-2:] == ("-2.0 ± 2.0", "-0.020")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page(sweep))[1])
    assert data["lines"][0]["points"][2]["task:lambada"] == [-2.0, -4.0, 0.0]
    picture = benchmark_changes(sweep)
    assert {"lambada", "poem", "change"} <= {getattr(shape, "text", "") for shape in picture.shapes}


def test_a_group_stands_for_its_tasks_where_room_is_small(swept):
    sweep = with_tasks(swept())
    sweep["tasks"] = {**sweep["tasks"], "both": {"unit": "points", "subtasks": ["lambada", "poem"]}}
    for point in sweep["points"]:
        point["tasks"]["both"] = point["tasks"]["lambada"]
    assert narrow_rows(sweep)[0][-1] == "both"
    assert {"lambada", "poem"}.isdisjoint(narrow_rows(sweep)[0])
    names = {getattr(shape, "text", "") for shape in benchmark_changes(sweep).shapes}
    assert "both" in names
    assert {"lambada", "poem"}.isdisjoint(names)
    assert len(rows_of(sweep)[0]) == len(narrow_rows(sweep)[0]) + 3  # the page has all, and one figure more


def test_a_limit_on_any_benchmark_holds_for_a_group_as_a_whole(subject, workload, tmp_path, monkeypatch):
    def figures(fall):
        changes = {"1": {"value": fall, "low": None, "high": None}}
        return {
            "metric": "acc",
            "higher_is_better": True,
            "n": 4,
            "columns": {"1": {"value": 0.5}},
            "differences": changes,
        }

    tasks = {"easy": figures(0.05), "hard": figures(-0.05), "all": figures(0.0) | {"subtasks": ["easy", "hard"]}}
    monkeypatch.setattr(evaluate, "Benchmarks", lambda *_: SimpleNamespace(results=lambda: tasks))
    asked = replace(workload, tasks=("all",))
    sweep = run_sweep(subject, [Column("1")], asked, SweepLimits(max_drop=1.0), PartStore(tmp_path / "parts"))
    assert sweep["budget"]["max_drop"] == {"all": 1.0}
    assert sweep["recommended"]["name"] == "1"


def test_a_base_that_is_all_that_fits_is_not_marked_as_recommended(swept):
    data = json.loads(re.search(r'id="data">(.*?)</script>', page(swept(max_kl=1e-6)))[1])
    assert data["recommended"] is None


def test_pictures_of_an_earlier_sweep_do_not_stay(swept, tmp_path, monkeypatch):
    write_sweep(with_tasks(swept()), tmp_path)
    monkeypatch.setattr(sweep_report, "find_spec", lambda name: None)
    write_sweep(swept(), tmp_path)
    assert {path.name for path in tmp_path.glob("sweep*")} == {"sweep.json", "sweep.html", "sweep.svg"}


def test_the_script_of_the_page_is_javascript(swept, tmp_path):
    from shutil import which

    if which("node") is None:
        pytest.skip("node is not installed")
    (tmp_path / "page.js").write_text(re.search(r"<script>(.*)</script>", page(swept()), re.DOTALL)[1])
    subprocess.run(["node", "--check", str(tmp_path / "page.js")], check=True, timeout=60)


def test_names_cannot_leave_the_page(swept):
    sweep = swept()
    sweep["points"][1]["name"] = "</script><script>alert(1)"
    assert "<script>alert" not in page(sweep)


def test_neutral_texts_of_the_package_are_the_default(subject):
    assert len(neutral_texts(subject.tokenizer, None, 64)) == len(neutral_texts(subject.tokenizer))
