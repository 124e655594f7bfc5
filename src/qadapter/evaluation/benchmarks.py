"""Benchmarks through lm-eval, which is an extra and imported when it is asked for."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
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
from qadapter.new_folders import file_digest

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
        self.inputs[name] = [identity, list(map(asdict, self.columns)), state(name, folder), self.settings]
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


YAML_ENDINGS = ("yaml", "yml")  # lm-eval's own templates are called _default_template_yaml and the like
DATA_KEYS = ("dataset_path", "dataset_kwargs")


def state(task: str, folder: Path | None) -> list[Any]:
    """What the questions of a task depend on: lm-eval's version, and the files that define them.

    A task file may take others that lie beside it (members of a group, templates, code), include some from elsewhere,
    which may do the same, and take data from anywhere.
    """
    given = _beside(Path(task), (*YAML_ENDINGS, ".py")) if Path(task).is_file() else []
    if folder is not None:
        given += [path for path in folder.rglob("*") if path.is_file()]
    files: set[Path] = set()
    while given:
        path = Path(os.path.abspath(given.pop()))  # one name a file, however it is reached
        if path in files:
            continue
        files.add(path)
        if path.name.endswith(YAML_ENDINGS):
            given += [*_beside(path, ".py"), *_named_in(path)]
    return [version("lm_eval"), task, [[str(path), file_digest(path)] for path in sorted(files)]]


def _beside(path: Path, endings: str | tuple[str, ...]) -> list[Path]:
    """The file, and those of the given endings that lie beside it."""
    return [path, *(other for other in path.parent.iterdir() if other.name.endswith(endings) and other.is_file())]


def _named_in(definition: Path) -> Iterator[Path]:
    """The files that a YAML file names, from here or from where it lies; none if it is no YAML.

    As data it may name folders and patterns, too.
    """
    try:
        root = yaml.compose(definition.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError):  # lm-eval will say so, if it takes the file at all
        return
    nodes, seen = [(root, False)], set()
    while nodes:
        node, is_data = nodes.pop()
        if (id(node), is_data) in seen:  # anchors: a node may be there many times
            continue
        seen.add((id(node), is_data))
        if isinstance(node, yaml.MappingNode):
            nodes += [(value, is_data or key.value in DATA_KEYS) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += [(value, is_data) for value in node.value]
        elif isinstance(node, yaml.ScalarNode) and node.value:
            for place in (node.value, os.path.join(definition.parent, node.value)):
                if os.path.isfile(place):
                    yield Path(place)
                elif is_data:
                    pattern = os.path.join(glob.escape(place), "**") if os.path.isdir(place) else place
                    yield from filter(Path.is_file, map(Path, glob.iglob(pattern, recursive=True)))
