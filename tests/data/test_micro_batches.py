"""A batch in parts: within the budget, nothing lost, and the step the same as of the whole batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FAST_PATHS, tiny_base, tiny_policy, tiny_trainer, token_pairs

from qadapter.data import PackedCollator, PreferenceCollator
from qadapter.data.micro_batches import MicroBatchCollator, tokens_of
from qadapter.errors import ConfigError

ids = st.lists(st.integers(1, 96), min_size=1, max_size=12)
pairs_of_any_length = st.lists(
    st.fixed_dictionaries({"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids}), min_size=1, max_size=12
)


@given(pairs=pairs_of_any_length, budget=st.integers(1, 120), packed=st.booleans())
def test_parts_hold_every_pair_once_within_the_budget(pairs, budget, packed):
    collator = PackedCollator() if packed else PreferenceCollator(pad_token_id=0)
    split = MicroBatchCollator(collator, budget, packed)
    parts = split.parts(pairs)
    assert sorted(index for part in parts for index in part) == list(range(len(pairs)))
    batches = split(pairs)["micro_batches"]
    assert sum(batch["share"] for batch in batches) == pytest.approx(1.0)
    for part, batch in zip(parts, batches, strict=True):
        assert len(part) == 1 or tokens_of([pairs[i] for i in part], packed) <= budget
        assert batch["input_ids"].numel() <= tokens_of([pairs[i] for i in part], packed)


def test_similar_lengths_stand_together():
    pairs = [{"prompt_ids": [1] * n, "chosen_ids": [2], "rejected_ids": [3]} for n in (9, 1, 8, 2)]
    split = MicroBatchCollator(PreferenceCollator(pad_token_id=0), 40, packed=False)
    assert split.parts(pairs) == [[0, 2], [3, 1]]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_and_metrics_equal_those_of_whole_batches(tmp_path, packing, accumulation):
    logs, weights = [], []
    for budget in (None, 40):
        policy = tiny_policy(tiny_base(dtype=torch.float64))
        trainer = tiny_trainer(
            policy, tmp_path / str(budget), token_pairs(8), token_pairs(5), per_device_train_batch_size=4,
            per_device_eval_batch_size=5, gradient_accumulation_steps=accumulation, max_steps=4, learning_rate=1e-2,
            packing=packing, micro_batch_tokens=budget,
        )  # fmt: skip
        trainer.train()
        logs.append([*trainer.state.log_history, trainer.evaluate()])
        weights.append(policy.adapter_parameters())
    timings = ("runtime", "per_second", "flos")
    for whole, split in zip(*logs, strict=True):
        assert {name: value for name, value in split.items() if not name.endswith(timings)} == pytest.approx(
            {name: value for name, value in whole.items() if not name.endswith(timings)}, rel=1e-6, abs=1e-9
        )
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-7)


def test_the_tokens_of_every_part_are_counted_where_the_trainer_is_asked_to(tmp_path):
    counts = []
    for budget in (None, 40):
        trainer = tiny_trainer(
            tiny_policy(), tmp_path / str(budget), token_pairs(8), per_device_train_batch_size=4, max_steps=2,
            packing=False, micro_batch_tokens=budget, include_num_input_tokens_seen="non_padding",
        )  # fmt: skip
        trainer.train()
        counts.append(trainer.state.num_input_tokens_seen)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("architecture", FAST_PATHS)
@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_every_gradient_equal_those_of_the_whole_batch(tmp_path, architecture, packing):
    policy, pairs, found = tiny_policy(tiny_base(architecture, dtype=torch.float64)), token_pairs(5), []
    for budget in (None, 40):
        trainer = tiny_trainer(policy, tmp_path, packing=packing, micro_batch_tokens=budget)
        batch = trainer.data_collator(pairs)
        parts = batch.get("micro_batches", [batch])
        assert (len(parts) > 1) == (budget is not None)
        policy.zero_grad()
        losses = [trainer.compute_loss(policy, part) for part in parts]
        torch.stack(losses).sum().backward()
        gradients = {name: p.grad.clone() for name, p in policy.adapter_parameters().items()}
        found.append((sum(losses).detach(), gradients))
    # Norms compute in float32 whatever the model's dtype, and sum over other rows.
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-9)
    for name, expected in found[0][1].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[1][1][name], expected, rtol=1e-4, atol=1e-6 * scale, msg=name)


def test_a_batch_runs_in_several_parts(tmp_path):
    policy = tiny_policy(tiny_base())
    sizes = []
    whole = policy.adapter_pass

    def counted(input_ids, *args, **kwargs):
        sizes.append(input_ids.numel())
        return whole(input_ids, *args, **kwargs)

    policy.adapter_pass = counted
    tiny_trainer(policy, tmp_path, per_device_train_batch_size=8, max_steps=1, micro_batch_tokens=40).train()
    assert len(sizes) > 1
    assert max(sizes) <= 40


def test_a_budget_below_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="micro_batch_tokens = 0: must be at least 1"):
        tiny_trainer(tiny_policy(), tmp_path, micro_batch_tokens=0)
