"""Figures of drift with intervals: of whole sets of texts, and by category, kind of token and position.

The unit is the text: each figure is the mean over texts of the mean over a text's tokens.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from qadapter.evaluation.columns import BASE
from qadapter.evaluation.drift import TextDrift, TokenDrift
from qadapter.evaluation.intervals import Interval
from qadapter.evaluation.resampling import mean_intervals
from qadapter.evaluation.texts import Text

Figures = dict[str, Interval]

DRIFT_FIGURES = ("loss", "loss_change", "kl", "reverse_kl", "entropy", "entropy_change", "agreement")
# What no figure's interval leaves; changes have no such ends.
ENDS = {"agreement": (0.0, 1.0)} | dict.fromkeys(("loss", "kl", "reverse_kl", "entropy"), (0.0, math.inf))
BREAKDOWN_FIGURES = ("loss_change", "kl", "agreement")
# The first token of each bucket of positions.
POSITION_STARTS = (0, 8, 32, 128, 512)
POSITION_NAMES = ("1-8", "9-32", "33-128", "129-512", "513-")
TOKEN_KINDS = ("words", "numbers", "punctuation", "other scripts", "spaces and line breaks", "special tokens", "other")


def drift_figures(
    drifts: Sequence[TextDrift], groups: Sequence[Hashable] | None = None, seed: int = 0
) -> dict[str, Figures]:
    """{column: {figure: interval}}, the base first, in nats a token.

    loss: cross-entropy; loss_change: policy's minus base's; kl: KL(policy ‖ base); reverse_kl: KL(base ‖ policy);
    entropy, entropy_change: of the predicted distribution; agreement: share of tokens with the same likeliest token.
    """
    names = list(drifts[0].columns) if drifts else []
    columns = [torch.stack([_base_means(drift) for drift in drifts], 1)] if drifts else []
    columns += [torch.stack([_means(drift, name) for drift in drifts], 1) for name in names]
    if not columns:
        return {}
    figures = _figures(DRIFT_FIGURES * len(columns), torch.cat(columns), groups, seed)
    return {name: dict(islice(figures, len(DRIFT_FIGURES))) for name in (BASE, *names)}


def _figures(
    names: Sequence[str], values: Tensor, groups: Sequence[Hashable] | None, seed: int
) -> Iterator[tuple[str, Interval]]:
    """Each figure with the interval of its row of `values`."""
    for name, interval in zip(names, mean_intervals(values, groups, seed), strict=True):
        low, high = ENDS.get(name, (-math.inf, math.inf))
        # The interval's own end first: max and min keep it where it is not a number.
        yield name, interval._replace(low=max(interval.low, low), high=min(interval.high, high))


def token_figures(drift: TextDrift, column: str) -> Tensor:
    """The figures of `DRIFT_FIGURES` of each token, (7, T)."""
    base, policy = drift.base, drift.columns[column]
    values = {
        "loss": -policy.logps,
        "loss_change": base.logps - policy.logps,
        "kl": policy.kl,
        "reverse_kl": policy.reverse_kl,
        "entropy": policy.entropy,
        "entropy_change": policy.entropy - base.entropy,
        "agreement": policy.agreement,
    }
    return torch.stack([values[figure] for figure in DRIFT_FIGURES]).double()


def _means(drift: TextDrift, column: str) -> Tensor:
    return token_figures(drift, column).mean(-1)


def _base_means(drift: TextDrift) -> Tensor:
    base = drift.base
    zero, one = torch.zeros_like(base.logps), torch.ones_like(base.logps)
    return _means(TextDrift(base, {BASE: TokenDrift(base.logps, zero, zero, base.entropy, one, base.greedy)}), BASE)


def breakdown(
    drifts: Sequence[TextDrift],
    column: str,
    labels: Sequence[Tensor],
    names: Sequence[str],
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, Figures]:
    """{name: {figure of BREAKDOWN_FIGURES: interval}} of the tokens under each label; names without tokens are absent.

    Args:
        labels: for each text the number of the name that each token belongs to, (T,).
        groups: which texts belong together, as in `mean_intervals`.
    """
    kept = [DRIFT_FIGURES.index(figure) for figure in BREAKDOWN_FIGURES]
    means: list[list[Tensor]] = [[] for _ in names]
    members: list[list[Hashable]] = [[] for _ in names]
    together = range(len(drifts)) if groups is None else groups
    for drift, label, group in zip(drifts, labels, together, strict=True):
        values = token_figures(drift, column)[kept]  # (3, T)
        sums = torch.zeros(len(kept), len(names), dtype=values.dtype).index_add_(1, label, values)
        counts = torch.bincount(label, minlength=len(names))
        for index in counts.nonzero().flatten().tolist():
            means[index].append(sums[:, index] / counts[index])
            members[index].append(group)
    return {
        name: dict(_figures(BREAKDOWN_FIGURES, torch.stack(rows, 1), own, seed))
        for name, rows, own in zip(names, means, members, strict=True)
        if rows
    }


def breakdowns(
    drifts: Sequence[TextDrift],
    texts: Sequence[Text],
    column: str,
    tokenizer: Any,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Figures]]:
    """{"category": ..., "token": ..., "position": ...}, each as of `breakdown`; category where texts have one."""
    result = {}
    categories = sorted({text.category for text in texts if text.category is not None})
    if categories:
        labelled = [index for index, text in enumerate(texts) if text.category is not None]
        result["category"] = breakdown(
            [drifts[index] for index in labelled],
            column,
            [torch.full((drifts[index].tokens,), categories.index(texts[index].category or "")) for index in labelled],
            categories,
            None if groups is None else [groups[index] for index in labelled],
            seed,
        )
    kinds = token_kinds(tokenizer, {token for text in texts for token in text.answer})
    by_kind = [torch.tensor([TOKEN_KINDS.index(kinds[token]) for token in text.answer]) for text in texts]
    result["token"] = breakdown(drifts, column, by_kind, TOKEN_KINDS, groups, seed)
    starts = torch.tensor(POSITION_STARTS)
    by_position = [torch.bucketize(torch.arange(drift.tokens), starts, right=True) - 1 for drift in drifts]
    result["position"] = breakdown(drifts, column, by_position, POSITION_NAMES, groups, seed)
    return result


def token_kinds(tokenizer: Any, tokens: set[int]) -> Mapping[int, str]:
    """The entry of `TOKEN_KINDS` that each token id is counted under."""
    special = set(tokenizer.all_special_ids)
    return {
        token: "special tokens" if token in special else _kind(tokenizer.decode([token])) for token in sorted(tokens)
    }


def _kind(text: str) -> str:
    if not text.strip():
        return "spaces and line breaks"
    if any(character.isdigit() for character in text):
        return "numbers"
    if "\N{REPLACEMENT CHARACTER}" in text:  # part of a character
        return "other"
    if any(character.isalpha() and not is_latin(character) for character in text):
        return "other scripts"
    return "words" if any(character.isalpha() for character in text) else "punctuation"


def is_latin(character: str) -> bool:
    """Whether a letter is of the Latin script, whose letters lie below U+0250 and in U+1E00-1EFF."""
    return character < "\u0250" or "\u1e00" <= character <= "\u1eff"
