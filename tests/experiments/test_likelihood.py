"""Benchmarks by log-likelihood equal lm-eval's; sampling by common noise draws from the policy's distribution."""

import gzip
import json

import pytest
import torch

from benchmarks.experiments.answers import CommonNoise, sample_answers
from benchmarks.experiments.likelihood import LIKELIHOOD, load_items, run_likelihood_tasks
from benchmarks.experiments.suites import make_suite
from benchmarks.experiments.tiny import write_tiny_base
from benchmarks.experiments.trainer import new_policy
from qadapter import QAdapterConfig
from qadapter.errors import ConfigError, DataError
from qadapter.evaluation.benchmarks import task_folder
from qadapter.evaluation.columns import Column
from qadapter.evaluation.forgetting import run_tasks
from qadapter.modeling.bases import load_tokenizer

SETTING = make_suite("smoke").settings[0]
COLUMNS = [Column("strength=0.5", 0.5), Column("strength=2", 2.0)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(write_tiny_base(tmp_path_factory.mktemp("base") / "tiny"))


@pytest.fixture
def policy(base):
    """A policy that differs from its base."""
    found = new_policy(base, QAdapterConfig(), SETTING.training, "float32", 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return found.eval()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = {
        "arc_easy_test": [
            {"query": f"Question: {n}?\nAnswer:", "choices": ["a", "b", "c"], "gold": n % 3} for n in range(8)
        ],
        "piqa_val": [{"question": f"How {n}?", "choices": [f"{n}", "x"], "gold": n % 2} for n in range(8)],
        "sciq_val": [
            {"support": " It is.", "question": f"Is {n}?", "choices": ["b", "q", f"{n}"], "gold": 2} for n in range(8)
        ],
        "lambada_test": [{"query": f"The end of {n} is", "choices": ["e"]} for n in range(8)],
    }
    (folder / "bench").mkdir()
    for name, content in rows.items():
        with gzip.open(folder / "bench" / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in content)
    return folder


def test_scores_are_those_of_lm_eval(base, policy, bench):
    pytest.importorskip("lm_eval")
    tokenizer = load_tokenizer(base)
    names = ("arc_easy", "sciq", "piqa", "lambada")
    found = run_likelihood_tasks(
        policy, {name: load_items(name, tokenizer, bench, 6) for name in names}, COLUMNS, 1024
    )  # fmt: skip
    expected = run_tasks(
        policy, tokenizer, list(names), {column.name: {"strength": column.strength} for column in COLUMNS}, 6,
        batch_size=4, include_path=task_folder(bench / "bench"), shared=True,
    )["tasks"]  # fmt: skip
    for name in names:
        assert found[name] == expected[name]["scores"], name
    assert any(found[name]["base"] != found[name]["strength=2"] for name in names)


def test_unknown_tasks_and_missing_files_are_refused(base, tmp_path):
    tokenizer = load_tokenizer(base)
    with pytest.raises(ConfigError, match="choose among arc_easy"):
        load_items("mmlu", tokenizer, tmp_path, 3)
    with pytest.raises(DataError, match="Pass --data"):
        load_items("piqa", tokenizer, tmp_path, 3)


def test_the_medium_suite_leaves_out_the_benchmark_that_is_trained_on():
    tasks = {setting.name: setting.measuring.tasks for setting in make_suite("medium").settings}
    assert f"{LIKELIHOOD}sciq" in tasks["dsp-academy"]
    assert f"{LIKELIHOOD}sciq" not in tasks["terse"]


def test_common_noise_draws_from_the_softmax_and_is_the_same_for_all_copies():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(20000, 1)
    noisy = CommonNoise(0.7, 1, 0)(None, logits)
    shares = torch.bincount(noisy.argmax(-1), minlength=4) / len(logits)
    torch.testing.assert_close(shares, (logits[0] / 0.7).softmax(-1), atol=0.01, rtol=0)
    both = CommonNoise(0.7, 2, 0)(None, logits[:6])
    assert both[:3].equal(both[3:])
    assert both[:3].equal(CommonNoise(0.7, 1, 0)(None, logits[:3]))


def test_answers_at_several_strengths_are_those_at_each_alone(base, policy):
    tokenizer = load_tokenizer(base)
    prompts = [[{"role": "user", "content": text}] for text in ("Why?", "Tell me more of it.", "And so on")]
    arguments = (7, 12, 1.0, 2)
    together = sample_answers(policy, tokenizer, prompts, [0.0, 0.5, 2.0], *arguments)
    alone = [sample_answers(policy, tokenizer, prompts, [value], *arguments)[0] for value in (0.0, 0.5, 2.0)]
    assert together == alone
    assert together[0] != together[2]
    assert sample_answers(policy, tokenizer, prompts, [0.5], 8, *arguments[1:])[0] != together[1]
    greedy = sample_answers(policy, tokenizer, prompts, [0.0, 2.0], 7, 12, 0.0, 2)
    assert greedy == sample_answers(policy, tokenizer, prompts, [0.0, 2.0], 8, 12, 0.0, 3)
