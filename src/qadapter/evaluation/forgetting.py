"""What a customisation forgot: benchmarks of lm-eval under base and policy on the same items, with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qadapter.errors import ConfigError, DataError
from qadapter.evaluation.columns import BASE, Column
from qadapter.evaluation.intervals import Interval, mcnemar_exact, wilson
from qadapter.evaluation.progress import Track, silent
from qadapter.evaluation.resampling import mean_intervals, paired_difference
from qadapter.evaluation.shared_likelihoods import SharedLikelihoods
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.passes import in_eval_mode
from qadapter.modeling.policy_part import DIAL

if TYPE_CHECKING:
    from qadapter.evaluation.harness import LoadedTasks, TaskScores


def run_tasks(
    model: QAdapterForCausalLM,
    tokenizer: Any,
    tasks: Sequence[str],
    columns: Mapping[str, Mapping[str, Any]],
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: Track | None = None,
    include_path: str | Path | None = None,
    shared: bool = False,
) -> dict[str, Any]:
    """Scores of base and columns on tasks of lm-eval, as values for JSON.

    Args:
        tasks: names of tasks or groups, or paths of YAML files that define them.
        columns: settings of the dial by name, {"half": {"strength": 0.5}}; also adapter_weights, max_kl,
            min_kl, decay and interpolation. The base, strength 0, is always the first column and need not be given.
        limit: items of each task, its first ones; None for all.
        seed: of the examples in the prompts, of sampling, and of bootstrap intervals.
        progress: opens a bar for each column and kind of request.
        include_path: a folder of further tasks, such as `local_tasks` writes; they go before lm-eval's own.
        shared: likelihoods of all columns from one pass over the hidden states, which is what makes sweeps cheap. They
            equal those of separate passes up to rounding; answers are generated column by column in any case.

    Returns:
        {"tasks": {task: figures}, "settings": {...}}; figures of a group or tag pool the items of its tasks. Figures:
        metric, higher_is_better, n, shots; columns {column: {value, low, high}}; differences from the base
        {column: {value, low, high, mcnemar_p}} (the p-value is None unless scores are 0 and 1); other_metrics
        {metric: {columns, differences}}; scores {column: [one an item]}; and answers {column: [one an item]} if the
        task generates. A group has `subtasks` in place of scores and answers.

    Raises:
        ConfigError: lm-eval is not installed, an unknown task, column setting or adapter, or a limit below 1.
        DataError: a task without a metric that is a mean over items, or whose items differ from run to run.
    """
    _columns(model, columns)  # refuses what is wrong before tasks are read
    if not tasks or (limit is not None and limit < 1):
        raise ConfigError(f"tasks = {list(tasks)}, limit = {limit}: give at least one task, and at least one item.")
    try:
        from qadapter.evaluation import harness
    except ImportError as error:
        raise ConfigError(f"benchmarks need lm-eval: pip install 'qadapter[eval]' ({error}).") from error
    loaded = harness.load_tasks(tasks, include_path, progress or silent)
    return run_loaded(model, tokenizer, loaded, columns, limit, seed, batch_size, progress, shared=shared)


def run_loaded(
    model: QAdapterForCausalLM,
    tokenizer: Any,
    loaded: LoadedTasks,
    columns: Mapping[str, Mapping[str, Any]],
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: Track | None = None,
    chat_template: bool = False,
    shared: bool = False,
) -> dict[str, Any]:
    """As `run_tasks`, of tasks that `harness.load_tasks` has loaded; with `chat_template`, put as a user's messages."""
    from qadapter.evaluation import harness

    settings = _columns(model, columns)
    decaying = any(column.decay < 1 for column in settings)  # forward does not know where an answer begins
    likelihoods = SharedLikelihoods(model, settings) if shared or decaying else None
    results = {}
    title = next(iter(loaded.groups or loaded.tasks))
    for column in settings:
        with column.applied(model), in_eval_mode(model):
            lm = harness.PolicyLM(model, tokenizer, batch_size, progress or silent, column.name, title, likelihoods)
            results[column.name] = harness.run(lm, loaded, limit, seed, chat_template)
    figures = {}
    for name, task in loaded.tasks.items():
        figures[name] = _task_figures(name, {column: scores[name] for column, scores in results.items()}, seed)
        figures[name]["shots"] = task.config.num_fewshot
    for group, members in loaded.groups.items():
        pooled = _group_figures(members, results, seed)
        figures.update({group: pooled} if pooled else {})
    return {
        "tasks": figures,
        "settings": {
            "lm_eval": version("lm_eval"),
            "limit": limit,
            "seed": seed,
            "batch_size": batch_size,
            "chat_template": chat_template,
        },
    }


