"""The method as pure functions of tensors (arXiv 2407.03856, built on residual Q-learning, arXiv 2306.09526).

Setting. A response is a walk through a token MDP: s_t is the prompt plus the first t response tokens, a_t the
next token; the walk ends after the end-of-turn token. The base model is the optimum of an unknown reward r1, the
preference pairs are evidence of a reward r2, and Q is the residual Q-function that turns the one optimum into the
optimum of both. With z_b the base model's logits and z_θ the logits with the adapter on:

    policy    π̃(a|s) ∝ exp[(Q(s,a) + α₀ log π_b(a|s)) / α̃]
    value     V(s)    = α̃ log Σ_a exp[(Q(s,a) + α₀ log π_b(a|s)) / α̃],  and 0 after the last token
    weight    w_t     = max(γᵗ, f); so the discount of a step is γ_t = w_{t+1} / w_t (the paper: γ)
    reward    r_t     = Q(s_t,a_t) − γ_t V(s_{t+1})
    return    R = Σ_t w_t r_t − V(s_0) (the paper: Σ_t r_t), or that over the response's length (`length_normalised`)
    loss      −log σ(R(chosen) − R(rejected)) + β · mean over the pair's response tokens of r_t²,
              or of KL(π̃(·|s_t) ‖ π_b(·|s_t)) instead (`penalty: kl`; not in the paper)
    retention ρ · mean of KL(π̃ ‖ π_b) over the tokens of a text that no pair speaks of (not in the paper)

    residual: Q = α̃ (z_θ − z_b),  policy logits = z_θ + (α₀/α̃ − 1) z_b
    logits:   Q = z_θ,            policy logits = (z_θ + α₀ z_b) / α̃     (the paper's and the authors' form)

Both forms have policy logits c_θ z_θ + c_b z_b and α̃·(policy logits) = Q + α₀ z_b; everything below uses only that.

Where the authors' released code differs (benchmarks/experiments/authors.py reproduces it): it takes V at s_t instead
of s_{t+1}, scores a shifted set of tokens, and divides by the padded width. Sizes: B rows, T response tokens,
V vocabulary, P pairs; a batch has B = 2P rows, the chosen ones first.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MixCoefficients(NamedTuple):
    """Policy logits = adapter · z_θ + base · z_b, up to a constant per state."""

    adapter: float
    base: float


def mix_coefficients(parametrisation: str, alpha_tilde: float, alpha_0: float) -> MixCoefficients:
    """The trained policy's weights (c_θ, c_b) of the two streams' logits (method.md, table of parametrisations)."""
    if parametrisation == "residual":
        return MixCoefficients(1.0, alpha_0 / alpha_tilde - 1.0)
    return MixCoefficients(1.0 / alpha_tilde, alpha_0 / alpha_tilde)


def composed_coefficients(
    trained: Mapping[str, MixCoefficients], weights: Mapping[str, float | Tensor]
) -> tuple[dict[str, float | Tensor], float | Tensor]:
    """Weights of each adapter's stream, and of the base's, in z(w) = z_b + Σ_k w_k (z̃_k − z_b).

    One adapter with weight λ is the strength dial z(λ) = (1 − λ) z_b + λ z̃: 0 is the base, 1 the trained policy.
    Weights may be floats or tensors (one a row); the result has their shape.
    """
    adapters = {name: weights[name] * trained[name].adapter for name in trained}
    base: float | Tensor = 1.0
    for name in trained:
        base = base + weights[name] * (trained[name].base - 1.0)
    return adapters, base


def q_values(policy_logits: Tensor, base_logits: Tensor, alpha_tilde: float, alpha_0: float) -> Tensor:
    """Q(s,a) = α̃ p_a − α₀ z_b[a], for unnormalised policy logits p and base logits z_b of the same actions."""
    return alpha_tilde * policy_logits - alpha_0 * base_logits


def soft_values(policy_lse: Tensor, base_lse: Tensor, alpha_tilde: float, alpha_0: float) -> Tensor:
    """V(s) = α̃ LSE(policy logits) − α₀ LSE(z_b), from the two log-sum-exps over the vocabulary.

    The inputs belong to the *unnormalised* logits of `mix_coefficients`: a shift by a constant per state is part of Q.
    """
    return alpha_tilde * policy_lse - alpha_0 * base_lse


def implied_rewards(q: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, discount_floor: float = 0.0) -> Tensor:
    """r_t = Q(s_t,a_t) − γ_t V(s_{t+1}), zero outside the mask; (B, T), as all arguments.

    Args:
        q: Q(s_t, a_t) of the token at each position.
        values: V(s_t), the value of the state *before* the token at that position.
        mask: True on response tokens, which form one run a row; V is 0 after the last of them.
        gamma, discount_floor: as for `discounts`; γ_t = w_{t+1} / w_t, which is γ until the floor is reached, then 1.
    """
    next_values = F.pad((values * mask)[:, 1:], (0, 1))
    steps: float | Tensor = gamma
    if discount_floor:  # w_t is at least the floor then; without one γᵗ may underflow, and w_{t+1} / w_t with it
        steps = (discount_floor / discounts(mask, gamma, q.dtype, discount_floor)).clamp(min=gamma)
    return (q - steps * next_values) * mask


def discounts(mask: Tensor, gamma: float, dtype: torch.dtype, discount_floor: float = 0.0) -> Tensor:
    """w_t = max(γᵗ, floor) (B, T), t = 0 at the first token of the response that `mask` marks.

    Args:
        gamma: discount, 0 < γ ≤ 1.
        discount_floor: what a token weighs at least, 0 ≤ f ≤ 1, however late it comes.
    """
    return (gamma ** (mask.cumsum(-1) - 1).clamp(min=0).to(dtype)).clamp(min=discount_floor)


def response_returns(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    length_normalised: bool = False,
    discount_floor: float = 0.0,
) -> Tensor:
    """Σ_t w_t r_t − V(s_0) of each row (B,), which is Σ_t w_t (α̃ log π̃ − α₀ log π_b), t = 0 at the first token.

    So a shift of all logits of a state, which no policy knows of, changes no return: without the weights w_t every
    value V(s_t), t > 0, would leave (1 − γ) V(s_t) behind, and between answers of different lengths V(s_0) would
    prefer the shorter or the longer one where the returns are means.

    Args:
        values, gamma, discount_floor: as for `implied_rewards`, whose rewards these are.
        length_normalised: divide by the response's own length, never by a padded one.
    """
    first = mask & ~F.pad(mask, (1, 0))[:, :-1]
    weights = discounts(mask, gamma, rewards.dtype, discount_floor)
    returns = (weights * rewards * mask).sum(-1) - (values * first).sum(-1)
    return returns / mask.sum(-1).clamp(min=1) if length_normalised else returns


def pair_means(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the response tokens of both answers of a pair; (P,) from (2P, T). Of r_t² it is the penalty.

    It is taken a pair at a time so that a pair's loss does not depend on its batch mates.
    """
    chosen, rejected = (values * mask).sum(-1).chunk(2)
    chosen_count, rejected_count = mask.sum(-1).chunk(2)
    return (chosen + rejected) / (chosen_count + rejected_count).clamp(min=1)


