"""From the fused statistics of a batch to rewards and losses, under an adapter's settings."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qadapter import functional
from qadapter.config import QAdapterConfig
from qadapter.fused import TokenStatistics


class ImpliedRewards(NamedTuple):
    """What a trained adapter says of each response token (B, T) and of each response (B,)."""

    q: Tensor  # Q(s_t, a_t)
    values: Tensor  # V(s_t), of the state before the token
    rewards: Tensor  # Q(s_t, a_t) − γ_t V(s_{t+1}), zero outside the mask
    returns: Tensor  # Σ_t w_t rewards − V(s_0), divided by the response's own length if the settings say so


def response_mask(batch: Mapping[str, Any]) -> Tensor:
    """Which columns of a batch's statistics are response tokens: (B, T-1), or (2P, N) of packed rows."""
    return batch["completion_mask"] if "gather_indices" in batch else batch["completion_mask"][:, 1:].bool()


def implied(statistics: TokenStatistics, mask: Tensor, config: QAdapterConfig) -> ImpliedRewards:
    """Q, V and rewards of the response tokens that `mask` (B, T) marks."""
    q = functional.q_values(statistics.logits, statistics.base_logits, config.alpha_tilde, config.alpha_0)
    values = functional.soft_values(statistics.lse, statistics.base_lse, config.alpha_tilde, config.alpha_0)
    rewards = functional.implied_rewards(q, values, mask, config.gamma, config.discount_floor)
    returns = functional.response_returns(
        rewards, values, mask, config.gamma, config.length_normalised, config.discount_floor
    )
    return ImpliedRewards(q * mask, values * mask, rewards, returns)


def pair_losses(
    statistics: TokenStatistics, mask: Tensor, config: QAdapterConfig, retained: Sequence[bool] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each pair (P,), and detached quantities for the metrics: per row (B,), pair (P,) or token (B, T).

    Args:
        retained: which of the pairs are texts, see `with_retention`.
    """
    _, values, rewards, returns = implied(statistics, mask, config)
    penalised = statistics.kl if config.penalty == "kl" else rewards.square()
    losses, penalty = loss_and_penalty(returns, penalised, mask, config)
    losses = with_retention(losses, statistics, mask, config.retention, retained)
    with torch.no_grad():
        quantities = {
            "losses": losses.detach(),
            "returns": returns.detach(),
            "logps": (statistics.logps * mask).sum(-1),
            "penalty": penalty.detach(),
            "values": values.detach(),
            "kl": statistics.kl.detach(),
            "entropy": statistics.entropy,
        }
    return losses, quantities


def loss_and_penalty(returns: Tensor, penalised: Tensor, mask: Tensor, config: QAdapterConfig) -> tuple[Tensor, Tensor]:
    """Loss and penalty of each pair, both (P,).

    Args:
        returns: of the responses, (2P,).
        penalised: of each token, (2P, T): what β weighs the mean of.
    """
    penalty = functional.pair_means(penalised, mask)
    return functional.preference_loss(returns, penalty, config.beta, config.label_smoothing), penalty


def with_retention(
    losses: Tensor, statistics: TokenStatistics, mask: Tensor, weight: float, retained: Sequence[bool] | None
) -> Tensor:
    """The losses (P,), but of texts `weight` times the mean of KL(π̃ ‖ π_b) over their tokens: no pair speaks of them.

    Args:
        retained: which of the pairs are texts (`qadapter.data.retained`); None: none is.
    """
    if retained is None:
        return losses
    drift = functional.pair_means(statistics.kl, mask)
    return torch.where(torch.tensor(retained, device=losses.device), weight * drift, losses)
