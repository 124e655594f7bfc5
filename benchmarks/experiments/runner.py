"""Runs cells: loads what they share, trains, measures, writes a results file each, and says how long the rest takes."""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.experiments.cells import Cell, Store
from benchmarks.experiments.judges import Judge, held_out_accuracy, quiet_sklearn
from benchmarks.experiments.material import load_material, make_judge, sample_rows
from benchmarks.experiments.measure import STRENGTH, Material, measure
from benchmarks.experiments.methods import Context, train
from benchmarks.experiments.own_pairs import write_pairs
from benchmarks.experiments.pools import load_pools
from benchmarks.experiments.settings import OWN_PAIRS, Setting
from benchmarks.experiments.tiny import write_tiny_base
from qadapter import QAdapterConfig
from qadapter.devices import default_device
from qadapter.evaluation.environment import environment
from qadapter.export.merged import export_merged
from qadapter.modeling.bases import load_tokenizer, resolve_base, tokenizer_fingerprint, weight_fingerprint

RIVALS = ("trl", "scikit-learn", "accelerate")
PREPARED_BETA = 0.1


@dataclass
class Shared:
    """What the cells of one setting and seed have in common."""

    context: Context
    material: Material
    judge: Judge
    judge_accuracy: float
    base: dict[str, Any]


