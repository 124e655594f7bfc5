"""What methods train on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.experiments import methods
from benchmarks.experiments.cells import Cell, Store
from benchmarks.experiments.runner import Runner
from benchmarks.experiments.suites import SUITES, make_suite
from qadapter import QAdapterConfig
from qadapter.data import PreferenceCollator
from qadapter.data.retained import with_retained_rows
from qadapter.errors import ConfigError
from qadapter.generation import Answer


@pytest.fixture
def context(tmp_path):
    """A context on the tiny base, with an empty cache."""
    (setting,) = make_suite("smoke").settings
    runner = Runner(Store(tmp_path / "results", tmp_path / "work"), Path("no-such-folder"), say=lambda line: None)
    shared = runner.shared(Cell.of(setting, "dpo", {}, 0))
    return replace(shared.context, cache=tmp_path)


def test_the_base_s_own_answers_take_the_rejected_ones_place(context, monkeypatch):
    drawn = {}

    def answers(policy, tokenizer, prompts, strengths, seed, tokens, temperature, batch_size):
        drawn.update(strengths=strengths, temperature=temperature)
        return [[Answer(f"own {number}", finished=number % 2 == 0) for number in range(len(prompts))]]

    monkeypatch.setattr("benchmarks.experiments.answers.sample_answers", answers)
    pairs = methods.with_own_answers(context, "own", 0.7)
    assert drawn == {"strengths": [0.0], "temperature": 0.7}
    given, decode = context.pools.train_ids, context.tokenizer.decode
    for own, pair in zip(pairs, given, strict=True):
        assert own["prompt_ids"] == pair["prompt_ids"]
        assert own["chosen_ids"] == pair["chosen_ids"]
    texts = [decode(row["rejected_ids"]) for row in pairs]
    end = decode(given[0]["rejected_ids"][-1:])
    assert all(text.startswith("own ") for text in texts)
    assert {text.endswith(end) for text in texts} == {True, False}  # an answer that was cut has no end


def test_a_cell_can_be_trained_against_them(context):
    for method, options in (("qadapter", {"rejected": "own"}), ("dpo", {"beta": 0.1, "rejected": "own"})):
        assert methods.train(method, context, options).figures["steps"] > 0
    assert (context.cache / "own_answers.json").exists()


def test_an_unknown_place_of_rejected_answers_is_refused(context):
    with pytest.raises(ConfigError, match=r"rejected = 'onw': choose given or own"):
        methods.train("dpo", context, {"rejected": "onw"})


def test_every_variant_of_every_suite_has_a_loss(context, monkeypatch):
    cells = [cell for name in SUITES for cell in make_suite(name).cells() if cell.method not in ("ppo", "dpo-trl")]
    variants = {json.dumps((cell.method, cell.options), sort_keys=True): cell for cell in cells}
    monkeypatch.setattr(methods, "with_own_answers", lambda context, name, temperature: context.pools.train_ids)
    batch = PreferenceCollator(pad_token_id=0)(list(context.pools.train_ids)[:2])
    policy = context.new_policy()

    def first_losses(policy, pairs, objective, *_):
        with torch.no_grad():
            return {"losses": objective(policy, policy, batch)}

    def on_one_base(config=None):
        policy.configs[policy.adapters[0]] = config or QAdapterConfig()
        return policy

    monkeypatch.setattr(methods, "train_pairs", first_losses)
    monkeypatch.setattr(methods.Context, "new_policy", lambda self, config=None: on_one_base(config))
    for cell in variants.values():
        losses = methods.train(cell.method, context, dict(cell.options)).figures["losses"]
        assert losses.shape == (2,), cell.name
        assert losses.isfinite().all(), cell.name


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("qadapter", {"beta": 1.0}),
        ("dpo", {"beta": 0.1}),
        ("dpo", {"beta": 3.0, "length_normalised": True}),
        ("ipo", {"beta": 0.3}),
        ("simpo", {"beta": 2.0, "margin": 1.0}),
    ],
)
def test_a_rival_may_hold_to_the_base_on_texts_as_well(context, monkeypatch, method, options):
    """Of a text's row each method's loss is the same, the weight times its KL, and its gradient is a number."""
    rows = list(with_retained_rows(context.pools.train_ids.select(range(3)), [[5, 6, 7, 8]]))
    batch, found = PreferenceCollator(pad_token_id=0)(rows), []

    def losses(policy, pairs, objective, *_):
        parameters = list(policy.adapter_parameters().values())
        with torch.no_grad():
            for weights in parameters:
                weights.fill_(0.05)
        values = objective(policy, policy, batch)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(values.sum(), parameters))
        found.append(values.detach())
        return {}

    monkeypatch.setattr(methods, "train_pairs", losses)
    for weight in (1.0, 3.0):
        methods.train(method, context, options | {"retention": weight})
    once, thrice = found
    assert torch.equal(once[:3], thrice[:3])
    assert once[3] > 0
    assert thrice[3] == pytest.approx(3 * once[3])


def test_settings_of_the_method_reach_its_config(context, monkeypatch):
    monkeypatch.setattr(methods, "train_pairs", lambda *arguments: {})
    options = {"beta": 3.0, "gamma": 0.9, "discount_floor": 0.25, "penalty": "kl", "retention": 2.0}
    config = methods.train("qadapter", context, dict(options)).policy.configs["default"]
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize(
    ("method", "options"),
    [("qadapter", {"preset": "kl"}), ("dpo", {"beta": 0.1}), ("dpo", {"beta": 0.1, "retention": 1.0})],
)
def test_packed_rows_with_the_base_s_states_kept_train_the_same_adapter(context, method, options):
    trained = []
    for packed in (False, True):
        training = replace(context.setting.training, epochs=2.0, packed=packed)
        found = methods.train(method, replace(context, setting=replace(context.setting, training=training)), options)
        trained.append((found.figures, found.policy.adapter_parameters()))
    (padded, slow), (packed_figures, fast) = trained
    assert packed_figures["steps"] == padded["steps"] == (6 if "retention" in options else 4)
    assert packed_figures["last_loss"] == pytest.approx(padded["last_loss"], rel=1e-4)
    start = context.new_policy().adapter_parameters()
    for name, parameter in slow.items():
        moved = (parameter - start[name]).abs().max()
        assert (fast[name] - parameter).abs().max() <= 0.02 * moved + 1e-6, name
    assert any((parameter - start[name]).abs().max() > 1e-3 for name, parameter in slow.items())
