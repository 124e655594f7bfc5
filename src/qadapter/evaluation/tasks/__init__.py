"""lm-eval tasks over local files, so that benchmarks run without the hub. The templates beside this file are ours."""

import glob
import gzip
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qadapter.errors import DataError
from qadapter.new_folders import cache_folder

TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """A task: the template NAME.yaml and the files that it reads.

    Args:
        files: file names without ending, by split.
        split_by: a field of the rows; each of its values becomes a task NAME_VALUE, and NAME their group.
    """

    name: str
    files: dict[str, str]
    split_by: str | None = None

    @property
    def template(self) -> Path:
        """The YAML file that says how the rows become questions."""
        return TEMPLATES / f"{self.name}.yaml"


BENCHMARKS = (
    Benchmark("arc_easy", {"test": "arc_easy_test"}),
    Benchmark("piqa", {"test": "piqa_val"}),
    Benchmark("sciq", {"test": "sciq_val"}),
    Benchmark("lambada", {"test": "lambada_test"}),
    Benchmark("mmlu", {"test": "mmlu_test", "dev": "mmlu_dev"}, split_by="subject"),
    Benchmark("gsm8k", {"test": "gsm8k_test"}),
    Benchmark("bbh", {"test": "bbh"}, split_by="task"),
    Benchmark("ifeval", {"test": "ifeval"}),
)


def local_tasks(folder: str | os.PathLike[str], into: str | os.PathLike[str] | None = None) -> Path:
    """A folder of lm-eval tasks over the benchmark files in `folder`: the `include_path` of `run_tasks`.

    A benchmark is there if all its files are, as NAME.jsonl or NAME.jsonl.gz. Files that hold several tasks are split
    into one file a task; all others are read where they are.

    Args:
        into: where to write; by default a folder in the user's cache whose name depends on the files' state.

    Raises:
        DataError: no benchmark is there, a row that is no JSON object with the field that names its task, or a task of
            which a file has no row.
    """
    folder = Path(folder).resolve()
    found = [(benchmark, files) for benchmark in BENCHMARKS if (files := _files(folder, benchmark))]
    if not found:
        names = sorted({name for benchmark in BENCHMARKS for name in benchmark.files.values()})
        raise DataError(f"{folder} holds no benchmark: looked for {', '.join(names)}, as .jsonl or .jsonl.gz.")
    target = cache_folder() / "tasks" / _state(found) if into is None else Path(into)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        for benchmark, files in found:
            _write(benchmark, files, scratch, target)
        os.replace(scratch, target)
    except BaseException:
        shutil.rmtree(scratch)
        if not target.exists():  # else another process was faster
            raise
    return target


def _files(folder: Path, benchmark: Benchmark) -> dict[str, Path] | None:
    """The benchmark's files by split; None unless all are there."""
    files = {}
    for split, name in benchmark.files.items():
        path = next(
            (path for ending in (".jsonl", ".jsonl.gz") if (path := folder / f"{name}{ending}").is_file()), None
        )
        if path is None:
            return None
        files[split] = path
    return files


def _state(found: Iterable[tuple[Benchmark, dict[str, Path]]]) -> str:
    state = [
        (benchmark.template.read_text(encoding="utf-8"), str(benchmark.template), str(path), *_stamp(path))
        for benchmark, files in found
        for path in files.values()
    ]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _write(benchmark: Benchmark, files: dict[str, Path], folder: Path, final: Path) -> None:
    """The benchmark's task, or its tasks and their group, in `folder`, which will be moved to `final`."""
    if benchmark.split_by is None:
        _write_task(benchmark, benchmark.name, files, folder)
        return
    parts = {split: _rows_by(path, benchmark.split_by) for split, path in files.items()}
    values = sorted(parts["test"])
    for split, rows in parts.items():
        if missing := [value for value in values if value not in rows]:
            raise DataError(f"{files[split]}: no row has the {benchmark.split_by} {', '.join(missing)}.")
    names = []
    for value in values:
        names.append(f"{benchmark.name}_{re.sub(r'[^0-9A-Za-z_]', '_', value)}")
        places = {}
        for split, rows in parts.items():
            name = f"{names[-1]}_{split}.jsonl"
            (folder / name).write_text("".join(rows[value]), encoding="utf-8")
            places[split] = final / name
        _write_task(benchmark, names[-1], places, folder)
    _write_yaml(folder / f"{benchmark.name}.yaml", {"group": benchmark.name, "task": names})


def _rows_by(path: Path, field: str) -> dict[str, list[str]]:
    """The lines of a file by the value of a field."""
    groups: dict[str, list[str]] = {}
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)[field]
            except (ValueError, LookupError, TypeError):
                raise DataError(f"{path}, line {number}: must be a JSON object with the field {field!r}.") from None
            groups.setdefault(str(value), []).append(line.rstrip("\n") + "\n")
    return groups


def _write_task(benchmark: Benchmark, name: str, files: dict[str, Path], folder: Path) -> None:
    data = {split: glob.escape(str(path)) for split, path in files.items()}  # `datasets` takes names as patterns
    task = {"include": str(benchmark.template), "task": name, "dataset_path": "json"}
    _write_yaml(folder / f"{name}.yaml", {**task, "dataset_kwargs": {"data_files": data}})


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
