"""Several adapters of one base, at several strengths, as columns of one table."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qadapter.errors import ConfigError
from qadapter.evaluation.audit import measure_everything
from qadapter.evaluation.columns import BASE, Column
from qadapter.evaluation.differences import differences, without_items
from qadapter.evaluation.environment import environment
from qadapter.evaluation.evaluate import Evaluation
from qadapter.evaluation.part_store import PartStore, jsonable
from qadapter.evaluation.preferences import UNKNOWN, Temperatures
from qadapter.evaluation.progress import Track, silent
from qadapter.evaluation.subjects import Subject, require_same_base
from qadapter.evaluation.workload import Workload
from qadapter.modeling.manifest import MANIFEST_NAME, read_manifest

SCHEMA_VERSION = 1


def run_comparison(
    paths: Sequence[str],
    columns: Sequence[Sequence[Column]],
    open_subject: Callable[[str], Subject],
    workload: Workload,
    store: PartStore,
    track: Track = silent,
) -> dict[str, Any]:
    """The figures of all columns; one base model is in memory at a time.

    Args:
        paths: adapter folders or plain LoRA folders.
        columns: the columns of each; no name twice.
        open_subject: loads one of them.

    Raises:
        ConfigError: adapters of different bases or tokenizers, or a name of two columns.
    """
    names = [column.name for own in columns for column in own]
    if len(set(names)) < len(names):
        raise ConfigError(f"columns {names}: two have one name; rename a folder, or give other strengths.")
    check_manifests(paths)
    merged: dict[str, Any] = {}
    identities: dict[str, Any] = {}
    first: dict[str, Any] | None = None
    temperatures: set[Temperatures | None] = set()
    for path, own in zip(paths, columns, strict=True):
        subject = open_subject(path)
        evaluation = Evaluation(subject, own, workload, store, track)
        if first is None:
            first = evaluation.identity["base"]
        require_same_base(paths[0], first, path, evaluation.identity["base"])
        identities[path] = evaluation.identity["adapters"]
        temperatures.add(evaluation.temperatures()[BASE])
        results = measure_everything(evaluation)
        merged = results if not merged else merge(merged, results)
        device = subject.model.device
        del subject, evaluation
    if len(temperatures) > 1:  # by whose returns would the base rank the answers?
        merged["pairs"]["columns"][BASE]["reward_accuracy"] = UNKNOWN
    return jsonable(
        {
            "schema_version": SCHEMA_VERSION,
            "columns": [
                {"path": path, "name": column.name, **column.settings()}
                for path, own in zip(paths, columns, strict=True)
                for column in own
            ],
            "adapters": identities,
            "base": first,
            "workload": workload.to_dict(),
            "results": without_items(merged),
            "differences": differences(merged, names, workload.seed),
            "environment": environment(device),
        }
    )


def check_manifests(paths: Sequence[str]) -> None:
    """Raise ConfigError if folders name different bases: before anything is loaded and measured."""
    bases = {
        path: read_manifest(Path(path)).base for path in paths if (Path(path) / MANIFEST_NAME).is_file()
    }  # fmt: skip
    for path, base in bases.items():
        first, other = next(iter(bases.items()))
        if base["fingerprint"] != other["fingerprint"]:
            raise ConfigError(
                f"{first} and {path} have a different base model ({other['name']} and {base['name']}): "
                "compare adapters of one base."
            )


def merge(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two results on the same items as one; dictionaries joined key by key, judgements one after the other.

    Where both have a value of the same key (the base's figures, counts), the first one stays.
    """
    result = dict(one)
    for key, value in other.items():
        if key not in result:
            result[key] = value
        elif isinstance(value, dict) and isinstance(result[key], dict):
            result[key] = result[key] if key == BASE else merge(result[key], value)
        elif key == "judged":
            result[key] = [*result[key], *value]
        elif key == "examples":
            result[key] = [merge(mine, its) for mine, its in zip(result[key], value, strict=True)]
    return result