def _columns(model: QAdapterForCausalLM, columns: Mapping[str, Mapping[str, Any]]) -> list[Column]:
    """The columns, base first."""
    for name, settings in columns.items():
        unknown = sorted(set(settings) - set(DIAL))
        if unknown:
            raise ConfigError(f"column {name!r} sets {unknown}; the settings are {', '.join(DIAL)}.")
    if columns.get(BASE, {"strength": 0.0}).get("strength") != 0:
        raise ConfigError(f"column {BASE!r} is the base, strength 0: name {dict(columns[BASE])} otherwise.")
    result = [Column(BASE, 0.0), *(Column(name, **columns[name]) for name in columns if name != BASE)]
    for column in result:
        column.direction(model)  # refuses adapters that are not there
    return result


def _task_figures(task: str, columns: Mapping[str, TaskScores], seed: int) -> dict[str, Any]:
    base = columns[BASE]
    if any(scores.items != base.items or list(scores.scores) != list(base.scores) for scores in columns.values()):
        raise DataError(f"task {task} asks other questions in each run: base and policy cannot be compared on it.")
    headline, *others = base.scores
    result = {
        "metric": headline,
        "higher_is_better": base.higher_is_better[headline],
        "n": len(base.items),
        **_figures({name: scores.scores[headline] for name, scores in columns.items()}, seed),
        "other_metrics": {
            metric: _figures({name: scores.scores[metric] for name, scores in columns.items()}, seed)
            for metric in others
        },
        "scores": {name: scores.scores[headline] for name, scores in columns.items()},
    }
    if base.answers is not None:
        result["answers"] = {name: scores.answers for name, scores in columns.items()}
    return result


def _group_figures(
    members: Sequence[str], results: Mapping[str, Mapping[str, TaskScores]], seed: int
) -> dict[str, Any] | None:
    """Figures over all items of a group's tasks, so that each item counts alike; None if their metrics differ."""
    metrics = {next(iter(results[BASE][member].scores)) for member in members}
    if len(metrics) != 1:
        return None
    (metric,) = metrics
    pooled = {
        column: [score for member in members for score in tasks[member].scores[metric]]
        for column, tasks in results.items()
    }
    return {
        "metric": metric,
        "higher_is_better": results[BASE][members[0]].higher_is_better[metric],
        "n": len(pooled[BASE]),
        **_figures(pooled, seed),
        "subtasks": list(members),
    }


def _figures(scores: Mapping[str, Sequence[float]], seed: int) -> dict[str, Any]:
    """Means of the columns and their paired differences from the base, with intervals."""
    base = scores[BASE]
    return {
        "columns": {name: _bounds(_mean(values, seed)) for name, values in scores.items()},
        "differences": {
            name: {
                **_bounds(paired_difference(values, base, seed)),
                "mcnemar_p": mcnemar_exact(values, base) if {*values, *base} <= {0, 1} else None,
            }
            for name, values in scores.items()
            if name != BASE
        },
    }


def _mean(values: Sequence[float], seed: int) -> Interval:
    if set(values) <= {0, 1}:
        return wilson(sum(values), len(values))
    return mean_intervals(torch.tensor([values], dtype=torch.float64), seed=seed)[0]


def _bounds(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
