"""Scores of texts and pairs: sums over tokens, and the figures that summarise them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qadapter.errors import DataError
from qadapter.evaluation.columns import Column
from qadapter.evaluation.drift import BaseTokens, TokenDrift, measure_texts
from qadapter.evaluation.intervals import Interval, bootstrap_mean, wilson
from qadapter.evaluation.texts import Text
from qadapter.modeling import QAdapterForCausalLM

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Score:
    """One text (an answer after its prompt) under the trained policy and the base; sums over `tokens` tokens."""

    tokens: int
    logps: float
    base_logps: float
    kl: float
    entropy: float


@dataclass(frozen=True)
class PairScore:
    """Both answers of a pair."""

    chosen: Score
    rejected: Score

    @property
    def log_ratio_margin(self) -> float:
        """How much more the policy than the base prefers the chosen answer, in nats."""
        return (self.chosen.logps - self.chosen.base_logps) - (self.rejected.logps - self.rejected.base_logps)

    def token_margin(self, base: bool = False) -> float:
        """Mean log-probability per token of the chosen answer minus that of the rejected one."""
        if base:
            return self.chosen.base_logps / self.chosen.tokens - self.rejected.base_logps / self.rejected.tokens
        return self.chosen.logps / self.chosen.tokens - self.rejected.logps / self.rejected.tokens


def score_texts(
    model: QAdapterForCausalLM,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_tokens: int = 2048,
    progress: Progress | None = None,
    min_kl: float | None = None,
) -> list[Score]:
    """The score of each (context ids, answer ids), in order, by the policy at full strength.

    Args:
        batch_tokens: tokens a batch may hold, padding included (a longer text is a batch of its own).
        progress: called with the number of texts done since the last call.
        min_kl: threshold of the dial.

    Raises:
        DataError: a text without context, from which its first token would be predicted, or without answer.
    """
    column = Column("policy", min_kl=min_kl)
    return score_columns(model, texts, [column], batch_tokens, progress)[column.name]


def score_columns(
    model: QAdapterForCausalLM,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    columns: Sequence[Column],
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> dict[str, list[Score]]:
    """As `score_texts`, under each column's setting of the dial, by its name, from one pass over the texts."""
    for index, (context, answer) in enumerate(texts):
        if not len(context) or not len(answer):
            sizes = f"{len(context)} tokens of context and {len(answer)} of answer"
            raise DataError(f"text {index} has {sizes}: it needs at least one of each.")
    measured = measure_texts(model, [Text(*text) for text in texts], columns, batch_tokens, progress)
    return {column.name: [_score(text.base, text.columns[column.name]) for text in measured] for column in columns}


def _score(base: BaseTokens, policy: TokenDrift) -> Score:
    sums = (float(column.double().sum()) for column in (policy.logps, base.logps, policy.kl, policy.entropy))
    return Score(len(base.logps), *sums)


def score_pairs(model: QAdapterForCausalLM, pairs: Iterable[dict[str, Any]], **options: Any) -> list[PairScore]:
    """Scores of tokenised pairs (prompt_ids, chosen_ids, rejected_ids); options as of `score_texts`."""
    texts = [(pair["prompt_ids"], pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")]
    scores = score_texts(model, texts, **options)
    return [PairScore(*sides) for sides in zip(scores[::2], scores[1::2], strict=True)]


def pair_summary(scores: Sequence[PairScore]) -> dict[str, Interval]:
    """Preference figures of held-out pairs, each with its 95% interval.

    accuracy: share of pairs whose log-ratio against the base ranks the chosen answer first (the base itself: ½);
    prefers_chosen, base_prefers_chosen: share whose chosen answer has the higher log-probability per token;
    margin_gain: policy's minus base's margin per token; kl: KL(policy ‖ base) per token of the chosen answers.
    """
    n = len(scores)
    return {
        "accuracy": wilson(sum(_win(score.log_ratio_margin) for score in scores), n),
        "prefers_chosen": wilson(sum(_win(score.token_margin()) for score in scores), n),
        "base_prefers_chosen": wilson(sum(_win(score.token_margin(base=True)) for score in scores), n),
        "margin_gain": bootstrap_mean([score.token_margin() - score.token_margin(base=True) for score in scores]),
        "kl": bootstrap_mean([score.chosen.kl / score.chosen.tokens for score in scores]),
    }


def _win(margin: float) -> float:
    """1 for a win, ½ for a tie."""
    return 0.5 if margin == 0 else float(margin > 0)


def drift_summary(scores: Sequence[Score]) -> dict[str, Interval]:
    """Drift on texts: loss of policy and base, and KL(policy ‖ base), all per token; intervals over texts."""
    return {
        "loss": bootstrap_mean([-score.logps / score.tokens for score in scores]),
        "base_loss": bootstrap_mean([-score.base_logps / score.tokens for score in scores]),
        "loss_change": bootstrap_mean([(score.base_logps - score.logps) / score.tokens for score in scores]),
        "kl": bootstrap_mean([score.kl / score.tokens for score in scores]),
    }
