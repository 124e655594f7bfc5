"""Differences of each two columns over the same items, with paired intervals: which of two policies is better?"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from qadapter.evaluation.drift import TextDrift
from qadapter.evaluation.intervals import Interval, mcnemar_exact
from qadapter.evaluation.preferences import PairDrift, win
from qadapter.evaluation.resampling import paired_difference

OUTCOMES = {"policy": 1.0, "tie": 0.5, "base": 0.0}


def pair_items(pairs: Sequence[PairDrift], column: str) -> dict[str, list[float]]:
    """What a column makes of each pair."""
    return {
        "accuracy": [win(pair.log_ratio_margin(column)) for pair in pairs],
        "prefers_chosen": [win(pair.token_margin(column)) for pair in pairs],
        "token_margin": [pair.token_margin(column) for pair in pairs],
        "kl": [pair.chosen.mean_kl(column) for pair in pairs],
    }


def drift_items(drifts: Sequence[TextDrift], column: str) -> dict[str, list[float]]:
    """What a column makes of each text, in nats a token."""
    return {
        "kl": [drift.mean_kl(column) for drift in drifts],
        "loss": [-drift.columns[column].logps.double().mean().item() for drift in drifts],
    }


# (key, part of the results, item) of the differences in nats and shares.
FIGURES = (
    ("accuracy", "pairs", "accuracy"),
    ("prefers_chosen", "pairs", "prefers_chosen"),
    ("token_margin", "pairs", "token_margin"),
    ("kl_chosen", "pairs", "kl"),
    ("kl_neutral", "neutral", "kl"),
    ("loss_neutral", "neutral", "loss"),
    ("kl_instructions", "instructions", "kl"),
    ("loss_instructions", "instructions", "loss"),
)


def differences(results: Mapping[str, Any], columns: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """For each two columns, the earlier one subtracted from the later one.

    Each entry: column, minus, figures {key of `FIGURES`: interval}, judged {judge: interval of the difference of the
    win rates against the base}, and tasks {task: interval with mcnemar_p}.
    """
    return [
        {
            "column": later,
            "minus": earlier,
            "figures": dict(_figures(results, later, earlier, seed)),
            "judged": dict(_judged(results["judged"], later, earlier, seed)),
            "tasks": {
                task: _task(results["tasks"], task, later, earlier, seed) for task in results["tasks"]
            },
        }
        for earlier, later in combinations(columns, 2)
    ]  # fmt: skip


def _figures(results: Mapping[str, Any], later: str, earlier: str, seed: int) -> Iterator[tuple[str, Interval]]:
    for key, part, item in FIGURES:
        items = results[part]["items"]
        own, other = items["columns"][later][item], items["columns"][earlier][item]
        yield key, paired_difference(own, other, seed, items.get("groups"))


def _judged(judged: Sequence[Mapping[str, Any]], later: str, earlier: str, seed: int) -> Iterator[tuple[str, Interval]]:
    verdicts = {(entry["judge"], entry["column"]): entry["verdicts"] for entry in judged}
    for judge in dict.fromkeys(judge for judge, _ in verdicts):
        pairs = zip(verdicts[judge, later], verdicts[judge, earlier], strict=True)
        winners = [(own["winner"], other["winner"]) for own, other in pairs]
        known = [(OUTCOMES[own], OUTCOMES[other]) for own, other in winners if None not in (own, other)]
        own, other = ([outcomes[place] for outcomes in known] for place in (0, 1))
        yield judge, paired_difference(own, other, seed)


def _task(tasks: Mapping[str, Any], task: str, later: str, earlier: str, seed: int) -> dict[str, Any]:
    own, other = (
        [score for part in tasks[task].get("subtasks", [task]) for score in tasks[part]["scores"][column]]
        for column in (later, earlier)
    )
    p = mcnemar_exact(own, other) if {*own, *other} <= {0, 1} else None
    return {**paired_difference(own, other, seed)._asdict(), "mcnemar_p": p}


def without_items(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results as reports have them: without the values of single items."""
    kept = {name: part if name == "tasks" else _without(part, "items") for name, part in results.items()}
    return {**kept, "tasks": {task: _without(figures, "scores") for task, figures in results["tasks"].items()}}


def _without(part: Any, key: str) -> Any:
    return {name: value for name, value in part.items() if name != key} if isinstance(part, dict) else part
