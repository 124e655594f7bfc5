"""The next token of every row, each row by its own rules and its own random numbers."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qadapter.devices import widest_float
from qadapter.generation import GREEDY_TEMPERATURE


@dataclass(frozen=True)
class SamplingRules:
    """How tokens are drawn: OpenAI's parameters of the same names.

    Args:
        top_logprobs: how many alternatives to report with each token; None reports no log-probabilities.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int | None = None


class Chosen(NamedTuple):
    """A token with its log-probability under the policy, before temperature and penalties, and the likeliest ones."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Sampler:
    """The state of one answer's sampling: what it has said, and its random numbers.

    One uniform number a token, from a generator of its own, so that nobody else's tokens change this answer. Python's
    generator gives the same numbers on every machine; torch's differ between devices.
    """

    def __init__(self, rules: SamplingRules, seed: int | str) -> None:
        self.rules = rules
        self.counts: Counter[int] = Counter()
        self._random = random.Random(seed)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.rules.temperature < GREEDY_TEMPERATURE

    @property
    def penalised(self) -> bool:
        """Whether what was said before changes what comes next."""
        return bool(self.counts) and (self.rules.presence_penalty != 0 or self.rules.frequency_penalty != 0)

    def uniform(self) -> float:
        """The next random number in [0, 1)."""
        return self._random.random()


def choose_tokens(logits: Tensor, samplers: Sequence[Sampler]) -> list[Chosen]:
    """The next token of each row of `logits` (R, V), which each sampler then counts as said."""
    scores = with_penalties(logits, samplers)
    tokens = scores.argmax(-1)  # (R,)
    rows = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if rows:
        rules = [samplers[row].rules for row in rows]
        wide = widest_float(logits.device)

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=wide, device=logits.device).unsqueeze(-1)

        probs = (scores[rows].to(wide) / column([rule.temperature for rule in rules])).softmax(-1)
        if any(rule.top_p < 1 for rule in rules):
            probs = nucleus(probs, column([rule.top_p for rule in rules]))
        tokens[rows] = drawn(probs, column([samplers[row].uniform() for row in rows]))
    chosen = with_logprobs(logits, tokens, [sampler.rules.top_logprobs for sampler in samplers])
    for sampler, choice in zip(samplers, chosen, strict=True):
        sampler.counts[choice.token] += 1
    return chosen


def with_penalties(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Logits (R, V) less what each row's own earlier tokens cost: presence once, frequency for each time."""
    rows = [row for row, sampler in enumerate(samplers) if sampler.penalised]
    if not rows:
        return logits
    scores = logits.clone()
    for row in rows:
        counts, rules = samplers[row].counts, samplers[row].rules
        tokens = torch.tensor(list(counts.keys()), device=logits.device)
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        scores[row, tokens] -= rules.presence_penalty + rules.frequency_penalty * times
    return scores


def nucleus(probs: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities (R, V), zero outside the fewest likeliest tokens that hold `top_p` (R, 1) of the mass.

    The likeliest one is always among them.
    """
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = (before < top_p) | (top_p >= 1) | (before == 0)
    return torch.zeros_like(probs).scatter(-1, order, ordered * kept)


def drawn(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The tokens (R,) at which the cumulated probabilities (R, V) pass `uniforms` (R, 1) of their total.

    In the vocabulary's order: it does not depend on how near ties are sorted, which batch mates could change.
    """
    cumulated = probs.cumsum(-1)
    total = cumulated[:, -1:].contiguous()
    passed = torch.searchsorted(cumulated, uniforms * total, right=True)
    return torch.minimum(passed, torch.searchsorted(cumulated, total)).squeeze(-1)


def with_logprobs(logits: Tensor, tokens: Tensor, top_logprobs: Sequence[int | None]) -> list[Chosen]:
    """The tokens (R,) with what `logits` (R, V) make of them and of as many alternatives as each row reports."""
    chosen = [Chosen(token, None, ()) for token in tokens.tolist()]
    rows = [row for row, count in enumerate(top_logprobs) if count is not None]
    if not rows:
        return chosen
    logps = logits[rows].log_softmax(-1)
    most = max(top_logprobs[row] or 0 for row in rows)
    values, indices = logps.topk(min(most, logps.shape[-1]))
    own = logps.gather(-1, tokens[rows].unsqueeze(-1)).squeeze(-1).tolist()
    for row, logprob, likeliest in zip(rows, own, zip(indices.tolist(), values.tolist(), strict=True), strict=True):
        top = tuple(zip(*likeliest, strict=True))[: top_logprobs[row]]
        chosen[row] = Chosen(chosen[row].token, logprob, top)
    return chosen
