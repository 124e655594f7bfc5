"""What a training run must not depend on: how its batches are cut, and whether it was interrupted."""

import pytest
import torch
from models import lora, tiny_base, tiny_policy, tiny_trainer, token_pairs

from qadapter import QAdapterConfig

CONFIG = QAdapterConfig(alpha_tilde=0.5, alpha_0=0.2, beta=0.3)


def adapter(policy):
    return {name: parameter.detach().clone() for name, parameter in policy.adapter_parameters().items()}


def fresh_policy(dropout=0.0):
    torch.manual_seed(4)
    base = tiny_base("gpt_neox", dtype=torch.float64)
    return tiny_policy(base, CONFIG, lora(lora_dropout=dropout), trained=False)


def trained_adapter(folder, policy, **options):
    tiny_trainer(policy, folder, **options).train()
    return adapter(policy)


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory):
    """The adapter after two SGD steps of eight pairs, by the size of a micro-batch."""
    return {
        size: trained_adapter(
            tmp_path_factory.mktemp("run"),
            fresh_policy(),
            pairs=token_pairs(16),
            optim="sgd",
            learning_rate=0.1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        for size in (8, 4, 2, 1)
    }


@pytest.mark.parametrize("size", [4, 2, 1])
def test_accumulation_gives_the_adapter_of_whole_batches(accumulated, size):
    for name, expected in accumulated[8].items():
        # float64 sums in other orders, over two steps; the numbers are of size 0.1.
        torch.testing.assert_close(accumulated[size][name], expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("options", [{"size": 4}, {"size": 2}, {"size": 2, "micro_batch_tokens": 12}])
def test_each_pair_of_a_step_weighs_the_same_where_its_last_micro_batch_is_smaller(tmp_path, options):
    """Five pairs, an epoch's last step, in micro-batches of 4 and 1, or of 2, 2 and 1."""
    settings = {"pairs": token_pairs(5), "max_steps": 1, "optim": "sgd", "learning_rate": 0.1}
    whole = trained_adapter(tmp_path / "whole", fresh_policy(), per_device_train_batch_size=5, **settings)
    size = options.pop("size")
    settings |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": 3 if size == 2 else 2}
    uneven = trained_adapter(tmp_path / "uneven", fresh_policy(), **settings, **options)
    for name, expected in whole.items():
        torch.testing.assert_close(uneven[name], expected, rtol=1e-9, atol=1e-12, msg=name)


def test_training_changes_the_adapter_and_no_bit_of_the_base(tmp_path):
    policy = fresh_policy()
    before = {name: value.clone() for name, value in policy.base.state_dict().items()}
    tiny_trainer(policy, tmp_path, optim="sgd", learning_rate=0.1).train()
    for name, value in policy.base.state_dict().items():
        changed = not torch.equal(value, before[name])
        assert changed == ("lora_" in name), name


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, strategy):
    options = {
        "pairs": token_pairs(6),
        "per_device_train_batch_size": 3,
        "max_steps": 4,
        "save_strategy": strategy,
        "save_steps": 2,
        "warmup_steps": 1,
        "learning_rate": 0.01,
    }
    whole = trained_adapter(tmp_path / "whole", fresh_policy(dropout=0.3), **options)
    torch.manual_seed(99)
    policy = fresh_policy(dropout=0.3)
    trainer = tiny_trainer(policy, tmp_path / "resumed", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    resumed = adapter(policy)
    assert trainer.state.global_step == 4
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_resumed_run_differs_from_a_run_that_starts_anew(tmp_path):
    """Without this, the test above could pass although nothing was loaded."""
    options = {"pairs": token_pairs(6), "max_steps": 2, "learning_rate": 0.01}
    once = trained_adapter(tmp_path / "once", fresh_policy(), **options)
    twice = trained_adapter(tmp_path / "twice", fresh_policy(), **{**options, "max_steps": 4})
    assert not any(torch.equal(once[name], twice[name]) for name in once)


def test_same_seed_gives_the_same_adapter(tmp_path):
    first = trained_adapter(tmp_path / "first", fresh_policy(dropout=0.3), seed=5)
    second = trained_adapter(tmp_path / "second", fresh_policy(dropout=0.3), seed=5)
    other = trained_adapter(tmp_path / "other", fresh_policy(dropout=0.3), seed=6)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
