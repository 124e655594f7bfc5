"""Benchmarks of choices scored by log-likelihood, as lm-eval does, at every strength from one pass over the base.

The rows and prompts are those of the package's task files; an item's score is 1 where the right choice is the likeliest
(LAMBADA: where each token of the last word is). A test compares them with lm-eval's own scores.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.measure import STRENGTH, lost
from benchmarks.experiments.pools import read_lines
from benchmarks.experiments.settings import Measuring
from qadapter import QAdapterForCausalLM
from qadapter.errors import ConfigError, DataError
from qadapter.evaluation.columns import Column
from qadapter.evaluation.drift import TextDrift, measure_texts
from qadapter.evaluation.texts import Text

LIKELIHOOD = "likelihood:"  # begins the name of a task that is run here
# Name -> (file, prompt of a row).
FILES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "arc_easy": ("arc_easy_test.jsonl.gz", lambda row: row["query"]),
    "sciq": ("sciq_val.jsonl.gz", lambda row: f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"),
    "piqa": ("piqa_val.jsonl.gz", lambda row: f"Question: {row['question']}\nAnswer:"),
    "lambada": ("lambada_test.jsonl.gz", lambda row: row["query"]),
}


@dataclass(frozen=True)
class Item:
    """The choices of an item as token ids, and which is right."""

    choices: list[Text]
    gold: int


def own_tasks(measuring: Measuring) -> list[str]:
    """The tasks that are run here."""
    return [name.removeprefix(LIKELIHOOD) for name in measuring.tasks if name.startswith(LIKELIHOOD)]


def load_items(task: str, tokenizer: Any, data: Path, limit: int) -> list[Item]:
    """The first items of a task.

    Raises:
        ConfigError: an unknown task.
        DataError: its file is not there.
    """
    if task not in FILES:
        raise ConfigError(f"task {task!r}: choose among {', '.join(FILES)}.")
    name, prompt = FILES[task]
    path = data / "bench" / name
    if not path.exists():
        raise DataError(f"{path} is not there: {task} cannot be measured. Pass --data, or leave it out.")
    items = []
    for row in read_lines(path)[:limit]:
        texts = [split(tokenizer, prompt(row), f" {choice}") for choice in row["choices"]]
        items.append(Item(texts, row.get("gold", 0)))
    return items


def split(tokenizer: Any, context: str, continuation: str) -> Text:
    """Both tokenised as one text, which is cut where the context alone ends."""
    whole, before = (tokenizer(text)["input_ids"] for text in (context + continuation, context))
    return Text(whole[: len(before)], whole[len(before) :])


def likelihood_results(
    policy: QAdapterForCausalLM, items: Mapping[str, list[Item]], measuring: Measuring, points: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The tasks' figures at the sampled strengths; what each item lost goes to every point of the strength dial."""
    columns = [Column(f"{STRENGTH}={value:g}", value) for value in measuring.strengths]
    scores = run_likelihood_tasks(policy, items, columns, measuring.batch_tokens)
    for point in points:
        if point["dial"] == STRENGTH:
            point["lost"] = {task: lost(own, f"{STRENGTH}={point['value']:g}") for task, own in scores.items()}
    shown = [f"{STRENGTH}={value:g}" for value in measuring.sampled_strengths]
    return {
        task: {
            "metric": "acc",
            "n": len(own["base"]),
            "columns": {name: {"value": statistics.mean(values)} for name, values in own.items()},
            "differences": {name: {"value": -statistics.mean(lost(own, name))} for name in shown},
        }
        for task, own in scores.items()
    }


def run_likelihood_tasks(
    policy: QAdapterForCausalLM, tasks: Mapping[str, list[Item]], columns: Sequence[Column], batch_tokens: int
) -> dict[str, dict[str, list[float]]]:
    """{task: {"base" and each column's name: the score of each item}}."""
    texts = [text for items in tasks.values() for item in items for text in item.choices]
    drifts = iter(measure_texts(policy, texts, columns, batch_tokens))
    result = {}
    for task, items in tasks.items():
        found = [[next(drifts) for _ in item.choices] for item in items]
        result[task] = {
            name: [float(score(of_item, item.gold, name)) for of_item, item in zip(found, items, strict=True)]
            for name in ("base", *(column.name for column in columns))
        }
    return result


def score(choices: Sequence[TextDrift], gold: int, column: str) -> bool:
    """Whether the right choice is the likeliest, or an only choice what greedy decoding gives."""
    tokens = [drift.base if column == "base" else drift.columns[column] for drift in choices]
    if len(choices) == 1:
        return bool(tokens[0].greedy.bool().all())
    return int(np.argmax([float(own.logps.double().sum()) for own in tokens])) == gold
