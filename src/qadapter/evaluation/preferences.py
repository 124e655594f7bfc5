"""What the policy prefers on held-out pairs: accuracy, margins, accuracy at equal length, calibration."""

import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qadapter.evaluation.columns import BASE
from qadapter.evaluation.drift import TextDrift
from qadapter.evaluation.drift_figures import Figures
from qadapter.evaluation.intervals import Z95, Interval
from qadapter.evaluation.resampling import design_effect, mean_intervals, rate_interval
from qadapter.functional import discounts

CALIBRATION_BINS = 10
CHANCE_DRAWS = 200
# Standard deviation of the weak normal prior on both coefficients of the length control: without it, pairs that all
# agree would put them at infinity.
PRIOR_SCALE = 3.0
NEWTON_STEPS = 50
UNKNOWN = Interval(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Temperatures:
    """What turns log-probabilities into the return that the adapter was trained to give: α̃, α₀, discount, length."""

    alpha_tilde: float
    alpha_0: float
    gamma: float = 1.0
    discount_floor: float = 0.0
    length_normalised: bool = False


@dataclass(frozen=True)
class PairDrift:
    """Both answers of a pair under the base and every column.

    Args:
        logps: {column: log-probability of the chosen and of the rejected answer}.
    """

    chosen: TextDrift
    rejected: TextDrift
    logps: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, chosen: TextDrift, rejected: TextDrift) -> "PairDrift":
        """The pair of two measured answers."""
        sums = [
            {BASE: side.base.logps.double().sum().item()}
            | {name: drift.logps.double().sum().item() for name, drift in side.columns.items()}
            for side in (chosen, rejected)
        ]
        return cls(chosen, rejected, {name: (sums[0][name], sums[1][name]) for name in sums[0]})

    def margin(self, column: str) -> float:
        """log p(chosen) − log p(rejected), in nats."""
        chosen, rejected = self.logps[column]
        return chosen - rejected

    def token_margin(self, column: str) -> float:
        """The same with each answer's log-probability divided by its own number of tokens."""
        chosen, rejected = self.logps[column]
        return chosen / self.chosen.tokens - rejected / self.rejected.tokens

    def log_ratio_margin(self, column: str) -> float:
        """How much more the policy than the base prefers the chosen answer, in nats; exactly 0 for the base."""
        chosen, rejected = self.logps[column]
        base_chosen, base_rejected = self.logps[BASE]
        return (chosen - base_chosen) - (rejected - base_rejected)

    def reward_margin(self, column: str, temperatures: Temperatures) -> float:
        """Return of the chosen minus that of the rejected answer, each Σ_t w_t (α̃ log p − α₀ log π_b).

        Returns of adapters that are trained on returns a token are those over the answer's tokens.
        """

        def returned(side: TextDrift) -> float:
            policy = (side.base if column == BASE else side.columns[column]).logps.double()
            advantages = temperatures.alpha_tilde * policy - temperatures.alpha_0 * side.base.logps.double()
            response = torch.ones(1, side.tokens, dtype=torch.bool)
            weights = discounts(response, temperatures.gamma, torch.float64, temperatures.discount_floor)
            return (weights[0] @ advantages).item() / (side.tokens if temperatures.length_normalised else 1)

        return returned(self.chosen) - returned(self.rejected)

    @property
    def length_difference(self) -> int:
        """Tokens of the chosen minus tokens of the rejected answer."""
        return self.chosen.tokens - self.rejected.tokens


def paired(drifts: Sequence[TextDrift]) -> list[PairDrift]:
    """Pairs of texts that come chosen, rejected, chosen, rejected, ..."""
    return [PairDrift.of(*sides) for sides in zip(drifts[::2], drifts[1::2], strict=True)]


def reward_margins(pairs: Sequence[PairDrift], column: str, temperatures: Temperatures | None) -> list[float] | None:
    """The difference of the returns of each pair; None for a composition of adapters, which has no returns."""
    return None if temperatures is None else [pair.reward_margin(column, temperatures) for pair in pairs]