def preference_loss(returns: Tensor, penalty: Tensor, beta: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """Loss of each pair (P,): the Bradley-Terry term of the returns (2P,) plus β times the penalty (P,).

    With `label_smoothing` ε a pair counts as mislabelled with probability ε: (1−ε)·(−log σ(m)) + ε·(−log σ(−m)).
    """
    chosen, rejected = returns.chunk(2)
    margins = chosen - rejected
    bradley_terry = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    return bradley_terry + beta * penalty


def kl_divergence(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(softmax(logits) ‖ softmax(reference)) over the last dimension, in nats, from any unnormalised logits."""
    logps, reference_logps = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    return (logps.exp() * (logps - reference_logps)).sum(-1)


def shrinkage(kl: Tensor, threshold: Tensor | float) -> Tensor:
    """max(0, 1 − κ / KL), the share of a shift of logits that stands above a noise of κ = `threshold` nats.

    A small shift δ has a KL of Var(δ) / 2 under the reference. Where 2 κ of the variance is noise, this is the factor
    that brings δ nearest to the signal in the mean square (Wiener's, with James and Stein's positive part).

    Args:
        kl: at least 0, in nats.
        threshold: at least 0, of a shape that broadcasts.
    """
    above = kl > threshold
    return torch.where(above, 1.0 - threshold / torch.where(above, kl, 1.0), 0.0)  # gradients through 0 / 0 are NaN


def mix_streams(streams: Sequence[Tensor], coefficients: Sequence[float | Tensor]) -> Tensor:
    """Σ_k c_k · h_k in float32 (float64 stays): bf16 mixing would cost 1e-3 in log-probability.

    Args:
        streams: tensors of one shape (B, ...).
        coefficients: one a stream, a float or a tensor of the streams' leading dimensions, (B,) or (B, T).
    """
    dtype = torch.promote_types(streams[0].dtype, torch.float32)
    mixed = torch.zeros_like(streams[0], dtype=dtype)
    for stream, coefficient in zip(streams, coefficients, strict=True):
        if isinstance(coefficient, Tensor):
            coefficient = beside(coefficient.to(dtype), stream.dim())
        mixed = mixed + coefficient * stream.to(dtype)
    return mixed


def beside(values: Tensor, dimensions: int) -> Tensor:
    """Values (B, ...) or (), with as many trailing dimensions of size 1 as it takes."""
    return values.view(*values.shape, *[1] * (dimensions - values.dim()))
