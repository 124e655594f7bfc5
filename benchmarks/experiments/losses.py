"""Losses of every method on pairs, from the same fused statistics: same batches, same code path, same LoRA.

Each takes `TokenStatistics` (B, T) of 2P rows, chosen first, and the mask of response tokens (B, T), and gives the loss
of each pair (P,), whose mean is minimised. tests/experiments compares them with TRL's own on whole models.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qadapter import functional
from qadapter.config import QAdapterConfig
from qadapter.errors import ConfigError
from qadapter.fused import TokenStatistics
from qadapter.objective import implied, loss_and_penalty


def dpo(
    statistics: TokenStatistics,
    mask: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    length_normalised: bool = False,
    sft_weight: float = 0.0,
    discount: float = 1.0,
) -> Tensor:
    """Direct preference optimisation (arXiv 2305.18290), with conservative label smoothing.

    `length_normalised` takes log-ratios a token (LN-DPO, arXiv 2411.15124); `sft_weight` adds the NLL of the chosen
    answers (RPO, arXiv 2404.19733); `discount` weighs the log-ratio of the answer's t-th token by discountᵗ (D²PO,
    arXiv 2502.14340).
    """
    weights = mask * functional.discounts(mask, discount, statistics.logps.dtype)
    margins = beta * log_ratio_margins(statistics, weights, length_normalised)
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    return losses + sft_weight * chosen_nll(statistics, mask)


def ipo(statistics: TokenStatistics, mask: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation (arXiv 2310.12036) on log-ratios a token, as its authors run it."""
    return (log_ratio_margins(statistics, mask, per_token=True) - 1 / (2 * beta)).square()


def simpo(statistics: TokenStatistics, mask: Tensor, beta: float, margin: float) -> Tensor:
    """SimPO (arXiv 2405.14734): log-probabilities a token, no reference, a target margin γ."""
    # An answer without a token is that of a text (`qadapter.data.retained`), whose loss is another.
    chosen, rejected = ((statistics.logps * mask).sum(-1) / mask.sum(-1).clamp(min=1)).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected) - margin)


def kto(statistics: TokenStatistics, mask: Tensor, beta: float, mismatched: Tensor) -> Tensor:
    """KTO (arXiv 2402.01306): both answers judged by themselves against a baseline.

    Args:
        mismatched: log-ratios (B,) of answers to other prompts; their mean, at least 0, is the baseline.
    """
    baseline = mismatched.mean().clamp(min=0)
    chosen, rejected = log_ratios(statistics, mask).chunk(2)
    return (2 - torch.sigmoid(beta * (chosen - baseline)) - torch.sigmoid(beta * (baseline - rejected))) / 2


def token_nll(statistics: TokenStatistics, mask: Tensor) -> Tensor:
    """Supervised fine-tuning: contributions (B,) of the rows, whose mean is the mean NLL over the batch's tokens."""
    return -(statistics.logps * mask).sum(-1) * len(mask) / mask.sum()


def chosen_nll(statistics: TokenStatistics, mask: Tensor) -> Tensor:
    """Mean NLL a token of each pair's chosen answer, (P,)."""
    return -((statistics.logps * mask).sum(-1) / mask.sum(-1)).chunk(2)[0]


def replay(statistics: TokenStatistics, mask: Tensor, weight: float) -> Tensor:
    """Supervised loss of the chosen answers, plus `weight` times that of the base's own, which are the last rows."""
    parts = (TokenStatistics(*part) for part in zip(*(column.chunk(2) for column in statistics), strict=True))
    chosen, own = (token_nll(part, rows) for part, rows in zip(parts, mask.chunk(2), strict=True))
    return (chosen + weight * own) / (1 + weight)


