"""Where a customisation did harm, by name: the groups of texts, tasks and answers whose interval says so."""

from collections.abc import Iterator, Mapping
from typing import Any

from qadapter.evaluation.gate import KL_PARTS, figures_of

# Rises of the loss below this many nats a token are not worth a line, however certain.
SMALLEST_RISE = 0.01
GROUPS = {"category": "category {}", "token": "tokens of the kind {}", "position": "tokens {}"}
BAD_TRAITS = ("empty", "cut off", "repeats itself", "in another language", "in no language that is known")


def findings(results: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """What got worse and whose whole 95% interval says so, kind by kind, the worst first; losses come last.

    Each entry: kind, what (for people), figure, value, low, high, n. Many groups are looked at: of those where nothing
    changed, about one in forty is named by chance.
    """
    named = [*_tasks(results, column), *_answers(results, column), *_judges(results, column), *_pairs(results, column)]
    return [*named, *_losses(results, column)]


def _losses(results: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    entries = []
    for part, title in KL_PARTS:
        measured = figures_of(results, part)
        everything = measured["columns"][column]["loss_change"]
        if part != "chosen":
            entries.append(_entry("loss", title, "change of the loss, nats a token", everything))
        for kind, groups in measured["breakdown"][column].items():
            if len(groups) == 1:  # the whole set once more
                continue
            for name, figures in groups.items():
                if _above(figures["loss_change"]["value"], everything["value"]):  # worse than the set as a whole
                    what = f"{title}, {GROUPS[kind].format(name)}"
                    entries.append(_entry("loss", what, "change of the loss, nats a token", figures["loss_change"]))
    kept = [entry for entry in entries if _above(entry["low"], 0.0) and _above(entry["value"], SMALLEST_RISE)]
    return sorted(kept, key=lambda entry: -entry["value"])


def _tasks(results: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    entries = [
        _entry("task", f"benchmark {task}", f"change of {figures['metric']}",
               {**figures["differences"][column], "n": figures["n"]})
        for task, figures in results["tasks"].items()
    ]  # fmt: skip
    better = [figures["higher_is_better"] for figures in results["tasks"].values()]
    worse = [entry for entry, higher in zip(entries, better, strict=True) if _fell(entry, higher)]
    return sorted(worse, key=lambda entry: -abs(entry["value"]))


def _fell(entry: Mapping[str, Any], higher_is_better: bool) -> bool:
    if higher_is_better:
        return entry["high"] is not None and entry["high"] < 0
    return _above(entry["low"], 0.0)


def _answers(results: Mapping[str, Any], column: str) -> Iterator[dict[str, Any]]:
    columns = results["behaviour"]["columns"]
    base, own = columns["base"], columns[column]
    for trait in BAD_TRAITS:
        now, before = own["traits"][trait], base["traits"][trait]
        if _above(own["changes"][trait]["low"], 0.0):
            what = f"answers to general instructions: {trait}"
            if trait == "in another language":
                what += f" ({base['language']} became {own['language']})"
            yield _entry("answers", what, f"share, base {before['value']:.0%}", now)


def _pairs(results: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    groups = {"all held-out pairs": results["pairs"]["columns"][column]}
    for name, figures in results["pairs"]["categories"].get(column, {}).items():
        groups[f"held-out pairs, category {name}"] = figures
    entries = [_entry("pairs", name, "accuracy", figures["accuracy"]) for name, figures in groups.items()]
    return [entry for entry in entries if entry["high"] is not None and entry["high"] < 0.5]


def _judges(results: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    entries = [
        _entry("judge", f"answers to held-out prompts, judge {judged['judge']}", "win rate against the base",
               judged["rate"])
        for judged in results["judged"]
        if judged["column"] == column
    ]  # fmt: skip
    return [entry for entry in entries if entry["high"] is not None and entry["high"] < 0.5]


def _above(value: float | None, bound: float | None) -> bool:
    return value is not None and bound is not None and value > bound


def _entry(kind: str, what: str, figure: str, interval: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": kind,
        "what": what,
        "figure": figure,
        "value": interval["value"],
        "low": interval["low"],
        "high": interval["high"],
        "n": interval["n"],
    }
