"""Finished parts of an evaluation on disk, so that an interrupted one goes on where it stopped.

A part is stored as JSON under a fingerprint of everything that it depends on; another input is another file.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qadapter.new_folders import cache_folder, write_ordered_json

logger = logging.getLogger(__name__)

# Raise it when the meaning of a stored part changes.
PARTS_VERSION = 8
VERSIONED = ("qadapter", "torch", "transformers", "peft")


class PartStore:
    """Computes parts, or takes them from the folder if they are there.

    Args:
        folder: None takes `evaluation` in the user's cache folder.
        reuse: whether parts stored by earlier runs are taken; they are written in any case.
    """

    def __init__(self, folder: Path | None = None, reuse: bool = True) -> None:
        self.folder = folder or cache_folder() / "evaluation"
        self.reuse = reuse
        self.reused: list[str] = []
        self.fresh: set[Path] = set()  # measured by this run
        self.unwritten: dict[Path, str] = {}  # of them, those that the folder did not take

    def part(
        self, name: str, inputs: Any, compute: Callable[[], Any], keep: Callable[[Any], bool] = lambda value: True
    ) -> Any:
        """The JSON value of `compute()`, from the folder if a part of that name and these inputs is stored.

        Args:
            keep: whether a computed value is final, and so to be stored.
        """
        path, stored = self._path(name, inputs), self.stored(name, inputs)
        if stored is not None:
            if path not in self.fresh:
                self.reused.append(name)
            return stored
        # Through JSON and back, so that a fresh part and a stored one are the same value.
        value = json.loads(json.dumps(jsonable(compute()), allow_nan=False))
        if keep(value):
            self.keep(name, inputs, value)
        return value

    def keep(self, name: str, inputs: Any, value: Any) -> None:
        """Write a part, over an older one; in a folder that cannot be written to, it is kept for this run only."""
        path, value = self._path(name, inputs), jsonable(value)
        self.fresh.add(path)
        try:
            write_ordered_json(path, value)
        except OSError as error:
            if not self.unwritten:
                logger.warning(
                    "finished parts cannot be kept in %s (%s): were this run interrupted, it would begin anew.",
                    self.folder,
                    error.strerror,
                )
            self.unwritten[path] = json.dumps(value)

    def stored(self, name: str, inputs: Any) -> Any | None:
        """The stored part of that name and these inputs; None if there is none that may be taken."""
        path = self._path(name, inputs)
        if path in self.unwritten:
            return json.loads(self.unwritten[path])
        if not (self.reuse or path in self.fresh):
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, not to be read, or damaged: computed again
            return None

    def _path(self, name: str, inputs: Any) -> Path:
        return self.folder / f"{name}-{fingerprint(inputs)[:32]}.json"


def fingerprint(inputs: Any) -> str:
    """SHA-256 of `inputs` and of the versions of what computes with them."""
    stated = {"parts": PARTS_VERSION, "versions": {name: version(name) for name in VERSIONED}, "inputs": inputs}
    return hashlib.sha256(json.dumps(jsonable(stated), sort_keys=True).encode()).hexdigest()


def jsonable(value: Any) -> Any:
    """`value` as plain JSON: intervals (and other named tuples) become objects, numbers that are not finite null."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return jsonable(value._asdict())
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
