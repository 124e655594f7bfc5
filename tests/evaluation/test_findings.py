"""Planted damage: an adapter that wrecks one kind of text, or changes the language of answers, is found and named."""

import pytest
import torch
from evaluated import open_policy, write_jsonl
from models import tiny_tokenizer

from qadapter.evaluation.audit import measure_everything
from qadapter.evaluation.columns import Column
from qadapter.evaluation.evaluate import Evaluation
from qadapter.evaluation.findings import findings
from qadapter.evaluation.part_store import PartStore
from qadapter.evaluation.subjects import Subject
from qadapter.evaluation.texts import neutral_texts
from qadapter.evaluation.workload import Workload
from qadapter.fused import TokenStatistics
from qadapter.generation import Answer

STEPS = 40


def statistics_of(policy, texts):
    """Policy and base statistics of a batch of texts."""
    width = max(len(text.context) + len(text.answer) for text in texts)
    ids, mask, answers = (torch.zeros(len(texts), width, dtype=torch.long) for _ in range(3))
    for row, text in enumerate(texts):
        length = len(text.context) + len(text.answer)
        ids[row, :length] = torch.tensor([*text.context, *text.answer])
        mask[row, :length] = 1
        answers[row, len(text.context) : length] = 1
    statistics = policy.token_statistics(ids, mask, answers)
    return TokenStatistics(*statistics), answers[:, 1:].bool()


@pytest.fixture(scope="module")
def broken(base, files):
    """A policy trained to find arithmetic unlikely and to leave words alone."""
    policy = open_policy(base, trained=False).train()
    texts = neutral_texts(tiny_tokenizer(), files["neutral"])
    arithmetic, words = ([text for text in texts if text.category == name] for name in ("arithmetic", "words"))
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(parameters, 0.01)
    for _ in range(STEPS):
        wrecked, mask = statistics_of(policy, arithmetic)
        kept, kept_mask = statistics_of(policy, words)
        changed = (kept.logps - kept.base_logps)[kept_mask]
        loss = wrecked.logps[mask].clamp(min=-20).mean() + 3 * changed.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return Subject("broken", policy.eval(), tiny_tokenizer())


@pytest.fixture
def workload(files):
    return Workload(
        dataset=str(files["pairs"]), neutral_text=files["neutral"], instructions=files["prompts"], max_new_tokens=6
    )


def measured(subject, workload, folder):
    evaluation = Evaluation(subject, [Column("policy")], workload, PartStore(folder))
    return evaluation, measure_everything(evaluation)


def test_broken_arithmetic_is_found_and_named(broken, workload, tmp_path):
    _, results = measured(broken, workload, tmp_path)
    losses = [entry for entry in findings(results, "policy") if entry["what"].startswith("neutral text")]
    named = {entry["what"]: entry["value"] for entry in losses}
    assert named["neutral text, category arithmetic"] > 1.0
    assert named["neutral text, tokens of the kind numbers"] > 1.0
    # The named kinds are the broken ones, and the worst come first.
    assert "arithmetic" in losses[0]["what"] or "numbers" in losses[0]["what"] or "punctuation" in losses[0]["what"]
    assert "neutral text, category words" not in {what for what, value in named.items() if value > 0.5}
    breakdown = results["neutral"]["breakdown"]["policy"]["category"]
    assert breakdown["arithmetic"]["loss_change"]["value"] > 5 * abs(breakdown["words"]["loss_change"]["value"])
    assert {row["category"] for row in results["neutral"]["worst"]["policy"][:7]} == {"arithmetic"}


def test_an_untouched_adapter_has_no_findings(base, workload, tmp_path):
    subject = Subject("untouched", open_policy(base, trained=False), tiny_tokenizer())
    _, results = measured(subject, workload, tmp_path)
    assert findings(results, "policy") == []
    assert results["neutral"]["worst"]["policy"] == results["pairs"]["worst"]["policy"] == []


def test_answers_in_another_language_are_found_and_named(base, workload, tmp_path, monkeypatch):
    subject = Subject("german", open_policy(base, trained=False), tiny_tokenizer())
    english = Answer("That is what it was for, and it will be so with the others.", True)
    german = Answer("Das ist nicht der Grund, und es ist auch für die anderen so.", True)

    def generated(self, column, prompts, kind):
        own = english if column.strength == 0 else german
        return [{"text": own.text, "finished": own.finished}] * len(prompts)

    monkeypatch.setattr(Evaluation, "_generated", generated)
    prompts = [{"prompt": f"prompt {index}"} for index in range(9)]
    path = write_jsonl(tmp_path / "prompts.jsonl", prompts)
    changed = Workload(dataset=workload.dataset, neutral_text=workload.neutral_text, instructions=path)
    _, results = measured(subject, changed, tmp_path)
    (entry,) = findings(results, "policy")
    assert entry["what"] == "answers to general instructions: in another language (English became German)"
    assert entry["value"] == 1.0


def test_lost_benchmarks_pairs_and_duels_are_named(broken, workload, tmp_path):
    _, results = measured(broken, workload, tmp_path)
    interval = {"value": 0.2, "low": 0.1, "high": 0.3, "n": 40}
    fallen = {"value": -0.05, "low": -0.08, "high": -0.02, "mcnemar_p": 0.01}
    risen = {"value": 0.05, "low": 0.02, "high": 0.08, "mcnemar_p": 0.01}
    task = {"metric": "acc", "n": 40, "columns": {}}
    results["tasks"] = {
        "fallen": {**task, "differences": {"policy": fallen}},
        "risen": {**task, "differences": {"policy": risen}},
        "more errors": {**task, "higher_is_better": False, "differences": {"policy": risen}},
    }
    results["judged"] = [{"judge": "rule:json", "column": "policy", "rate": interval}]
    results["pairs"]["categories"] = {"policy": {"travel": {"accuracy": interval}}}
    what = [entry["what"] for entry in findings(results, "policy") if entry["kind"] != "loss"]
    assert "benchmark fallen" in what
    assert "benchmark more errors" in what
    assert "benchmark risen" not in what
    assert "answers to held-out prompts, judge rule:json" in what
    assert "held-out pairs, category travel" in what
