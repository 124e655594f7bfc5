"""Packed rows: a pair's prompt runs once, and loss and gradients are those of padded rows."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import APART, FAST_PATHS, lora, padded, tiny_base, tiny_policy, tiny_trainer, token_ids, token_pairs
from transformers import AutoModelForCausalLM, BloomConfig, MptConfig

from qadapter import QAdapterConfig
from qadapter.data import PackedCollator, PreferenceCollator
from qadapter.data.packing import PackedSequences
from qadapter.fused import TokenStatistics
from qadapter.modeling import packed, varlen
from qadapter.modeling.packed import enable_packing, packed_batch
from qadapter.modeling.passes import laid_out
from qadapter.objective import pair_losses

PACKING = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi", "gpt_neox", "gpt2", "granite", "cohere"]


def long_pairs(count=5):
    """Pairs longer than the tiny models' windows of four tokens."""
    return [
        {name: ids * 2 if name == "prompt_ids" else ids for name, ids in pair.items()} for pair in token_pairs(count)
    ]


def padded_loss(policy, pairs):
    batch = PreferenceCollator(pad_token_id=0)(pairs)
    return pair_losses(policy(**batch), batch["completion_mask"][:, 1:], policy.configs["default"])[0]


def packed_loss(policy, pairs):
    assert enable_packing(policy.base)
    batch = PackedCollator()(pairs)
    return pair_losses(policy(**batch), batch["completion_mask"], policy.configs["default"])[0]


@pytest.mark.parametrize(
    ("architecture", "penalty"), [*((name, "reward") for name in PACKING), ("llama", "kl"), ("phi", "kl")]
)
def test_loss_and_every_gradient_equal_those_of_padded_rows(architecture, penalty):
    policy = tiny_policy(tiny_base(architecture, dtype=torch.float64), replace(APART, penalty=penalty))
    expected = with_gradients(policy, padded_loss)
    assert_alike(with_gradients(policy, packed_loss), expected)


@pytest.mark.parametrize("architecture", FAST_PATHS)
def test_packing_and_trunk_together_equal_plain_passes(architecture):
    base = tiny_base(architecture, dtype=torch.float64, num_hidden_layers=4)
    policy = tiny_policy(base, peft_config=lora(target_modules=["v_proj", "down_proj"], layers_to_transform=[2, 3]))
    assert policy.shared_layers == 2
    ours = with_gradients(policy, packed_loss)
    policy.shared_layers = 0
    assert_alike(ours, with_gradients(policy, padded_loss))


def with_gradients(policy, loss):
    """Losses of the long pairs, and the gradients of their mean."""
    policy.zero_grad()
    losses = loss(policy, long_pairs())
    losses.mean().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in policy.adapter_parameters().items()}