def qadapter(
    statistics: TokenStatistics,
    mask: Tensor,
    config: QAdapterConfig,
    value_at: str = "next",
    penalty: str | None = None,
    margin: float = 0.0,
    normalised: str | None = None,
    sft_weight: float = 0.0,
) -> Tensor:
    """The package's objective (the defaults of the last five arguments), and the variants that ablations ask for.

    Args:
        value_at: "next" subtracts γ V(s_{t+1}), "current" γ V(s_t) as the authors' code does. Nothing of V(s_0) is
            left of the latter to be taken off: with γ = 1 both have the same returns, and the penalty alone differs.
        penalty: what β penalises: what the settings say ("reward" or "kl"), or the squares of the "reward", of the
            "residual" Q, or of the "advantage" Q − V(s_t), which is α̃ log π̃ − α₀ log π_b.
        margin: subtracted from the difference of returns.
        normalised: "pair" divides both answers' returns by the mean of their lengths, which leaves a token of the
            shorter answer, its end above all, no heavier than one of the longer; None is what the settings say.
        sft_weight: of the chosen answers' NLL, which takes them for demonstrations of the policy, too.
    """
    if normalised not in (None, "pair"):
        raise ConfigError(f"normalised = {normalised!r}: choose pair, or leave it out.")
    if value_at == "current" and config.discount_floor:
        raise ConfigError("value_at = 'current' is of the authors' sums, which know no floor of the discount.")
    q, values, rewards, returns = implied(statistics, mask, config)
    if value_at == "current":
        rewards = (q - config.gamma * values) * mask
        settings = config.gamma, config.length_normalised
        returns = functional.response_returns(rewards, torch.zeros_like(values), mask, *settings)
    if normalised == "pair":
        returns = returns / mask.sum(-1).view(2, -1).to(returns.dtype).mean(0).repeat(2)
    returns = returns - margin * torch.arange(len(returns), device=returns.device).lt(len(returns) // 2)
    penalised = {
        "kl": statistics.kl,
        "reward": rewards.square(),
        "residual": q.square(),
        "advantage": ((q - values) * mask).square(),
    }[penalty or config.penalty]
    loss, _ = loss_and_penalty(returns, penalised, mask, config)
    return loss + sft_weight * chosen_nll(statistics, mask)


def authors(statistics: TokenStatistics, scored: Tensor, config: QAdapterConfig) -> Tensor:
    """The authors' released loss, faults and all (see authors.py), from statistics of the tokens that it scores.

    Args:
        scored: (B, T) True where the token *before* is a response token: `shifted` completion mask.
    """
    q = functional.q_values(statistics.logits, statistics.base_logits, config.alpha_tilde, config.alpha_0)
    values = functional.soft_values(statistics.lse, statistics.base_lse, config.alpha_tilde, config.alpha_0)
    rewards = (q - config.gamma * values) * scored
    chosen, rejected = (rewards.sum(-1) / scored.shape[1]).chunk(2)
    return -F.logsigmoid(chosen - rejected) + config.beta * rewards.square().sum() / scored.sum()


def shifted(completion_mask: Tensor) -> Tensor:
    """The mask (B, T) one token later: from the second response token to the one after the last."""
    return F.pad(completion_mask[:, :-1], (1, 0))


def log_ratios(statistics: TokenStatistics, mask: Tensor) -> Tensor:
    """Σ_t log π̃(a_t|s_t) − log π_b(a_t|s_t) of each row (B,): how much more likely the policy finds the response.

    Args:
        mask: (B, T) which tokens count, or with what weight.
    """
    return ((statistics.logps - statistics.base_logps) * mask).sum(-1)


def log_ratio_margins(statistics: TokenStatistics, mask: Tensor, per_token: bool = False) -> Tensor:
    """Log-ratio of the chosen minus that of the rejected answer, (P,); `per_token`, each over its own length.

    Args:
        mask: (B, T) which tokens count, or with what weight.
    """
    ratios = log_ratios(statistics, mask)
    chosen, rejected = (ratios / mask.sum(-1).clamp(min=1) if per_token else ratios).chunk(2)
    return chosen - rejected
