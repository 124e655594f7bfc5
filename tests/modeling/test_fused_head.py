"""Training with the fused head and with full logits (`fused_head = False`): one loss, the same gradients."""

from dataclasses import replace

import pytest
import torch
from models import APART, padded, tiny_base, tiny_policy, tiny_trainer, token_ids, token_pairs

from qadapter.objective import pair_losses


def losses_and_gradients(policy, config):
    inputs = padded(token_ids(9, 9, 9, 9), "right")  # alike: Gemma 2 gives NaN where a window holds padding alone
    mask = inputs["attention_mask"].bool()
    mask[:, :2], mask[1, 7:] = False, False
    policy.zero_grad()
    losses, quantities = pair_losses(policy(**inputs, completion_mask=mask), mask[:, 1:], config)
    losses.sum().backward()
    return losses.detach(), quantities, [p.grad.clone() for p in policy.adapter_parameters().values()]


@pytest.mark.parametrize("penalty", ["reward", "kl"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3", "gemma2", "cohere"])
def test_loss_metrics_and_every_gradient_are_those_of_full_logits(architecture, penalty):
    config = replace(APART, penalty=penalty, beta=0.7)
    policy = tiny_policy(tiny_base(architecture, dtype=torch.float64), config).train()
    fused = losses_and_gradients(policy, config)
    policy.head = replace(policy.head, fused=False)
    torch.testing.assert_close(losses_and_gradients(policy, config), fused, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("fused", [True, False])
def test_the_argument_switches_the_head(tmp_path, fused):
    trainer = tiny_trainer(tiny_policy(), tmp_path, token_pairs(4), fused_head=fused)
    assert trainer.model.head.fused is fused
    trainer.train()
