"""What the training loss and its gradients must not depend on."""

import models
import pytest
import torch
from models import APART, lora, tiny_base, tiny_policy, token_pairs

from qadapter import fused
from qadapter.config import QAdapterConfig
from qadapter.data import PreferenceCollator
from qadapter.objective import pair_losses

# One head with and without absolute positions, two heads because of a bias, two because of a soft cap; GPT-2,
# GPT-NeoX and Phi normalise in float64 throughout, so that their losses are exact to rounding.
EXACT = ["gpt2", "gpt_neox", "phi"]
# These normalise in float32 whatever their dtype. Gemma 2 runs in float32 altogether: transformers' eager attention
# fills masks with float64's lowest number, which is -inf in the float32 of its softmax.
ROUNDED = ["llama", "mistral", "gemma2"]
SETTINGS = [
    QAdapterConfig(alpha_tilde=0.5, alpha_0=0.2, beta=0.7, gamma=0.9),
    QAdapterConfig("logits", alpha_tilde=1.0, alpha_0=0.01, beta=0.1, length_normalised=True, label_smoothing=0.1),
    QAdapterConfig(alpha_tilde=3.0, alpha_0=2.0, beta=0.3, penalty="kl", length_normalised=True),
]
PAIRS = token_pairs(5)

architectures = pytest.mark.parametrize("architecture", [*EXACT, *ROUNDED])
settings = pytest.mark.parametrize("config", SETTINGS, ids=lambda config: f"{config.parametrisation} {config.penalty}")


def tolerance(architecture):
    # Sums in other orders: float64 rounding, or that of a float32 normalisation, of numbers of size 1 to 100.
    return {"rtol": 1e-9, "atol": 1e-9} if architecture in EXACT else {"rtol": 1e-4, "atol": 1e-4}


def policy_of(architecture, config=APART):
    dtype = torch.float32 if architecture == "gemma2" else torch.float64
    return tiny_policy(tiny_base(architecture, dtype=dtype), config)


def losses_and_gradients(policy, pairs=PAIRS, **collation):
    """Of the pairs in padded rows."""
    batch = PreferenceCollator(**{"pad_token_id": 0, **collation})(pairs)
    return models.losses_and_gradients(policy, batch, batch["completion_mask"][:, 1:])


def assert_same(actual, expected, architecture):
    assert all(gradient.abs().max() > 0 for gradient in expected[1].values())
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance(architecture))


@architectures
@settings
@pytest.mark.parametrize(
    "collation",
    [{"padding_side": "left"}, {"pad_to_multiple_of": 32}, {"padding_side": "left", "pad_to_multiple_of": 32}],
    ids=["left", "wide", "wide left"],
)
def test_loss_ignores_padding(architecture, config, collation):
    policy = policy_of(architecture, config)
    assert_same(losses_and_gradients(policy, **collation), losses_and_gradients(policy), architecture)


@architectures
def test_loss_ignores_the_token_in_the_padding(architecture):
    policy = policy_of(architecture)
    assert_same(losses_and_gradients(policy, pad_token_id=42), losses_and_gradients(policy), architecture)


@architectures
@settings
def test_loss_follows_its_pair_in_any_order(architecture, config):
    policy = policy_of(architecture, config)
    order = [3, 0, 4, 2, 1]
    losses, gradients = losses_and_gradients(policy)
    shuffled = losses_and_gradients(policy, [PAIRS[index] for index in order])
    assert_same(shuffled, (losses[order], gradients), architecture)


@architectures
@settings
def test_loss_ignores_batch_mates(architecture, config):
    policy = policy_of(architecture, config)
    alone = [losses_and_gradients(policy, [pair]) for pair in PAIRS]
    losses = torch.cat([loss for loss, _ in alone])
    gradients = {
        name: torch.stack([gradient[name] for _, gradient in alone]).mean(0) for name in policy.adapter_parameters()
    }
    assert_same(losses_and_gradients(policy), (losses, gradients), architecture)


@architectures
@pytest.mark.parametrize("chunk", [1, 7])
def test_loss_ignores_the_chunk_size(architecture, chunk, monkeypatch):
    policy = policy_of(architecture)
    expected = losses_and_gradients(policy)
    monkeypatch.setattr(fused, "CPU_CHUNK_BYTES", chunk * policy.config.vocab_size * policy.dtype.itemsize)
    assert_same(losses_and_gradients(policy), expected, architecture)


@architectures
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(architecture, use_reentrant):
    policy = policy_of(architecture).train()
    expected = losses_and_gradients(policy)
    policy.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert policy.is_activation_checkpointing
    assert_same(losses_and_gradients(policy), expected, architecture)


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"target_modules": ["q_proj", "lm_head"]}], ids=["DoRA", "head"])
def test_activation_checkpointing_gives_the_same_gradients_for_other_adapters(kind):
    policy = tiny_policy(tiny_base(dtype=torch.float64), peft_config=lora(**kind)).train()
    expected = losses_and_gradients(policy)
    policy.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(losses_and_gradients(policy), expected, "llama")


@pytest.mark.parametrize("architecture", ["gpt2", "phi"])  # one head, two heads
@settings
def test_gradient_is_that_of_finite_differences(architecture, config):
    policy = policy_of(architecture, config)
    _, gradients = losses_and_gradients(policy)
    generator = torch.Generator().manual_seed(0)
    step = 1e-6
    with torch.no_grad():
        for name, parameter in policy.adapter_parameters().items():
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            sides = []
            for sign in (1, -1):
                parameter += sign * step * direction
                batch = PreferenceCollator(pad_token_id=0)(PAIRS)
                losses, _ = pair_losses(policy(**batch), batch["completion_mask"][:, 1:], config)
                sides.append(losses.mean())
                parameter -= sign * step * direction
            slope = (sides[0] - sides[1]) / (2 * step)
            # The error of a central difference is of order step², plus rounding / step.
            torch.testing.assert_close((gradients[name] * direction).sum(), slope, rtol=1e-5, atol=1e-6)