def assert_alike(ours, expected):
    """RMS norms compute in float32 whatever the model's dtype, and sum over rows in another order here."""
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-7, atol=1e-9)
    assert ours[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_statistics_stand_in_the_order_of_padded_rows():
    policy, pairs = tiny_policy(tiny_base(dtype=torch.float64)), token_pairs(5)
    row, rows = PackedCollator()(pairs), PreferenceCollator(pad_token_id=0)(pairs)
    theirs = policy(**rows)
    assert enable_packing(policy.base)
    ours = policy(**row)
    for name, values, expected in zip(ours._fields, ours, theirs, strict=True):
        lines = zip(values, row["completion_mask"], expected, rows["completion_mask"][:, 1:], strict=True)
        for line, mask, expected_row, expected_mask in lines:
            torch.testing.assert_close(line[mask], expected_row[expected_mask], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_statistics_are_laid_out_as_masked_scatter_does_it(share):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(4, 7, generator=generator) < share
    size = int(mask.sum())
    columns = TokenStatistics(*(torch.randn(size, generator=generator, requires_grad=i < 2) for i in range(6)))
    for column, ours in zip(columns, laid_out(columns, mask), strict=True):
        expected = column.new_zeros(mask.shape).masked_scatter(mask, column)
        assert torch.equal(ours, expected)
        assert ours.requires_grad == column.requires_grad
        if column.requires_grad:
            weights = torch.randn(mask.shape, generator=generator)
            gradients = [torch.autograd.grad((out * weights).sum(), column)[0] for out in (ours, expected)]
            assert torch.equal(*gradients)


@pytest.mark.parametrize("architecture", FAST_PATHS)
def test_training_in_bfloat16_attends_in_float32_on_a_cpu(architecture, monkeypatch):
    sequences = PackedSequences.of(token_ids(12, 9))
    narrow = tiny_base(architecture, dtype=torch.bfloat16)
    exact = tiny_base(architecture, dtype=torch.bfloat16).double()
    assert enable_packing(narrow)
    assert enable_packing(exact)

    seen = set()
    attend = packed.sdpa_attention_forward

    def noted(module, query, *args, **kwargs):
        seen.add(query.dtype)
        return attend(module, query, *args, **kwargs)

    monkeypatch.setattr(packed, "sdpa_attention_forward", noted)

    def states(base, training):
        seen.clear()
        with torch.no_grad():
            return base.get_decoder()(**packed_batch(base, sequences, training), use_cache=False).last_hidden_state

    expected = states(exact, True)
    assert seen == {torch.float64}
    ours = states(narrow, True)
    assert seen == {torch.float32}
    assert ours.dtype == torch.bfloat16
    theirs = states(narrow, False)
    assert seen == {torch.bfloat16}
    assert (ours.double() - expected).norm() < 1.2 * (theirs.double() - expected).norm()


def test_an_untouched_adapter_trains_from_exactly_the_base_in_bfloat16():
    policy = tiny_policy(tiny_base(dtype=torch.bfloat16), QAdapterConfig(), trained=False)
    assert enable_packing(policy.base)
    statistics = policy(**PackedCollator()(token_pairs(3)))
    assert torch.equal(statistics.logps, statistics.base_logps)
    assert statistics.kl.abs().max() < 1e-6


@pytest.mark.parametrize("empty", ["chosen_ids", "rejected_ids"])
def test_an_answer_without_tokens_is_as_in_padded_rows(empty):
    pairs = [pair | ({empty: []} if number == 1 else {}) for number, pair in enumerate(token_pairs(3))]
    policy = tiny_policy(tiny_base(dtype=torch.float64))
    expected = padded_loss(policy, pairs)
    torch.testing.assert_close(packed_loss(policy, pairs), expected, rtol=1e-9, atol=1e-12)


def test_what_sequences_begin_with_stands_once():
    pairs = [
        {"prompt_ids": [1, 5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [7, 10]},
        {"prompt_ids": [1, 11], "chosen_ids": [12], "rejected_ids": [13, 14]},
    ]
    batch = PackedCollator()(pairs)
    ids = batch["input_ids"][0]
    assert ids.tolist() == [1, 5, 6, 7, 8, 9, 11, 12, 10, 13, 14]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 1, 2, 4, 2, 3]]
    sequences = [part.tolist() for part in ids[batch["gather_indices"]].split(batch["sequence_lengths"])]
    assert sequences == [[1, 5, 6, 7, 8, 9], [1, 11, 12], [1, 5, 6, 7, 10], [1, 11, 13, 14]]
    assert torch.equal(batch["gather_indices"][batch["restore_indices"]], torch.arange(11))
    assert batch["boundaries"].tolist() == [0, 6, 9, 14, 18]
    assert batch["boundaries"].dtype == torch.int32  # as the kernel on a GPU wants it, and the longest sequence
    fields = {name: batch[name] for name in PackedSequences._fields}
    assert packed_batch(tiny_base(), PackedSequences(**fields))["packed"].longest == 6
    assert ids[batch["state_indices"]].tolist() == [6, 7, 8, 11, 6, 7, 11, 13]
    assert batch["target_ids"].tolist() == [7, 8, 9, 12, 7, 10, 13, 14]
    assert batch["completion_mask"].sum(-1).tolist() == [3, 1, 2, 2]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=7))