def preference_figures(
    pairs: Sequence[PairDrift],
    temperatures: Mapping[str, Temperatures | None],
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, Figures]:
    """{column: {figure: interval}}, the base first.

    accuracy: share of pairs whose log-ratio against the base ranks the chosen answer first (the base itself: ½ by
    definition, an interval of no width); accuracy_at_equal_length: the same, as a logistic regression on the length
    difference says it of pairs of one length; prefers_chosen, prefers_chosen_summed: share whose chosen answer has the
    higher log-probability per token, and in sum; log_ratio_margin, token_margin, token_margin_gain: see `PairDrift`,
    the last is policy's minus base's; reward_accuracy: share whose return, by the column's `temperatures`, ranks the
    chosen answer first (nan without).
    """
    names = [BASE, *(pairs[0].chosen.columns if pairs else ())]
    lengths = [pair.length_difference for pair in pairs]
    means = ("log_ratio_margin", "token_margin", "token_margin_gain")
    values = [
        [[pair.log_ratio_margin(name), pair.token_margin(name), pair.token_margin(name) - pair.token_margin(BASE)]
         for pair in pairs]
        for name in names
    ]  # fmt: skip
    matrix = torch.tensor(values, dtype=torch.float64).view(len(names), len(pairs), len(means))
    intervals = iter(mean_intervals(matrix.transpose(1, 2).flatten(0, 1), groups, seed))
    result = {}
    for name in names:
        wins = [win(pair.log_ratio_margin(name)) for pair in pairs]
        rewards = reward_margins(pairs, name, temperatures[name])
        chance = Interval(0.5, 0.5, 0.5, len(pairs)) if name == BASE else None
        result[name] = {
            "accuracy": chance or rate_interval(wins, groups),
            "accuracy_at_equal_length": chance or accuracy_at_equal_length(wins, lengths, groups),
            "prefers_chosen": rate_interval([win(pair.token_margin(name)) for pair in pairs], groups),
            "prefers_chosen_summed": rate_interval([win(pair.margin(name)) for pair in pairs], groups),
            "reward_accuracy": UNKNOWN if rewards is None else rate_interval(list(map(win, rewards)), groups),
            **{figure: next(intervals) for figure in means},
        }
    return result


def win(margin: float) -> float:
    """1 for a win, ½ for a tie, 0 for a loss (and for a margin that is not a number)."""
    return 0.5 if margin == 0 else float(margin > 0)


def accuracy_at_equal_length(
    wins: Sequence[float], length_differences: Sequence[float], groups: Sequence[Hashable] | None = None
) -> Interval:
    """The accuracy of pairs whose answers are equally long, σ(a) of P(win) = σ(a + b x), with a Laplace interval.

    x = tanh(Δ / root mean square of Δ), as in length-controlled AlpacaEval (arXiv 2404.04475). Where nearly all
    differences have one sign, equal length is an extrapolation, and the interval says so. Grouped pairs widen it by
    the design effect of the wins.
    """
    n = len(wins)
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, 0)
    scale = math.sqrt(math.fsum(d * d for d in length_differences) / n) or 1.0
    xs = [math.tanh(d / scale) for d in length_differences]
    a = b = 0.0
    for _ in range(NEWTON_STEPS):
        (g_a, g_b), (h_aa, h_ab, h_bb) = _derivatives(a, b, wins, xs)
        determinant = h_aa * h_bb - h_ab * h_ab
        step_a, step_b = (h_bb * g_a - h_ab * g_b) / determinant, (h_aa * g_b - h_ab * g_a) / determinant
        size = max(1.0, math.hypot(step_a, step_b))  # at most 1 at a time: the quadratic model is local
        a, b = a + step_a / size, b + step_b / size
        if size == 1.0 and abs(step_a) + abs(step_b) < 1e-12:
            break
    _, (h_aa, h_ab, h_bb) = _derivatives(a, b, wins, xs)
    error = math.sqrt(design_effect(wins, groups) * h_bb / (h_aa * h_bb - h_ab * h_ab))
    return Interval(_sigmoid(a), _sigmoid(a - Z95 * error), _sigmoid(a + Z95 * error), n)


