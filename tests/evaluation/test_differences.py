"""Differences of two columns: paired, over the same items, and zero where the columns are one policy."""

import random

import pytest
import torch
from evaluated import open_policy
from models import tiny_tokenizer

from qadapter.evaluation.audit import measure_everything
from qadapter.evaluation.columns import Column
from qadapter.evaluation.differences import FIGURES, differences, without_items
from qadapter.evaluation.evaluate import Evaluation
from qadapter.evaluation.part_store import PartStore
from qadapter.evaluation.resampling import mean_intervals, paired_difference
from qadapter.evaluation.subjects import Subject
from qadapter.evaluation.workload import Workload


@pytest.fixture(scope="module")
def results(base, files, tmp_path_factory):
    workload = Workload(
        dataset=str(files["pairs"]), neutral_text=files["neutral"], instructions=files["prompts"], max_new_tokens=5,
        judges=("rule:max-words=3",), prompts=4,
    )  # fmt: skip
    columns = [Column("half", 0.5), Column("whole"), Column("again")]
    subject = Subject("tiny", open_policy(base), tiny_tokenizer())
    return measure_everything(Evaluation(subject, columns, workload, PartStore(tmp_path_factory.mktemp("parts"))))


def test_values_are_the_differences_of_the_columns_own_figures(results):
    entries = differences(results, ["half", "whole", "again"])
    assert [(entry["minus"], entry["column"]) for entry in entries] == [
        ("half", "whole"), ("half", "again"), ("whole", "again")
    ]  # fmt: skip
    figures = entries[0]["figures"]
    assert list(figures) == [key for key, *_ in FIGURES]
    pairs, chosen = results["pairs"]["columns"], results["pairs"]["chosen"]["columns"]
    for key, part, figure in (
        ("accuracy", pairs, "accuracy"),
        ("token_margin", pairs, "token_margin"),
        ("kl_chosen", chosen, "kl"),
        ("kl_neutral", results["neutral"]["columns"], "kl"),
        ("loss_instructions", results["instructions"]["columns"], "loss"),
    ):
        expected = part["whole"][figure]["value"] - part["half"][figure]["value"]
        assert figures[key].value == pytest.approx(expected, abs=1e-12), key
        assert figures[key].low <= figures[key].value <= figures[key].high
    rates = {entry["column"]: entry["rate"]["value"] for entry in results["judged"]}
    assert entries[0]["judged"]["rule:max-words=3"].value == pytest.approx(rates["whole"] - rates["half"])


def test_a_policy_does_not_differ_from_itself(results):
    entry = differences(results, ["whole", "again"])[0]
    assert {figure.value for figure in entry["figures"].values()} == {0.0}
    assert entry["figures"]["kl_neutral"][1:3] == (0.0, 0.0)
    assert entry["figures"]["accuracy"].low < 0 < entry["figures"]["accuracy"].high  # nine pairs prove no equality


def test_differences_are_paired(results):
    """Texts differ far more from each other than two strengths do on one text."""
    losses = results["neutral"]["items"]["columns"]
    paired = differences(results, ["half", "whole"])[0]["figures"]["loss_neutral"]
    (alone,) = mean_intervals(torch.tensor([losses["whole"]["loss"]]))
    assert paired.high - paired.low < (alone.high - alone.low) / 2


def test_tasks_and_groups_of_tasks(results):
    scores = {"half": [1.0, 0.0, 0.0, 1.0], "whole": [1.0, 1.0, 0.0, 1.0]}
    tasks = {
        "one": {"scores": scores},
        "two": {"scores": {"half": [0.3, 0.9], "whole": [0.1, 0.9]}},
        "group": {"subtasks": ["one", "one"]},
    }
    found = differences({**results, "tasks": tasks}, ["half", "whole"])[0]["tasks"]
    assert found["one"]["value"] == 0.25
    assert found["one"]["mcnemar_p"] == 1.0
    assert found["two"]["mcnemar_p"] is None
    assert (found["group"]["value"], found["group"]["n"]) == (0.25, 8)


def test_reports_hold_no_items(results):
    tasks = {"items": {"metric": "acc", "scores": {"half": [1.0]}}}
    kept = without_items({**results, "tasks": tasks})
    assert kept["tasks"] == {"items": {"metric": "acc"}}
    assert not any("items" in kept[part] for part in ("pairs", "neutral", "instructions"))
    assert kept["behaviour"] == results["behaviour"]


@pytest.mark.parametrize("copies", [1, 4])
def test_differences_of_grouped_rates_cover_the_truth(copies):
    """Prompts of several pairs that win or lose together; a few ties."""
    generator, covered = random.Random(0), 0
    prompts, runs, gained, lost = 40, 1500, 0.15, 0.05
    groups = [prompt for prompt in range(prompts) for _ in range(copies)]
    for _ in range(runs):
        policy, base = [], []
        for _ in range(prompts):
            change = generator.random()
            before = 0.0 if change < gained else 1.0 if change < gained + lost else generator.choice((0.0, 0.5, 1.0))
            base += [before] * copies
            policy += [1.0 - before if change < gained + lost else before] * copies
        interval = paired_difference(policy, base, groups=groups)
        covered += interval.low <= gained - lost <= interval.high
    assert covered / runs > 0.93  # 0.95 less three standard errors of the simulation
