"""What bfloat16 leaves of what float32 proves: answers that part at near ties only, gradients up to its rounding."""

import copy

import models
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qadapter.data import PackedCollator, PreferenceCollator
from qadapter.export import export_merged
from qadapter.functional import mix_coefficients, mix_streams
from qadapter.fused import token_statistics
from qadapter.modeling.packed import enable_packing
from qadapter.modeling.wrapping import wrap
from qadapter.objective import pair_losses

PROMPTS = torch.tensor(models.token_ids(*[9] * 16))
GREEDY = {"do_sample": False, "max_new_tokens": 16}
# bfloat16 keeps 8 bits of every hidden state, which leaves logits (of standard deviation 2) off by 0.03 in the mean
# square. A choice turns on the difference of two, and the worst of some hundred choices is seven times as far out.
NEAR_TIE = 0.3


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    """A plain LoRA on a base in bfloat16, wrapped; and PEFT's own model of the same folders."""
    folder = tmp_path_factory.mktemp("half")
    base = models.tiny_base(dtype=torch.bfloat16)
    base.save_pretrained(folder / "base")
    peft = models.plain_peft(base, models.tiny_policy(base))
    peft.peft_config["default"].base_model_name_or_path = str(folder / "base")
    peft.save_pretrained(folder / "lora")
    policy, _ = wrap(folder / "lora", dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    return policy, PeftModel.from_pretrained(plain, folder / "lora").eval()


def by_peft(policy, peft, folder):
    return peft.generate(input_ids=PROMPTS, **GREEDY)


def by_the_merged_checkpoint(policy, peft, folder):
    export_merged(policy, folder / "merged")
    return AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.bfloat16).generate(PROMPTS, **GREEDY)


def by_the_folded_policy(policy, peft, folder):
    with policy.merged():
        return policy.generate(PROMPTS, **GREEDY)


@torch.no_grad()
def behind_the_best(policy, texts):
    """By how much the logit of each new token is below the largest one, by the policy in float32."""
    before = PROMPTS.shape[1]
    logits = copy.deepcopy(policy).float()(texts).logits[:, before - 1 : -1]
    return logits.amax(-1) - logits.gather(-1, texts[:, before:, None])[..., 0]


@pytest.mark.parametrize("other", [by_peft, by_the_merged_checkpoint, by_the_folded_policy])
def test_answers_in_bfloat16_part_only_where_two_tokens_are_nearly_tied(wrapped, other, tmp_path):
    policy, peft = wrapped
    ours, theirs = policy.generate(PROMPTS, **GREEDY), other(policy, peft, tmp_path)
    # The parting tokens are among these, and what follows them is as near to the best of its own text.
    assert behind_the_best(policy, ours).max() < NEAR_TIE
    assert behind_the_best(policy, theirs).max() < NEAR_TIE
    assert (ours == theirs).all(-1).sum() > len(PROMPTS) / 4


def test_the_tolerance_tells_another_policy(wrapped):
    policy, _ = wrapped
    assert behind_the_best(policy, policy.generate(PROMPTS, strength=0.8, **GREEDY)).max() > 2 * NEAR_TIE


def test_strength_zero_is_the_base_bit_by_bit(wrapped):
    policy, peft = wrapped
    with torch.no_grad(), peft.disable_adapter():
        assert torch.equal(policy(PROMPTS, strength=0.0).logits, peft(input_ids=PROMPTS).logits)


def loss_and_gradients(model, statistics, mask):
    losses, _ = pair_losses(statistics, mask, models.APART)
    losses.mean().backward()
    parameters = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    return {"loss": losses.detach()} | {name: p.grad for name, p in parameters.items() if p.grad is not None}


def by_two_passes(plain):
    """Loss and gradients from two padded passes of PEFT's model, whose LoRA computes in float32, and full logits."""
    batch = PreferenceCollator(pad_token_id=0)(models.token_pairs(5))
    mask, ids = batch.pop("completion_mask")[:, 1:].bool(), batch["input_ids"]
    with torch.no_grad(), plain.disable_adapter():
        z_base = plain(**batch).logits
    coefficients = mix_coefficients("residual", models.APART.alpha_tilde, models.APART.alpha_0)
    mixed = mix_streams([plain(**batch).logits, z_base], coefficients)
    return loss_and_gradients(plain, token_statistics(mixed[:, :-1], z_base[:, :-1], ids[:, 1:]), mask)


@pytest.mark.parametrize("architecture", models.FAST_PATHS)
def test_products_in_bfloat16_cost_loss_and_gradients_what_the_base_s_own_rounding_does(architecture):
    base = models.tiny_base(architecture, dtype=torch.bfloat16)
    policy = models.tiny_policy(base)
    plain = models.plain_peft(base, policy)
    exact, theirs = by_two_passes(copy.deepcopy(plain).float()), by_two_passes(plain)
    assert enable_packing(policy.base)
    batch = PackedCollator()(models.token_pairs(5))
    ours = loss_and_gradients(policy.base, policy(**batch), batch["completion_mask"])
    assert ours.keys() == exact.keys()
    our_errors, their_errors = (
        torch.stack([(found[name] - value).norm() / value.norm() for name, value in exact.items()])
        for found in (ours, theirs)
    )
    # Errors of roundings: over all gradients ours are a third above PEFT's at most, a single one may be unlucky.
    assert our_errors.mean() < 1.5 * their_errors.mean()
    assert our_errors.max() < 4 * their_errors.max() < 0.5
