"""The way into lm-eval: its tasks, and its Hugging Face model around a policy. Imported when lm-eval is needed."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from qadapter.errors import ConfigError, DataError
from qadapter.evaluation.columns import BASE
from qadapter.evaluation.foreign_bars import ForeignBars
from qadapter.evaluation.progress import Advance, Track, silent
from qadapter.evaluation.shared_likelihoods import SharedLikelihoods

ANSWERS = "answers"
GROUP = re.compile(r"""^["']?group["']?\s*:\s*["']?(?P<name>[^\s"'#]+)""", re.MULTILINE)


class PolicyLM(HFLM):
    """lm-eval's own Hugging Face model around a policy or any causal LM, with our progress bars in place of its own.

    Args:
        tokenizer: left as it is; lm-eval works with a copy, since it sets a padding token.
        column: whose settings the model has, by name.
        task: what is run, for the progress bars.
        shared: gives the column's likelihoods, in place of passes of its own.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int,
        track: Track,
        column: str = BASE,
        task: str = "lm-eval",
        shared: SharedLikelihoods | None = None,
    ) -> None:
        self.track, self.column, self.task, self.shared = track, column, task, shared
        with hushed():  # it warns that a model object was given
            super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As lm-eval's."""
        self._show("likelihoods", requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As lm-eval's."""
        self._show("likelihoods of texts", requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As lm-eval's."""
        self._show(ANSWERS, requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        for _, _, continuation in requests:  # lm-eval only asserts it
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(
                    f"{self.task}: an answer of {len(continuation)} tokens cannot be scored; it must have 1 to "
                    f"{self.max_length}, which is all that the model reads."
                )
        if self.shared is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        return self.shared.of(self.column, requests, self.max_length, self.cache_hook.advance)

    def _show(self, kind: str, requests: Sequence[Any]) -> None:
        """Open a bar that tells of each finished request; shared likelihoods are computed with the base's."""
        track, column = self.track, self.column
        if self.shared is not None and kind != ANSWERS:
            track, column = (track, "all columns") if column == BASE else (silent, column)
        self.set_cache_hook(_Hook(track(f"{self.task}, {column}: {kind}", len(requests))))


class _Hook:
    """What lm-eval calls with each finished request: a place for caches."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def add_partial(self, kind: str, request: Any, response: Any) -> None:
        self.advance(1)


@contextmanager
def hushed(track: Track = silent, title: str = "") -> Iterator[None]:
    """Within the context nothing is printed, and bars that last are shown by `track`.

    lm-eval opens a bar for each task that it prepares, and its tasks and their libraries print as they like.
    """
    with redirect_stdout(io.StringIO()), redirect_stderr(ForeignBars(track, title)):
        yield


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, and which of them each group or tag holds."""

    tasks: dict[str, Task]
    groups: dict[str, list[str]]
    manager: TaskManager

    def pools(self, group: str) -> bool:
        """Whether the items of a group's tasks have one metric, so that there is a figure of the group."""
        return len({_item_metrics(self.tasks[name])[0] for name in self.groups[group]}) == 1


def load_tasks(names: Iterable[str], include_path: str | Path | None = None, track: Track = silent) -> LoadedTasks:
    """The tasks, groups and tags called `names`, or written in YAML files of these names.

    Args:
        include_path: a folder of task files that go before lm-eval's own, such as `local_tasks` writes.

    Raises:
        ConfigError: a name that is unknown, a task that runs generated code, or one whose data cannot be had.
        DataError: a task without a metric that is a mean over items.
    """
    names = list(names)
    # The members of a group that is given as a file lie beside it; lm-eval itself takes groups by name only.
    folders = [Path(name).parent for name in names if _group_in(name)]
    names = [_group_in(name) or name for name in names]
    folders += [] if include_path is None else [Path(include_path)]
    own = TaskManager(include_path=folders, include_defaults=False)
    if all(_complete(own, name) for name in names):
        manager = own
    else:
        done = track("Reading lm-eval's own tasks", 1)
        manager = _with_stock_tasks(tuple(map(str, folders)))
        done(1)
    for name in names:
        if name not in manager.task_index and not _is_task_file(name):
            raise ConfigError(f"lm-eval has no task {name!r} (similar: {_similar(name, manager)}).")
    tasks: dict[str, Task] = {}
    groups: dict[str, list[str]] = {}
    for name in names:
        loaded = _loaded(manager, name, track)
        tasks.update(loaded["tasks"])
        for group, members in loaded["groups"].items():
            groups[group] = [task.task_name for task in members.get_all_tasks()]
        if name in manager.all_tags:
            groups[name] = list(loaded["tasks"])
    return LoadedTasks(tasks, groups, manager)


def _loaded(manager: TaskManager, name: str, track: Track) -> Any:
    """What lm-eval loads for a name, refused where it could not be run to its end."""
    try:
        with hushed(track, name):
            loaded = manager.load([name])
    except ModuleNotFoundError as error:
        hint = " (its extra: pip install 'lm-eval[ifeval]')" if "ifeval" in name else ""
        raise ConfigError(f"task {name} needs the package {error.name}, which is not installed{hint}.") from error
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the data or code of {name} cannot be loaded: {reason}") from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"task {task.task_name} runs code that the model writes; that is not supported.")
        if "ifeval" in task.task_name:
            _require_sentences(task.task_name)
        _item_metrics(task)
    return loaded


def _item_metrics(task: Task) -> list[str]:
    """The metrics that are means over items; raises DataError if there is none."""
    metrics = [metric for metric, aggregation in task.aggregation().items() if aggregation is mean]
    if not metrics:
        raise DataError(
            f"task {task.task_name} has no metric that is a mean over its items, only {sorted(task.aggregation())}: "
            "no paired difference can be given."
        )
    return metrics


def _require_sentences(name: str) -> None:
    """Raise ConfigError without the data that IFEval's checks need after all answers have been generated."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise ConfigError(
            f"task {name} splits answers into sentences with NLTK's punkt_tab, which is not on this machine: "
            "run `python -m nltk.downloader punkt_tab` where the network is, or set NLTK_DATA to a folder that has it."
        ) from None


def _similar(name: str, manager: TaskManager) -> str:
    """Names like one that lm-eval does not have, whatever its case and hyphens."""
    wanted = name.lower().replace("-", "_")
    known = sorted(manager.task_index)
    close = get_close_matches(wanted, known, n=3)
    parts = [other for other in known if wanted in other.split("_") and other not in close]
    return ", ".join([*close, *sorted(parts, key=len)[:3]]) or "none is close"


def _is_task_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


def _group_in(name: str) -> str | None:
    """The name of the group that a task file defines; None for task files of other kinds and all other names."""
    found = GROUP.search(Path(name).read_text(encoding="utf-8")) if _is_task_file(name) else None
    return None if found is None else found["name"]


def _complete(manager: TaskManager, name: str) -> bool:
    """Whether a name, and all that it stands for, is known without lm-eval's own tasks."""
    if name not in manager.all_groups:
        return name in manager.task_index or _is_task_file(name)
    members = manager.task_index[name].cfg["task"]
    return all(isinstance(member, str) and _complete(manager, member) for member in members)


@lru_cache(maxsize=4)
def _with_stock_tasks(folders: tuple[str, ...]) -> TaskManager:
    """All tasks; reading lm-eval's own takes ten seconds."""
    return TaskManager(include_path=list(folders))


@dataclass(frozen=True)
class TaskScores:
    """One task under one model, item by item.

    Args:
        scores: of each metric that is a mean over items, the headline first; a filter that is not lm-eval's default is
            part of the metric's name, as in lm-eval ("exact_match,strict-match").
        items: what tells the items and their prompts from others.
        answers: what the model wrote, for tasks that generate.
    """

    scores: dict[str, list[float]]
    higher_is_better: dict[str, bool]
    items: list[tuple[Any, ...]]
    answers: list[str] | None


def run(
    lm: PolicyLM, loaded: LoadedTasks, limit: int | None, seed: int, chat_template: bool = False
) -> dict[str, TaskScores]:
    """The scores of every task, by its name; sets the global seeds, as lm-eval does."""
    with hushed(lm.track, lm.task):
        results = simple_evaluate(
            model=lm,
            tasks=list(loaded.tasks.values()),
            task_manager=loaded.manager,
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=chat_template,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return {name: _scores(task, results["samples"][name]) for name, task in loaded.tasks.items()}


def _scores(task: Task, samples: list[dict[str, Any]]) -> TaskScores:
    by_filter: dict[str, list[dict[str, Any]]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        by_filter.setdefault(sample["filter"], []).append(sample)
    scores, higher = {}, {}
    for name, rows in by_filter.items():
        for metric in _item_metrics(task):
            values = [row.get(metric) for row in rows]
            if all(isinstance(value, Real) for value in values):
                label = metric if name == "none" else f"{metric},{name}"
                scores[label] = [float(value) for value in values]  # type: ignore[arg-type]
                higher[label] = bool(task.higher_is_better()[metric])
    if not scores:
        raise DataError(f"task {task.task_name} scores its items with something else than numbers.")
    rows = next(iter(by_filter.values()))
    written = [row["resps"][0][0] for row in rows]
    return TaskScores(
        scores,
        higher,
        [(row["doc_id"], row["doc_hash"], row["prompt_hash"]) for row in rows],
        written if task.OUTPUT_TYPE == "generate_until" else None,
    )
