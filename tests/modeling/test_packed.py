"""Packed rows: a pair's prompt runs once, and loss and gradients are those of padded rows."""

import pytest
import torch
from models import APART, lora, tiny_base, tiny_policy, tiny_trainer, token_pairs
from transformers import AutoModelForCausalLM, BloomConfig, MptConfig

from qadapter.data import PackedCollator, PreferenceCollator
from qadapter.modeling.packed import attended, can_pack
from qadapter.objective import pair_losses

PACKING = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi", "gpt_neox", "gpt2", "granite", "cohere"]


def long_pairs(count=5):
    """Pairs longer than the tiny models' windows of four tokens."""
    return [
        {name: ids * 2 if name == "prompt_ids" else ids for name, ids in pair.items()} for pair in token_pairs(count)
    ]


def padded_loss(policy, pairs):
    batch = PreferenceCollator(pad_token_id=0)(pairs)
    return pair_losses(policy(**batch), batch["completion_mask"][:, 1:], APART)[0]


def packed_loss(policy, pairs, **options):
    batch = PackedCollator(pad_token_id=0, **options)(pairs)
    return pair_losses(policy(**batch), batch["completion_mask"], APART)[0]


@pytest.mark.parametrize("architecture", PACKING)
@pytest.mark.parametrize("attention_cost", [1, 10**9], ids=["a row a pair", "one row"])
def test_loss_and_every_gradient_equal_those_of_padded_rows(architecture, attention_cost):
    # Gemma 2's eager attention gives NaN where a window holds nothing but padding, as in the padded twin.
    changes = {"sliding_window": 16} if architecture == "gemma2" else {}
    policy = tiny_policy(tiny_base(architecture, dtype=torch.float64, **changes))
    assert can_pack(policy.base)
    expected = padded_loss(policy, long_pairs())
    expected.mean().backward()
    gradients = {name: p.grad.clone() for name, p in policy.adapter_parameters().items()}
    policy.zero_grad()
    losses = packed_loss(policy, long_pairs(), attention_cost=attention_cost)
    losses.mean().backward()
    # RMS norms compute in float32 whatever the model's dtype, and sum over rows in another order here.
    torch.testing.assert_close(losses, expected, rtol=1e-7, atol=1e-9)
    for name, parameter in policy.adapter_parameters().items():
        # RMS norms compute in float32 whatever the model's dtype, and sum over rows in another order here.
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-6 * float(gradients[name].abs().max())
        )


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
def test_packing_and_trunk_together_equal_plain_passes(architecture):
    base = tiny_base(architecture, dtype=torch.float64, num_hidden_layers=4)
    policy = tiny_policy(base, peft_config=lora(target_modules=["v_proj", "down_proj"], layers_to_transform=[2, 3]))
    losses = packed_loss(policy, long_pairs())
    assert policy.shared_layers == 2
    policy.shared_layers = 0
    torch.testing.assert_close(losses, padded_loss(policy, long_pairs()), rtol=1e-9, atol=1e-12)


def test_statistics_stand_in_the_order_of_padded_rows():
    policy, pairs = tiny_policy(tiny_base(dtype=torch.float64)), token_pairs(5)
    packed, padded = PackedCollator(pad_token_id=0)(pairs), PreferenceCollator(pad_token_id=0)(pairs)
    ours, theirs = policy(**packed), policy(**padded)
    for name, values, expected in zip(ours._fields, ours, theirs, strict=True):
        rows = zip(values, packed["completion_mask"], expected, padded["completion_mask"][:, 1:], strict=True)
        for row, mask, expected_row, expected_mask in rows:
            torch.testing.assert_close(row[mask], expected_row[expected_mask], rtol=1e-9, atol=1e-10, msg=name)


def test_who_attends_to_whom():
    segments = torch.tensor([[0, 0, 1, 1, 2, 3, 4, -1]])
    positions = torch.tensor([[0, 1, 2, 3, 2, 0, 1, 0]])
    expected = ["1       ", "11      ", "111     ", "1111    ", "11  1   ", "     1  ", "     11 ", "       1"]
    rows = ["".join("1" if allowed else " " for allowed in row) for row in attended(segments, positions)[0, 0]]
    assert rows == expected
    window = ["".join("1" if allowed else " " for allowed in row) for row in attended(segments, positions, 2)[0, 0]]
    assert window == ["1       ", "11      ", " 11     ", "  11    ", " 1  1   ", "     1  ", "     11 ", "       1"]


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
        MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    ],
    ids=lambda config: config.model_type,
)
def test_models_whose_positions_come_from_the_mask_cannot_pack(config):
    assert not can_pack(AutoModelForCausalLM.from_config(config).eval())


def test_attention_that_takes_no_such_mask_cannot_pack():
    base = tiny_base()
    base.set_attn_implementation("flex_attention")
    assert not can_pack(base)


@pytest.mark.parametrize("packing", [True, False])
def test_training_is_the_same_with_and_without(tmp_path, packing):
    policy = tiny_policy(tiny_base(dtype=torch.float64))
    trainer = tiny_trainer(policy, tmp_path, max_steps=3, per_device_train_batch_size=3, packing=packing)
    assert isinstance(trainer.data_collator, PackedCollator if packing else PreferenceCollator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    other = tiny_policy(tiny_base(dtype=torch.float64))
    twin = tiny_trainer(other, tmp_path, max_steps=3, per_device_train_batch_size=3, packing=not packing)
    twin.train()
    expected = [entry["loss"] for entry in twin.state.log_history if "loss" in entry]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert losses[0] != pytest.approx(losses[-1], rel=1e-3)
