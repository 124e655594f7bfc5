"""Proximal policy optimisation of a LoRA against a reward model: KL penalty a token, value head, GAE, clipping.

TRL has no PPO for causal language models any more. The method is that of Ouyang et al. (arXiv 2203.02155) with the
details of Huang et al. (arXiv 2403.17031): the score comes at the last token, −κ (log π − log π_b) at every token, the
advantages are whitened, policy and value are clipped. Sizes: B rows, T columns, column t belongs to token t+1.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.experiments.reward_model import RewardModel, adapter_hidden
from benchmarks.experiments.settings import Training
from qadapter import QAdapterForCausalLM
from qadapter.functional import MixCoefficients
from qadapter.generation import encode, end_tokens, ending_arguments, until_end


@dataclass(frozen=True)
class PPOSettings:
    """kl_coefficient is the method's knob; the rest are the usual values."""

    kl_coefficient: float = 0.1
    max_new_tokens: int = 64
    rollouts: int = 32
    inner_epochs: int = 2
    clip: float = 0.2
    discount: float = 1.0
    trace: float = 0.95
    value_weight: float = 0.1


class Rollout(NamedTuple):
    """Sampled answers and what is known of them before the update; tensors (B, T-1) but for the first three."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    completion_mask: Tensor  # (B, T)
    logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def token_rewards(scores: Tensor, logps: Tensor, base_logps: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """−κ (log π − log π_b) at each response token (B, T), plus the score (B,) at the last one."""
    rewards = -kl_coefficient * (logps - base_logps) * mask
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, places, -1).amax(-1)
    rows = torch.arange(len(mask), device=mask.device)
    rewards[rows, last] = rewards[rows, last] + scores.to(rewards.dtype)
    return rewards


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float, trace: float
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets (B, T) by GAE (arXiv 1506.02438); response tokens form one run, V is 0 behind it."""
    advantages = torch.zeros_like(rewards)
    following, next_values = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        error = rewards[:, t] + discount * next_values - values[:, t]
        following = torch.where(mask[:, t], error + discount * trace * following, 0.0)
        next_values = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens of the mask, 0 elsewhere."""
    chosen = values[mask]
    return torch.where(mask, (values - chosen.mean()) / (chosen.var(unbiased=False) + 1e-8).sqrt(), 0.0)


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Clipped surrogate, mean over the response tokens."""
    ratio = (logps - old_logps).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(surrogate * mask).sum() / mask.sum()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Half the squared error, the larger one of the value's and of its clipped change's, mean over the tokens."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.maximum((values - returns).square(), (near - returns).square())
    return 0.5 * (errors * mask).sum() / mask.sum()


class PPO:
    """One policy, its value head and its reward model."""

    def __init__(
        self, policy: QAdapterForCausalLM, reward: RewardModel, tokenizer: Any, settings: PPOSettings, lr: float
    ) -> None:
        self.policy, self.reward, self.tokenizer, self.settings = policy, reward, tokenizer, settings
        size = policy.config.get_text_config(decoder=True).hidden_size
        self.value_head = nn.Linear(size, 1).to(policy.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.parameters = [p for p in policy.parameters() if p.requires_grad] + list(self.value_head.parameters())
        self.optimiser = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)
        self.ends = end_tokens(policy, tokenizer)

    def policy_outputs(self, rollout: Any) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the response tokens and values of the states before them, (B, T-1), 0 elsewhere."""
        hidden = adapter_hidden(self.policy, rollout.input_ids, rollout.attention_mask)[:, :-1]
        mask = rollout.completion_mask[:, 1:].bool()
        states = hidden[mask]
        adapter = self.policy.adapters[0]
        statistics = self.policy.head.statistics(
            adapter, states, states.detach(), MixCoefficients(1.0, 0.0), rollout.input_ids[:, 1:][mask],
            self.policy.plan,
        )  # fmt: skip
        values = self.value_head(states.float()).squeeze(-1)
        logps = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_scatter(
            mask, statistics.logps.float()
        )
        return logps, torch.zeros_like(logps).masked_scatter(mask, values)

    @torch.no_grad()
    def roll_out(self, prompts: Sequence[Any]) -> tuple[Rollout, dict[str, float]]:
        """Sample an answer a prompt at temperature 1, score it, and estimate the advantages."""
        self.policy.eval()
        device = self.policy.device
        batch = {name: tensor.to(device) for name, tensor in encode(self.tokenizer, prompts).items()}
        ids = self.policy.generate(
            **batch, max_new_tokens=self.settings.max_new_tokens, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
            **ending_arguments(self.ends, self.tokenizer), strength=1.0,
        )  # fmt: skip
        width = batch["input_ids"].shape[1]
        response = until_end(ids[:, width:], self.ends)
        completion = torch.cat([torch.zeros_like(batch["attention_mask"]).bool(), response], 1)
        attention = torch.cat([batch["attention_mask"], response.long()], 1)
        scores = self.reward(ids, attention)
        statistics = self.policy.token_statistics(ids, attention, completion)
        mask = completion[:, 1:]
        rollout = Rollout(ids, attention, completion, *[torch.empty(0)] * 4)
        logps, values = self.policy_outputs(rollout)
        rewards = token_rewards(scores, logps, statistics.base_logps.float(), mask, self.settings.kl_coefficient)
        advantages, returns = generalised_advantages(rewards, values, mask, self.settings.discount, self.settings.trace)
        kl = ((logps - statistics.base_logps.float()) * mask).sum() / mask.sum()
        figures = {"score": float(scores.mean()), "kl": float(kl), "tokens": float(mask.sum(-1).float().mean())}
        return rollout._replace(
            logps=logps, values=values, advantages=whitened(advantages, mask), returns=returns
        ), figures

    def update(self, rollout: Rollout, micro_batch: int, order: random.Random) -> None:
        """`inner_epochs` passes over the rollout, one optimiser step a pass over all of its minibatches."""
        self.policy.train()
        rows = list(range(len(rollout.input_ids)))
        for _ in range(self.settings.inner_epochs):
            order.shuffle(rows)
            parts = [rows[start : start + micro_batch] for start in range(0, len(rows), micro_batch)]
            for part in parts:
                piece = Rollout(*(tensor[part] for tensor in rollout))
                mask = piece.completion_mask[:, 1:]
                logps, values = self.policy_outputs(piece)
                loss = policy_loss(logps, piece.logps, piece.advantages, mask, self.settings.clip)
                loss = loss + self.settings.value_weight * value_loss(
                    values, piece.values, piece.returns, mask, self.settings.clip
                )
                (loss * len(part) / len(rows)).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad()


def train_ppo(ppo: PPO, prompts: Sequence[Any], training: Training, seed: int) -> dict[str, Any]:
    """As many sampled answers as the other methods have pairs: one a row of `prompts`, for each epoch."""
    order = random.Random(seed)
    torch.manual_seed(seed)
    rows = list(prompts)
    total = max(1, round(len(rows) * training.epochs))
    order.shuffle(rows)
    queue = [rows[index % len(rows)] for index in range(total)]
    groups = [queue[start : start + ppo.settings.rollouts] for start in range(0, total, ppo.settings.rollouts)]
    schedule = torch.optim.lr_scheduler.LambdaLR(ppo.optimiser, lambda step: 1 - step / len(groups))
    curve = []
    for group in groups:
        rollout, figures = ppo.roll_out(group)
        ppo.update(rollout, training.micro_batch, order)
        schedule.step()
        curve.append(figures)
    ppo.policy.eval()
    return {"steps": len(groups), "rollouts": total, "curve": curve}
