"""From a batch to losses: which rows a method runs, which tokens it scores, and what it needs besides."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.experiments import losses
from qadapter.data.base_limits import RETAINED
from qadapter.fused import TokenStatistics
from qadapter.modeling import QAdapterForCausalLM
from qadapter.objective import response_mask, with_retention

Batch = Mapping[str, Any]
# (wrapped model, model, batch) -> loss of each pair (P,); the forward goes through the wrapped one.
Objective = Callable[[torch.nn.Module, QAdapterForCausalLM, Batch], Tensor]


def of_statistics(loss: Callable[..., Tensor], **options: object) -> Objective:
    """The objective of a loss on the statistics of both answers."""
    return of_settings(lambda statistics, mask, _: loss(statistics, mask, **options))


def of_settings(loss: Callable[..., Tensor], **options: object) -> Objective:
    """Likewise of a loss that takes the adapter's settings."""

    def objective(wrapped: torch.nn.Module, model: QAdapterForCausalLM, batch: Batch) -> Tensor:
        config = model.configs[model.adapters[0]]
        statistics, mask, retained = run(wrapped, batch)
        return with_retention(loss(statistics, mask, config, **options), statistics, mask, config.retention, retained)

    return objective


def run(wrapped: torch.nn.Module, batch: Batch) -> tuple[TokenStatistics, Tensor, list[bool] | None]:
    """Statistics and mask of a batch's response tokens, and which of its rows are texts for the retention."""
    batch = dict(batch)
    retained = batch.pop(RETAINED, None)
    return TokenStatistics(*wrapped(**batch)), response_mask(batch), retained


def authors(wrapped: torch.nn.Module, model: QAdapterForCausalLM, batch: Batch) -> Tensor:
    """The authors' released loss, which scores a shifted set of tokens."""
    batch = {**batch, "completion_mask": losses.shifted(batch["completion_mask"])}
    config = model.configs[model.adapters[0]]
    return losses.authors(TokenStatistics(*wrapped(**batch)), response_mask(batch), config)


def supervised(wrapped: torch.nn.Module, model: QAdapterForCausalLM, batch: Batch) -> Tensor:
    """Supervised loss of the chosen answers alone; the rejected ones are not run."""
    batch = chosen_rows(batch)
    return losses.token_nll(TokenStatistics(*wrapped(**batch)), response_mask(batch))


def supervised_with_kl(weight: float) -> Objective:
    """The same plus `weight` times the mean KL(policy ‖ base) over the chosen answers' tokens.

    The KL has a gradient where the policy's settings have the penalty "kl".
    """

    def objective(wrapped: torch.nn.Module, model: QAdapterForCausalLM, batch: Batch) -> Tensor:
        batch = chosen_rows(batch)
        statistics, mask = TokenStatistics(*wrapped(**batch)), response_mask(batch)
        kl = (statistics.kl * mask).sum(-1) * len(mask) / mask.sum()
        return losses.token_nll(statistics, mask) + weight * kl

    return objective


def kto(beta: float) -> Objective:
    """KTO, whose baseline takes one more pass without gradient."""

    def objective(wrapped: torch.nn.Module, model: QAdapterForCausalLM, batch: Batch) -> Tensor:
        mixed = mismatched(batch)
        with torch.no_grad():
            other = TokenStatistics(*wrapped(**mixed))
            ratios = losses.log_ratios(other, response_mask(mixed))
        return losses.kto(TokenStatistics(*wrapped(**batch)), response_mask(batch), beta, ratios)

    return objective


def chosen_rows(batch: Batch) -> Batch:
    """The chosen half of a batch."""
    return {name: tensor[: len(tensor) // 2] for name, tensor in batch.items()}


def mismatched(batch: Batch) -> dict[str, Tensor]:
    """Each row's prompt with the answer of the row before, cyclically (as TRL pairs them)."""
    ids, real, response = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    prompts = [row[(kept == 1) & ~mask.bool()] for row, kept, mask in zip(ids, real, response, strict=True)]
    answers = [row[mask.bool()] for row, mask in zip(ids, response, strict=True)]
    answers = [answers[-1], *answers[:-1]]
    rows = [torch.cat(parts) for parts in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    kept = torch.stack([torch.arange(width, device=ids.device) < len(row) for row in rows])
    starts = torch.tensor([len(prompt) for prompt in prompts], device=ids.device).unsqueeze(-1)
    return {
        "input_ids": torch.stack([F.pad(row, (0, width - len(row))) for row in rows]),
        "attention_mask": kept.long(),
        "completion_mask": kept & (torch.arange(width, device=ids.device) >= starts),
    }
