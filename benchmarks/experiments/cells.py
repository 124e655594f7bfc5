"""One cell of an experiment, its key, and its results file: written whole or not at all, and never computed twice."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.experiments.settings import Measuring, Setting, Training
from qadapter.evaluation.part_store import jsonable
from qadapter.new_folders import whole_file

# Raise it when the meaning of a result changes: old files are then not taken for new ones.
RESULT_VERSION = 1
# Fields that are younger than many results, by what they are of, and the value that leaves a cell's key as it was.
YOUNGER: dict[type, dict[str, Any]] = {
    Setting: {"prepared_by": None},
    Training: {"packed": False},
    Measuring: {"threshold": 0.0},
}


@dataclass(frozen=True)
class Cell:
    """A setting, a method with its options, and a seed.

    Args:
        options: of the method, as sorted (name, value) pairs, so that a cell can be hashed and compared.
    """

    setting: Setting
    method: str
    options: tuple[tuple[str, Any], ...]
    seed: int

    @classmethod
    def of(cls, setting: Setting, method: str, options: dict[str, Any], seed: int) -> "Cell":
        """A cell; options that start with "training." change the setting's training, not that of a prepared base."""
        changes = {name.removeprefix("training."): options[name] for name in options if name.startswith("training.")}
        own = {name: value for name, value in options.items() if not name.startswith("training.")}
        training = replace(setting.training, **changes)
        if setting.prepared and training != setting.training:
            setting = replace(setting, prepared_by=setting.prepared_by or setting.training)
        setting = replace(setting, training=training)
        return cls(setting, method, tuple(sorted(own.items())), seed)

    def described(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as JSON."""
        setting = _without_younger(jsonable(asdict(self.setting)), Setting)
        setting["measuring"] = _without_younger(setting["measuring"], Measuring)
        for name in {"training", "prepared_by"} & setting.keys():
            setting[name] = _without_younger(setting[name], Training)
        return {
            "version": RESULT_VERSION,
            "setting": setting,
            "method": self.method,
            "options": dict(self.options),
            "seed": self.seed,
        }

    @property
    def key(self) -> str:
        """The first digits of the SHA-256 of `described`."""
        return hashlib.sha256(json.dumps(self.described(), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """For people and file names: setting, method, options, seed, key."""
        options = "_".join(f"{name}-{value}" for name, value in self.options)
        parts = [self.setting.name, self.method.replace(":", "-"), options, f"s{self.seed}", self.key]
        return "__".join(part for part in parts if part).replace("/", "-")


def _without_younger(described: dict[str, Any], kind: type) -> dict[str, Any]:
    """The fields of a dataclass but those that leave the key as it was."""
    return {
        name: value for name, value in described.items() if name not in YOUNGER[kind] or value != YOUNGER[kind][name]
    }


@dataclass(frozen=True)
class Store:
    """The folder of a suite's results files, and a scratch folder for what can be made again.

    Args:
        work: samples as JSONL, the base's answers, prepared bases; not part of the results.
    """

    results: Path
    work: Path

    def path(self, cell: Cell) -> Path:
        """The cell's results file."""
        return self.results / f"{cell.name}.json"

    def finished(self, cell: Cell) -> bool:
        """Whether the cell need not be run."""
        return self.path(cell).exists()

    def write(self, cell: Cell, result: dict[str, Any]) -> Path:
        """Write the results file; an interrupted run leaves none."""
        path = self.path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"cell": cell.described(), **result}
        with whole_file(path) as scratch:
            scratch.write_text(json.dumps(jsonable(content), allow_nan=False) + "\n", encoding="utf-8")
        return path


def read_results(folder: Path) -> Iterator[dict[str, Any]]:
    """The results in a folder, in the order of their names; files of another version are left out."""
    for path in sorted(folder.glob("*__*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("cell", {}).get("version") == RESULT_VERSION:
            yield result | {"file": path.name}
