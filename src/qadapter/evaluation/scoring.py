"""The few figures of measured texts and pairs that the quickstart reports."""

from collections.abc import Sequence

from qadapter.evaluation.columns import BASE
from qadapter.evaluation.drift import TextDrift
from qadapter.evaluation.intervals import Interval, bootstrap_mean, wilson
from qadapter.evaluation.preferences import PairDrift, win


def pair_summary(pairs: Sequence[PairDrift], column: str) -> dict[str, Interval]:
    """Preference figures of held-out pairs under a column, each with its 95% interval.

    accuracy: share of pairs whose log-ratio against the base ranks the chosen answer first (the base itself: ½);
    prefers_chosen, base_prefers_chosen: share whose chosen answer has the higher log-probability per token;
    margin_gain: policy's minus base's margin per token; kl: KL(policy ‖ base) per token of the chosen answers.
    """
    n = len(pairs)
    return {
        "accuracy": wilson(sum(win(pair.log_ratio_margin(column)) for pair in pairs), n),
        "prefers_chosen": wilson(sum(win(pair.token_margin(column)) for pair in pairs), n),
        "base_prefers_chosen": wilson(sum(win(pair.token_margin(BASE)) for pair in pairs), n),
        "margin_gain": bootstrap_mean([pair.token_margin(column) - pair.token_margin(BASE) for pair in pairs]),
        "kl": bootstrap_mean([pair.chosen.columns[column].kl.double().mean().item() for pair in pairs]),
    }


def drift_summary(drifts: Sequence[TextDrift], column: str) -> dict[str, Interval]:
    """Drift on texts: loss of policy and base, and KL(policy ‖ base), all per token; intervals over texts."""
    loss = [-drift.columns[column].logps.double().mean().item() for drift in drifts]
    base_loss = [-drift.base.logps.double().mean().item() for drift in drifts]
    return {
        "loss": bootstrap_mean(loss),
        "base_loss": bootstrap_mean(base_loss),
        "loss_change": bootstrap_mean([own - base for own, base in zip(loss, base_loss, strict=True)]),
        "kl": bootstrap_mean([drift.columns[column].kl.double().mean().item() for drift in drifts]),
    }