def _derivatives(
    a: float, b: float, wins: Sequence[float], xs: Sequence[float]
) -> tuple[tuple[float, float], tuple[float, float, float]]:
    """Gradient and negative Hessian of the log-posterior."""
    prior = PRIOR_SCALE**-2
    g_a, g_b, h_aa, h_ab, h_bb = -prior * a, -prior * b, prior, 0.0, prior
    for y, x in zip(wins, xs, strict=True):
        p = _sigmoid(a + b * x)
        g_a, g_b = g_a + y - p, g_b + (y - p) * x
        weight = p * (1 - p)
        h_aa, h_ab, h_bb = h_aa + weight, h_ab + weight * x, h_bb + weight * x * x
    return (g_a, g_b), (h_aa, h_ab, h_bb)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def calibration(margins: Sequence[float] | None, groups: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """How well σ(reward margin) tells the chance that the chosen answer is ranked first.

    Every pair is turned so that the model's confidence is max(σ, 1 − σ) ≥ ½; `ece` is the mean gap between confidence
    and accuracy over bins of confidence, weighted by their size, `expected` the same of a calibrated model of as many
    pairs, and `bins` the reliability diagram; all are None without margins (see `reward_margins`).
    """
    if margins is None:
        return {"ece": None, "expected": None, "n": 0, "bins": None}
    bins: list[list[tuple[float, float]]] = [[] for _ in range(CALIBRATION_BINS)]
    members: list[list[Hashable]] = [[] for _ in range(CALIBRATION_BINS)]
    for margin, group in zip(margins, range(len(margins)) if groups is None else groups, strict=True):
        confidence = _sigmoid(abs(margin))
        index = min(int((confidence - 0.5) * 2 * CALIBRATION_BINS), CALIBRATION_BINS - 1)
        bins[index].append((confidence, win(margin)))
        members[index].append(group)
    rows = []
    for index, entries in enumerate(bins):
        if not entries:
            continue
        interval = rate_interval([correct for _, correct in entries], members[index])
        rows.append(
            {
                "from": 0.5 + index / (2 * CALIBRATION_BINS),
                "to": 0.5 + (index + 1) / (2 * CALIBRATION_BINS),
                "n": len(entries),
                "confidence": math.fsum(confidence for confidence, _ in entries) / len(entries),
                "accuracy": interval.value,
                "low": interval.low,
                "high": interval.high,
            }
        )
    n = len(margins)
    ece = math.fsum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / n if n else math.nan
    return {"ece": ece, "expected": _ece_by_chance([[c for c, _ in entries] for entries in bins]), "n": n, "bins": rows}


def _ece_by_chance(bins: Sequence[Sequence[float]]) -> float:
    """The mean calibration error of a model that is right just as often as its confidences (by bin) say."""
    n = sum(map(len, bins))
    if not n:
        return math.nan
    generator = random.Random(0)
    gaps = [
        abs(math.fsum((generator.random() < confidence) - confidence for confidence in entries))
        for _ in range(CHANCE_DRAWS)
        for entries in bins
    ]
    return math.fsum(gaps) / CHANCE_DRAWS / n


def by_category(
    pairs: Sequence[PairDrift],
    categories: Sequence[str | None],
    column: str,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, dict[str, Interval]]:
    """{category: {"accuracy", "prefers_chosen"}} of the pairs that have one."""
    result = {}
    for category in sorted({category for category in categories if category is not None}):
        places = [index for index, own in enumerate(categories) if own == category]
        members = [pairs[index] for index in places]
        own_groups = None if groups is None else [groups[index] for index in places]
        result[category] = {
            "accuracy": rate_interval([win(pair.log_ratio_margin(column)) for pair in members], own_groups),
            "prefers_chosen": rate_interval([win(pair.token_margin(column)) for pair in members], own_groups),
        }
    return result
