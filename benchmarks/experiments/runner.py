"""Runs cells: loads what they share, trains, measures, writes a results file each, and says how long the rest takes."""

import gc
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars

from benchmarks.experiments.cells import Cell, Store
from benchmarks.experiments.judges import Judge, held_out_accuracy, quiet_sklearn
from benchmarks.experiments.likelihood import likelihood_results
from benchmarks.experiments.material import base_answers, load_material, make_judge, sample_rows
from benchmarks.experiments.measure import STRENGTH, Material, lost, measure
from benchmarks.experiments.methods import Context, train
from benchmarks.experiments.own_pairs import write_pairs
from benchmarks.experiments.pools import load_pools
from benchmarks.experiments.provenance import provenance
from benchmarks.experiments.settings import OWN_PAIRS, Setting
from benchmarks.experiments.tiny import write_tiny_base
from qadapter import QAdapterConfig
from qadapter.export.merged import export_merged
from qadapter.modeling.bases import load_tokenizer, resolve_base
from qadapter.modeling.fingerprints import tokenizer_fingerprint, weight_fingerprint

SETTINGS_KEPT = 8
PREPARED_BETA = 0.1


def say_at_once(line: str) -> None:
    """Print a line that appears even where output goes to a file."""
    print(line, flush=True)


@dataclass
class Shared:
    """What the cells of one setting have in common; the base's answers are those of one seed."""

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
    say: Callable[[str], None] = say_at_once
    _shared: dict[str, Shared] = field(default_factory=dict)

    def run(self, cells: Sequence[Cell]) -> int:
        """Run those that are not finished; how many were."""
        quiet()
        todo = [cell for cell in cells if not self.store.finished(cell)]
        self.say(f"{len(cells)} cells, {len(cells) - len(todo)} finished before, {len(todo)} to run")
        start = time.perf_counter()
        for number, cell in enumerate(todo, 1):
            self.say(f"[{number}/{len(todo)}] {cell.name}")
            result = self.run_cell(cell)
            elapsed = time.perf_counter() - start
            left = elapsed / number * (len(todo) - number)
            self.say(
                f"[{number}/{len(todo)}] {sum(result['seconds'].values()):.0f} s ({self.shown_seconds(result)}); "
                f"{self.shown_figures(result)}; {clock(elapsed)} gone, about {clock(left)} left"
            )
        return len(todo)

    @staticmethod
    def shown_seconds(result: dict[str, Any]) -> str:
        """What the parts of a cell took."""
        return ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items())

    @staticmethod
    def shown_figures(result: dict[str, Any]) -> str:
        """What came out at full strength, to see at once whether a run makes sense."""
        full = next((point for point in result["points"] if point["value"] == 1.0), result["points"][0])
        kl, margin = (statistics.mean(full["pairs"][name]) for name in ("kl", "margin_gain"))
        return f"KL {kl:.3f}, margin {margin:+.3f}"

    def run_cell(self, cell: Cell) -> dict[str, Any]:
        """Train, measure, write; the result."""
        start = time.perf_counter()
        shared = self.shared(cell)
        prepared = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=ensured(self.store.work)) as scratch:
            context = replace(shared.context, work=Path(scratch))
            trained = train(cell.method, context, dict(cell.options))
        if self.keep_adapters:
            trained.policy.save_pretrained(self.store.work / "adapters" / cell.name, tokenizer=context.tokenizer)
        free_memory()
        finished = time.perf_counter()
        samples: dict[str, Any] = {"base": shared.material.base_answers}
        points = measure(
            trained.policy, context.tokenizer, shared.material, cell.setting.measuring, shared.judge, cell.seed, samples
        )
        tasks = self.tasks(cell, trained.policy, context.tokenizer, points, shared.material.items)
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

    def tasks(
        self, cell: Cell, policy: Any, tokenizer: Any, points: list[dict[str, Any]], items: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Benchmarks, where the setting asks for any: of lm-eval at the sampled strengths, or of likelihood.py at all.

        What each item lost goes to the points as "lost", {task: [base's score − policy's]}.
        """
        measuring = cell.setting.measuring
        if items:
            return likelihood_results(policy, items, measuring, points)
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
        """What the cell shares with others: computed once a setting; the latest settings are kept."""
        key = setting_key(cell.setting)
        shared = self._shared.pop(key, None) or self.load_shared(cell.setting)
        while len(self._shared) >= SETTINGS_KEPT:
            del self._shared[next(iter(self._shared))]
        self._shared[key] = shared
        context = replace(shared.context, seed=cell.seed)
        answers = base_answers(context, shared.material.prompts)
        return replace(shared, context=context, material=replace(shared.material, base_answers=answers))

    def knows(self, setting: Setting) -> bool:
        """Whether what the setting's cells share is in memory."""
        return setting_key(setting) in self._shared

    def load_shared(self, setting: Setting) -> Shared:
        """Data, base and judge."""
        base = self.base_of(setting)
        tokenizer = load_tokenizer(resolve_base(base))
        cache = self.cache_of(setting)
        context = Context(setting, None, tokenizer, base, 0, cache, cache)  # type: ignore[arg-type]
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
        training = described.pop("training")
        if setting.prepared:
            described.setdefault("prepared_by", training)
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
        first = replace(
            setting, name=f"prepared-{setting.name}", pairs=setting.prepared, prepared="", prepared_by=None,
            retained=(), training=setting.prepared_by or setting.training,
        )  # fmt: skip
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


def quiet() -> None:
    """Libraries say nothing but errors."""
    quiet_sklearn()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()


def free_memory() -> None:
    """Give back what training held: other processes may share the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def setting_key(setting: Setting) -> str:
    """The first digits of the SHA-256 of all that a setting says."""
    return Cell(setting, "setting", (), 0).key


def ensured(folder: Path) -> Path:
    """The folder, made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
