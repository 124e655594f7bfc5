"""Benchmarks through lm-eval, which is an extra and imported when it is asked for."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

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
        if settings["chat_template"] and subject.tokenizer.chat_template is None:
            raise ConfigError("--chat-template: the tokenizer has no chat template; leave the option out.")
        included = task_folder(folder)
        for name in names:
            self._load(name, identity, included)
        for name in required:
            if not any(name in self._figures_of(own) for own in self.loaded):
                holders = (own for own, loaded in self.loaded.items() if loaded is not None and name in loaded.groups)
                holder = next(holders, name)
                if holder not in self.loaded:
                    self._load(name, identity, included)
                if name not in self._figures_of(holder):
                    found = ", ".join(self._figures_of(holder))
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
        return [*loaded.tasks, *(group for group in loaded.groups if loaded.pools(group))]

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


DEFINITIONS = (".yaml", ".yml", ".py")


def state(task: str, folder: Path | None) -> list[Any]:
    """What the questions of a task depend on: lm-eval's version, and the files that define them.

    A task file may take others that lie beside it (members of a group, templates, code) and data from anywhere.
    """
    files = set()
    if Path(task).is_file():
        beside = Path(task).parent.iterdir()
        files |= {Path(task), *(path for path in beside if path.suffix in DEFINITIONS and path.is_file())}
    if folder is not None:
        files |= {path for path in folder.rglob("*") if path.is_file()}
    files |= {named for path in files if path.suffix in DEFINITIONS[:2] for named in _named_in(path)}
    contents = [[str(path), hashlib.sha256(path.read_bytes()).hexdigest()] for path in sorted(files)]
    return [version("lm_eval"), task, contents]


def _named_in(definition: Path) -> Iterator[Path]:
    """The files that a YAML file names, from here or from where it lies; none if it is no YAML."""
    try:
        nodes = [yaml.compose(definition.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)]
    except (yaml.YAMLError, UnicodeDecodeError):  # lm-eval will say so, if it takes the file at all
        return
    seen = set()  # anchors: a node may be there many times
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.ScalarNode):
            places = (Path(node.value), definition.parent / node.value)
            yield from (path for path in places if os.path.isfile(path))  # Path.is_file raises for long texts
