"""Benchmarks through lm-eval, which is an extra and imported when it is asked for."""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadapter.errors import ConfigError
from qadapter.evaluation.columns import Column
from qadapter.evaluation.part_store import PartStore
from qadapter.evaluation.progress import Track
from qadapter.evaluation.subjects import Subject

if TYPE_CHECKING:
    from qadapter.evaluation.harness import LoadedTasks


def require_lm_eval() -> None:
    """Raise ConfigError if lm-eval is not installed: before an hour of other work."""
    if find_spec("lm_eval") is None:
        raise ConfigError("benchmarks need lm-eval: pip install 'qadapter[eval]'.")


def task_folder(folder: Path | None) -> Path | None:
    """The folder as lm-eval includes it: task files (YAML) as they are, benchmark files (JSONL) through our tasks.

    Raises:
        ConfigError: there is no such folder.
        DataError: it holds neither.
    """
    if folder is None:
        return None
    if not folder.is_dir():
        raise ConfigError(f"--tasks-from {folder}: there is no such folder.")
    if any(folder.rglob("*.yaml")):
        return folder
    from qadapter.evaluation.tasks import local_tasks

    return local_tasks(folder)


class Benchmarks:
    """The benchmarks of an evaluation: loaded, and refused if need be, before anything is measured; run at its end.

    Args:
        names: tasks, groups or tags of lm-eval, or paths of task files.
        required: tasks that have a limit; run as well unless one of `names` holds them.
        settings: what else the figures depend on, for the store; and how `forgetting.run_tasks` is to run.

    Raises:
        ConfigError: lm-eval or a task is not there, its data cannot be had, or no figure will have a required name.
    """

    def __init__(
        self,
        subject: Subject,
        identity: dict[str, Any],
        columns: Sequence[Column],
        names: Sequence[str],
        required: Sequence[str],
        folder: Path | None,
        settings: dict[str, Any],
        store: PartStore,
        track: Track,
    ) -> None:
        self.subject, self.columns, self.settings, self.store, self.track = subject, columns, settings, store, track
        self.loaded: dict[str, LoadedTasks | None] = {}  # None where the store has the figures
        self.inputs: dict[str, list[Any]] = {}
        if not (names or required):
            return
        require_lm_eval()
        included = task_folder(folder)
        for name in names:
            self._load(name, identity, included)
        for name in required:
            if not any(name in self._figures_of(own) for own in self.loaded):
                self._load(name, identity, included)
                if name not in self._figures_of(name):
                    found = ", ".join(self._figures_of(name))
                    raise ConfigError(f"--max-drop {name}: there is no score of that name; limit one of {found}.")

    def _load(self, name: str, identity: dict[str, Any], folder: Path | None) -> None:
        columns = [{**vars(column)} for column in self.columns]
        self.inputs[name] = [identity, columns, state(name, folder), self.settings]
        self.loaded[name] = None
        if self.store.stored("task", self.inputs[name]) is None:
            self.loaded[name] = load(name, folder, self.track)

    def _figures_of(self, name: str) -> list[str]:
        loaded = self.loaded[name]
        if loaded is None:
            return list(self.store.stored("task", self.inputs[name]) or ())
        return [*loaded.tasks, *loaded.groups]

    def results(self) -> dict[str, Any]:
        """{task: figures} of all of them, see `forgetting.run_tasks`; the scores of items are kept, answers are not."""
        result: dict[str, Any] = {}
        for name, loaded in self.loaded.items():

            def compute(loaded: Any = loaded) -> dict[str, Any]:
                return run(self.subject, loaded, self.columns, self.settings, self.track)

            result |= self.store.part("task", self.inputs[name], compute)
        return result


def load(name: str, folder: Path | None, track: Track) -> "LoadedTasks":
    """A task, group or tag with its data."""
    from qadapter.evaluation.harness import load_tasks

    return load_tasks([name], folder, track)


def run(
    subject: Subject, loaded: "LoadedTasks", columns: Sequence[Column], settings: dict[str, Any], track: Track
) -> dict[str, Any]:
    """{task: figures} of loaded tasks."""
    from qadapter.evaluation.forgetting import run_loaded

    own = {column.name: column.settings() for column in columns}
    found = run_loaded(subject.model, subject.tokenizer, loaded, own, progress=track, **settings)
    return {
        name: {key: value for key, value in figures.items() if key != "answers"}
        for name, figures in found["tasks"].items()
    }


def state(task: str, folder: Path | None) -> list[Any]:
    """What the questions of a task depend on: lm-eval's version, and the files that define them."""
    files = [Path(task)] if Path(task).is_file() else []
    if folder is not None:
        files += sorted(path for path in folder.rglob("*") if path.is_file())
    contents = [[str(path), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
    return [version("lm_eval"), task, contents]