@dataclass
class Runner:
    """Runs cells against a store.

    Args:
        data: folder of local data (pairs/, bench/), used where it has the files.
        keep_adapters: also write each adapter folder into the scratch folder.
    """

    store: Store
    data: Path
    keep_adapters: bool = False
    say: Any = print
    _shared: dict[str, Shared] = field(default_factory=dict)

    def run(self, cells: Sequence[Cell]) -> int:
        """Run those that are not finished; how many were."""
        quiet_sklearn()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        todo = [cell for cell in cells if not self.store.finished(cell)]
        self.say(f"{len(cells)} cells, {len(cells) - len(todo)} finished before, {len(todo)} to run")
        start = time.perf_counter()
        for number, cell in enumerate(todo, 1):
            self.say(f"[{number}/{len(todo)}] {cell.name}")
            result = self.run_cell(cell)
            elapsed = time.perf_counter() - start
            left = elapsed / number * (len(todo) - number)
            seconds = result["seconds"]
            self.say(
                f"[{number}/{len(todo)}] {sum(seconds.values()):.0f} s "
                f"({', '.join(f'{name} {value:.0f}' for name, value in seconds.items())}); "
                f"{clock(elapsed)} gone, about {clock(left)} left"
            )
        return len(todo)

    def run_cell(self, cell: Cell) -> dict[str, Any]:
        """Train, measure, write; the result."""
        start = time.perf_counter()
        shared = self.shared(cell)
        prepared = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=ensured(self.store.work)) as scratch:
            context = replace(shared.context, work=Path(scratch), seed=cell.seed, setting=cell.setting)
            trained = train(cell.method, context, dict(cell.options))
        if self.keep_adapters:
            trained.policy.save_pretrained(self.store.work / "adapters" / cell.name, tokenizer=context.tokenizer)
        finished = time.perf_counter()
        samples: dict[str, Any] = {"base": shared.material.base_answers}
        points = measure(
            trained.policy, context.tokenizer, shared.material, cell.setting.measuring, shared.judge, cell.seed, samples
        )
        tasks = self.tasks(cell, trained.policy, context.tokenizer, points)
        self.write_samples(cell, sample_rows(shared.material.prompts, samples))
        result = {
            "base": shared.base,
            "data": {
                "sha256": context.pools.digest(),
                "train_pairs": len(context.pools.train),
                "held_out_pairs": len(context.pools.held_out),
                "judge_pairs": len(context.pools.judge),
                "groups": shared.material.groups,
                "prompts": len(shared.material.prompts),
            },
            "judge": {"name": shared.judge.name, "held_out_accuracy": shared.judge_accuracy},
            "policy": trained.policy.configs[trained.policy.adapters[0]].to_dict(),
            "training": trained.figures,
            "points": points,
            "tasks": tasks,
            "seconds": {
                "prepare": prepared - start,
                "train": finished - prepared,
                "measure": time.perf_counter() - finished,
            },
            "provenance": provenance(trained.policy.device),
        }
        self.store.write(cell, result)
        return result

    def tasks(self, cell: Cell, policy: Any, tokenizer: Any, points: list[dict[str, Any]]) -> dict[str, Any]:
        """Benchmarks of lm-eval at the sampled strengths, where the setting asks for any.

        What each item lost goes to the points as "lost", {task: [base's score − policy's]}.
        """
        measuring = cell.setting.measuring
        if not measuring.tasks:
            return {}
        from qadapter.evaluation.benchmarks import task_folder
        from qadapter.evaluation.forgetting import run_tasks

        columns = {f"{STRENGTH}={value:g}": {"strength": value} for value in measuring.sampled_strengths}
        found = run_tasks(
            policy, tokenizer, list(measuring.tasks), columns, measuring.task_limit,
            batch_size=measuring.generation_batch, include_path=task_folder(self.data / "bench"), shared=True,
        )  # fmt: skip
        for point in points:
            name = f"{STRENGTH}={point['value']:g}"
            if point["dial"] == STRENGTH and name in columns:
                own = {task: figures for task, figures in found["tasks"].items() if "scores" in figures}  # no groups
                point["lost"] = {task: lost(figures["scores"], name) for task, figures in own.items()}
        return {
            name: {key: figures[key] for key in ("metric", "n", "columns", "differences")}
            for name, figures in found["tasks"].items()
        }

    def write_samples(self, cell: Cell, rows: list[dict[str, Any]]) -> None:
        """The sampled answers as JSON Lines, in the scratch folder."""
        path = ensured(self.store.work / "samples") / f"{cell.name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    def shared(self, cell: Cell) -> Shared:
        """What the cell shares with others: computed once, the latest one is kept."""
        key = json.dumps([cell.described()["setting"], cell.seed], sort_keys=True)
        if key not in self._shared:
            self._shared.clear()
            self._shared[key] = self.load_shared(cell)
        return self._shared[key]

    def load_shared(self, cell: Cell) -> Shared:
        """Data, base, judge, and the base's own answers."""
        setting = cell.setting
        base = self.base_of(setting)
        tokenizer = load_tokenizer(resolve_base(base))
        cache = self.cache_of(setting)
        context = Context(setting, None, tokenizer, base, cell.seed, cache, cache)  # type: ignore[arg-type]
        policy = context.new_policy()
        for source in {setting.pairs, *setting.retained} & set(OWN_PAIRS):
            write_pairs(source, policy, tokenizer, self.data, cache, setting.measuring.generation_batch)
        identity = {
            "name": setting.base,
            "prepared": setting.prepared,
            "revision": policy.base_source.revision,
            "fingerprint": weight_fingerprint(policy.base),
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        context.pools = load_pools(setting, tokenizer, self.data, cache)
        judge = make_judge(context)
        accuracy = held_out_accuracy(judge, context.pools.held_out)
        return Shared(context, load_material(context, self.data), judge, accuracy, identity)

    def cache_of(self, setting: Setting) -> Path:
        """A folder for what depends on the setting but for its training: the base's answers and the like."""
        described = Cell(setting, "base", (), 0).described()["setting"]
        described.pop("training")
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
        return ensured(self.store.work / "cache" / f"{setting.name}-{digest}")

    def base_of(self, setting: Setting) -> str:
        """The base to load: the setting's, or that one tuned to `prepared` by DPO first, which is kept as a folder."""
        if setting.base == "tiny":
            base = str(write_tiny_base(ensured(self.store.work / "bases") / "tiny"))
        else:
            base = setting.base
        if not setting.prepared:
            return base
        first = replace(setting, name=f"prepared-{setting.name}", pairs=setting.prepared, prepared="", retained=())
        cell = Cell.of(first, "dpo", {"beta": PREPARED_BETA}, 0)
        folder = self.store.work / "bases" / cell.name
        if not (folder / "config.json").exists():
            self.say(f"tuning the base to {setting.prepared} first")
            tokenizer = load_tokenizer(resolve_base(base))
            cache = self.cache_of(first)
            with tempfile.TemporaryDirectory(dir=self.store.work) as scratch:
                pools = load_pools(first, tokenizer, self.data, cache)
                context = Context(first, pools, tokenizer, base, 0, Path(scratch), cache)
                policy = train("dpo", context, {"beta": PREPARED_BETA}).policy
            policy.configs[policy.adapters[0]] = QAdapterConfig()
            export_merged(policy, folder, tokenizer)
        return str(folder)


def lost(scores: dict[str, list[float]], column: str) -> list[float]:
    """What the column lost of the base's score, an item."""
    return [before - after for before, after in zip(scores["base"], scores[column], strict=True)]


def provenance(device: torch.device) -> dict[str, Any]:
    """Commit, versions, device and command."""
    found = environment(device)
    found["versions"] |= {name: version(name) for name in RIVALS}
    command = " ".join(["python -m benchmarks.experiments", *map(portable, sys.argv[1:])])
    return found | {"commit": commit(), "command": command}


def portable(argument: str) -> str:
    """The argument, or of an absolute path its last part: results name no folders of a machine."""
    return Path(argument).name if argument.startswith("/") else argument


def commit() -> str | None:
    """The checkout's commit, with a mark if files differ from it; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../../src", ".")
    return f"{head}{' with changes' if changed else ''}" if head else None


def ensured(folder: Path) -> Path:
    """The folder, made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def default_threads() -> int:
    """Threads for this process on the CPU: two busy processes with two threads each wait for each other."""
    return 1 if default_device() == "cpu" else torch.get_num_threads()