def test_any_sequences_can_be_read_off_their_row(sequences):
    packed = PackedSequences.of(sequences)
    row = packed.input_ids[0]
    parts = row[packed.gather_indices].split(packed.sequence_lengths)
    assert [part.tolist() for part in parts] == sequences
    positions = packed.position_ids[0][packed.gather_indices].split(packed.sequence_lengths)
    assert [part.tolist() for part in positions] == [list(range(len(ids))) for ids in sequences]
    assert len(row) == len({tuple(ids[: end + 1]) for ids in sequences for end in range(len(ids))})


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
        MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    ],
    ids=lambda config: config.model_type,
)
def test_models_whose_positions_come_from_the_mask_cannot_pack(config):
    assert not enable_packing(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_other_attention_than_sdpa_cannot_pack_and_stays(attention):
    base = tiny_base(attn_implementation=attention)
    assert not enable_packing(base)
    assert base.config._attn_implementation == attention


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
def test_a_model_switched_to_packing_answers_as_before(architecture):
    policy, inputs = tiny_policy(tiny_base(architecture)), padded(token_ids(9, 5, 7))
    options = {"max_new_tokens": 7, "do_sample": False, "strength": 0.7, "pad_token_id": 0}
    logits, text = policy(**inputs).logits, policy.generate(**inputs, **options)
    assert enable_packing(policy.base)
    assert torch.equal(policy(**inputs).logits, logits)
    assert torch.equal(policy.generate(**inputs, **options), text)


@pytest.mark.parametrize("architecture", FAST_PATHS)
@pytest.mark.parametrize("every", [1, 2])
def test_activation_checkpointing_changes_nothing(architecture, every):
    policy = tiny_policy(tiny_base(architecture, num_hidden_layers=4)).train()
    losses = packed_loss(policy, long_pairs())
    losses.mean().backward()
    expected = {name: p.grad.clone() for name, p in policy.adapter_parameters().items()}
    policy.zero_grad()
    policy.activation_checkpointing_enable(every_n_layers=every)
    again = packed_loss(policy, long_pairs())
    again.mean().backward()
    assert torch.equal(again, losses)
    for name, parameter in policy.adapter_parameters().items():
        assert torch.equal(parameter.grad, expected[name]), name


def test_training_is_the_same_with_and_without(tmp_path):
    def losses_of(packing, collator):
        policy = tiny_policy(tiny_base(dtype=torch.float64))
        trainer = tiny_trainer(policy, tmp_path, max_steps=3, per_device_train_batch_size=3, packing=packing)
        assert isinstance(trainer.data_collator, collator)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    losses = losses_of(True, PackedCollator)
    assert losses == pytest.approx(losses_of(False, PreferenceCollator), rel=1e-6)
    assert losses[0] != pytest.approx(losses[-1], rel=1e-3)


@pytest.mark.parametrize(("head", "fits"), [(64, True), (100, False), (256, True), (264, False)])
def test_heads_that_the_kernel_does_not_take_go_to_sdpa(head, fits, monkeypatch):
    monkeypatch.setattr(varlen, "AVAILABLE", True)
    query = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 4, 7, head))
    assert varlen.fits(query, query, {}) == fits


def test_gradients_of_gathering_and_restoring_are_those_of_indexing():
    batch = PackedCollator()(token_pairs(4))
    gather, restore, repeated = (batch[f"{name}_indices"] for name in ("gather", "restore", "repeated"))
    states = torch.randn(len(restore), 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(gather), 3, dtype=torch.float64)
    for fast, slow in (
        (varlen.gather(states, gather, restore, repeated) * weights, states[gather] * weights),
        (varlen.restore(states[gather] * weights, restore), (states[gather] * weights)[restore]),
    ):
        torch.testing.assert_close(fast, slow)
        (actual,), (expected,) = (torch.autograd.grad(out.square().sum(), states) for out in (fast, slow))
        torch.testing.assert_close(actual, expected)
