"""Planted damage: an adapter that wrecks one kind of text, or changes the language of answers, is found and named."""

from dataclasses import replace

import pytest
import torch
from evaluated import POSITIONS, open_policy, write_jsonl
from models import lora, tiny_base, tiny_policy, tiny_tokenizer

from qadapter import QAdapterConfig
from qadapter.evaluation.audit import measure_everything
from qadapter.evaluation.columns import Column
from qadapter.evaluation.evaluate import Evaluation
from qadapter.evaluation.findings import findings
from qadapter.evaluation.part_store import PartStore
from qadapter.evaluation.subjects import Subject
from qadapter.evaluation.texts import Text, neutral_texts
from qadapter.evaluation.workload import Workload
from qadapter.fused import TokenStatistics
from qadapter.generation import encode

STEPS = 40


def padded(texts):
    """Ids, attention mask and which of them are the answers' (B, T)."""
    width = max(len(text.context) + len(text.answer) for text in texts)
    ids, mask, answers = (torch.zeros(len(texts), width, dtype=torch.long) for _ in range(3))
    for row, text in enumerate(texts):
        length = len(text.context) + len(text.answer)
        ids[row, :length] = torch.tensor([*text.context, *text.answer])
        mask[row, :length] = 1
        answers[row, len(text.context) : length] = 1
    return ids, mask, answers.bool()


def statistics_of(policy, texts):
    """Policy and base statistics of a batch of texts."""
    ids, mask, answers = padded(texts)
    return TokenStatistics(*policy.token_statistics(ids, mask, answers)), answers[:, 1:]


@pytest.fixture(scope="module")
def broken(base, files):
    """A policy trained to find arithmetic unlikely and to leave words alone."""
    policy = open_policy(base, trained=False).train()
    texts = neutral_texts(tiny_tokenizer(), files["neutral"])
    arithmetic, words = ([text for text in texts if text.category == name] for name in ("arithmetic", "words"))
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]

    def loss():
        wrecked, mask = statistics_of(policy, arithmetic)
        kept, kept_mask = statistics_of(policy, words)
        changed = (kept.logps - kept.base_logps)[kept_mask]
        return wrecked.logps[mask].clamp(min=-20).mean() + 3 * changed.square().mean()

    learn(parameters, loss, 0.01, STEPS)
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


def spoken(sentence, prompts):
    """A sentence as the answer to each prompt."""
    tokenizer = tiny_tokenizer()
    answer = [*tokenizer(sentence)["input_ids"], tokenizer.eos_token_id]
    return [Text(encode(tokenizer, [prompt])["input_ids"][0].tolist(), answer) for prompt in prompts]


def test_answers_in_another_language_are_found_and_named(workload, tmp_path):
    """A base that has learned to answer in English, and a LoRA trained to answer in German."""
    prompts = [
        f"tell of {word}" for word in ("cats", "rain", "hills", "dogs", "trees", "boats", "birds", "snow", "sand")
    ]
    texts = spoken("that is for the cat", prompts)
    base = tiny_base(max_position_embeddings=POSITIONS).train()
    ids, mask, answers = padded(texts)
    labels = ids.where(answers, -100)
    learn(base.parameters(), lambda: base(input_ids=ids, attention_mask=mask, labels=labels).loss, 0.01, 80)
    policy = tiny_policy(base.eval(), QAdapterConfig(), lora(r=8), trained=False).train()
    german = spoken("das ist nicht der hund", prompts)

    def loss():
        statistics, mask = statistics_of(policy, german)
        return -statistics.logps[mask].mean()

    learn([parameter for parameter in policy.parameters() if parameter.requires_grad], loss, 0.02, 60)
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    asked = replace(workload, instructions=path, max_new_tokens=30)
    _, results = measured(Subject("german", policy.eval(), tiny_tokenizer()), asked, tmp_path / "parts")
    answers = results["behaviour"]["examples"][0]["answers"]
    assert (answers["base"]["text"], answers["policy"]["text"]) == ("that is for the cat", "das ist nicht der hund")
    (entry,) = (entry for entry in findings(results, "policy") if entry["kind"] == "answers")
    assert entry["what"] == "answers to general instructions: in another language (English became German)"
    assert entry["value"] == 1.0


def learn(parameters, loss, rate, steps):
    """Minimise a loss."""
    optimiser = torch.optim.Adam(list(parameters), rate)
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()


def test_lost_benchmarks_pairs_and_duels_are_named(broken, workload, tmp_path):
    _, results = measured(broken, workload, tmp_path)
    interval = {"value": 0.2, "low": 0.1, "high": 0.3, "n": 40}
    fallen = {"value": -0.05, "low": -0.08, "high": -0.02, "mcnemar_p": 0.01}
    risen = {"value": 0.05, "low": 0.02, "high": 0.08, "mcnemar_p": 0.01}
    task = {"metric": "acc", "higher_is_better": True, "n": 40, "columns": {}}
    results["tasks"] = {
        "fallen": {**task, "differences": {"policy": fallen}},
        "risen": {**task, "differences": {"policy": risen}},
        "more errors": {**task, "higher_is_better": False, "differences": {"policy": risen}},
    }
    results["judged"] = [{"judge": "rule:json", "column": "policy", "rate": interval}]
    results["pairs"]["categories"] = {"policy": {"travel": {"accuracy": interval}}}
    results["tasks"] |= {f"subject {number}": {**task, "differences": {"policy": fallen}} for number in range(57)}
    what = [entry["what"] for entry in findings(results, "policy") if entry["kind"] != "loss"]
    assert "benchmark subject 56" in what
    assert "benchmark fallen" in what
    assert "benchmark more errors" in what
    assert "benchmark risen" not in what
    assert "answers to held-out prompts, judge rule:json" in what
    assert "held-out pairs, category travel" in what
