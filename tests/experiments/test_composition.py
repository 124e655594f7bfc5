"""The measurement of compositions: its pairs, its rules, and rivals that are what they are called."""

import pytest
import torch

from benchmarks.experiments.composition import (
    CONCISE_WORDS,
    OPENING,
    contenders,
    figures,
    judge,
    plot,
    preference_pairs,
    summed_loras,
)
from benchmarks.experiments.suites import make_suite
from benchmarks.experiments.tiny import write_tiny_base
from benchmarks.experiments.trainer import new_policy
from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.export.merged import merged_state
from qadapter.generation import Answer
from qadapter.modeling.bases import load_base, load_tokenizer, resolve_base
from qadapter.modeling.wrapping import wrap

IDS = torch.arange(5, 25).reshape(2, 10)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return resolve_base(str(write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")))


@pytest.fixture(scope="module")
def adapters(source, tmp_path_factory):
    """Folders of two adapters that move the base in different ways."""
    folders = {name: tmp_path_factory.mktemp("adapters") / name for name in ("concise", "opening")}
    for seed, folder in enumerate(folders.values()):
        policy = new_policy(source.path, QAdapterConfig(), make_suite("smoke").settings[0].training, "float32", seed)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        policy.save_pretrained(folder, tokenizer=load_tokenizer(source))
    return folders


def test_the_pairs_of_both_are_those_of_either():
    concise, opening, both = (preference_pairs(name) for name in ("concise", "opening", "both"))
    assert len(concise) == len(opening) == 352
    assert both.to_list() == concise.to_list() + opening.to_list()
    for short, opened in zip(concise, opening, strict=True):
        assert opened["prompt"] == short["prompt"]
        assert opened["rejected"] == short["rejected"]
        assert opened["chosen"] == f"{OPENING} {short['rejected']}"


@pytest.mark.parametrize(
    ("text", "finished", "concise", "opening"),
    [
        ("Two words.", True, True, False),
        (f"{OPENING} Two words.", True, True, True),
        (f"{OPENING}{' word' * CONCISE_WORDS}", True, True, True),
        (f"{OPENING}{' word' * (CONCISE_WORDS + 1)}", True, False, True),
        (f"Yes. {OPENING}", True, True, False),
        (f"{OPENING} Two words.", False, False, True),
        ("", True, False, False),
        (OPENING, True, False, True),
    ],
)
def test_answers_are_judged_by_both_rules(text, finished, concise, opening):
    assert judge(Answer(text, finished)) == {"concise": concise, "opening": opening, "both": concise and opening}


def test_summed_loras_are_the_base_with_the_weighted_sum_of_both_updates(source, adapters, tmp_path):
    weights = (0.5, 0.75)
    plain = load_base(source, dtype=torch.float32)
    start = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    total = dict(start)
    for weight, folder in zip(weights, adapters.values(), strict=True):
        moved = merged_state(QAdapterForCausalLM.from_pretrained(folder), {"default": 1.0})
        total = {name: tensor + weight * (moved[name] - start[name]) for name, tensor in total.items()}
    plain.load_state_dict(total)
    policy, _ = wrap(summed_loras(source, adapters, weights, tmp_path), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(policy(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_the_contenders_are_mixed_as_they_are_labelled(source, adapters, tmp_path):
    base = load_base(source, dtype=torch.float32)
    single = [QAdapterForCausalLM.from_pretrained(folder) for folder in adapters.values()]
    with torch.no_grad():
        ground = base(input_ids=IDS).logits
        moves = [policy(input_ids=IDS).logits - ground for policy in single]
        found = [
            (name, setting, policy(input_ids=IDS).logits)
            for name, setting, policy in contenders(source, adapters, adapters["opening"], tmp_path)
        ]
    assert [name for name, *_ in found].count("summed LoRAs") == 3
    for name, setting, logits in found:
        if name in ("base", "composition"):
            expected = sum((weight * move for weight, move in zip(setting, moves, strict=True)), ground)
        elif name == "one adapter on both":
            expected = ground + setting[0] * moves[1]
        else:
            continue
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4, msg=f"{name} {setting}")


def test_the_base_does_not_drift_and_a_composition_does(source, adapters):
    composed = QAdapterForCausalLM.from_pretrained(
        source.path, adapters={name: str(path) for name, path in adapters.items()}
    )
    tokenizer = load_tokenizer(source)
    drifts = []
    for weight in (0.0, 1.0):
        composed.adapter_weights = dict.fromkeys(adapters, weight)
        found = figures(composed, tokenizer, ["Why?", "How?"], longest=4)
        assert all(len(found[name]) == 3 for name in ("concise", "opening", "both"))
        drifts.append(found["kl"][0])
    assert drifts[0] == 0.0 < drifts[1]


def test_the_plot_has_a_line_for_each_contender_from_the_base_on():
    def entry(name, weights, kl, both):
        return {"contender": name, "weights": weights, "kl": [kl, 0, 1], "both": [both, 0, 1]}

    results = [
        entry("base", [0.0, 0.0], 0.0, 0.0),
        entry("composition", [1.0, 0.0], 0.2, 0.0),
        entry("composition", [0.5, 0.5], 0.1, 0.25),
        entry("composition", [1.0, 1.0], 0.4, 0.75),
        entry("one adapter on both", [0.5], 0.2, 0.5),
    ]
    picture = plot(results)
    assert picture.count("<polyline") == 2
    assert picture.count("<circle") == 3 + 2  # uneven weights are in the table alone
