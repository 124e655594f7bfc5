"""The whole trade-off curve of an adapter: every strength from one pass over the hidden states (drift.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from qadapter.errors import ConfigError
from qadapter.evaluation.columns import BASE, Column
from qadapter.evaluation.environment import environment
from qadapter.evaluation.evaluate import Evaluation
from qadapter.evaluation.gate import Limits, drop, is_rate, keeps, kl_figures
from qadapter.evaluation.part_store import PartStore, jsonable
from qadapter.evaluation.progress import Track, silent
from qadapter.evaluation.subjects import Subject
from qadapter.evaluation.tables import whole_tasks
from qadapter.evaluation.workload import Workload

SCHEMA_VERSION = 1
# Of a benchmark, for the base and for points of another alpha_0, which cannot generate.
UNCHANGED, NOT_RUN = ({"value": value, "low": None, "high": None} for value in (0.0, None))


@dataclass(frozen=True)
class SweepLimits:
    """The budget under which a strength is recommended.

    Args:
        max_kl: KL(policy ‖ base) in nats a token, on chosen answers and on neutral text.
        max_drop: percentage points that any benchmark of the sweep may fall; a group is one, whatever its tasks do.
        drops: {task: percentage points}, for single benchmarks.
        confident: as of `gate.Limits`.
    """

    max_kl: float | None = None
    max_drop: float | None = None
    drops: Mapping[str, float] = field(default_factory=dict)
    confident: bool = False

    def limits(self, tasks: Sequence[str]) -> Limits:
        """The same as limits of a gate on `tasks`."""
        drops = {**({} if self.max_drop is None else dict.fromkeys(tasks, self.max_drop)), **self.drops}
        return Limits(self.max_kl, drops, confident=self.confident)


def run_sweep(
    subject: Subject,
    columns: Sequence[Column],
    workload: Workload,
    budget: SweepLimits,
    store: PartStore,
    track: Track = silent,
) -> dict[str, Any]:
    """The points of a sweep, and the recommended one.

    Args:
        columns: settings of the adapter, without the base, which is the point of strength 0.

    Raises:
        ConfigError: a limit on benchmarks without any benchmark.
    """
    if budget.max_drop is not None and not workload.tasks:
        raise ConfigError("--max-drop needs benchmarks: name them with --tasks, or limit --max-kl.")
    evaluation = Evaluation(
        subject, columns, workload, store, track, detailed=[], limited_tasks=tuple(budget.drops), swept=True
    )
    results = {"pairs": evaluation.pairs(), "neutral": evaluation.neutral(), "tasks": evaluation.tasks()}
    points = [point(results, Column(BASE, 0.0)), *(point(results, column) for column in columns)]
    # What is no rate loses no percentage points: a limit on any benchmark is none on it.
    limits = budget.limits([task for task in whole_tasks(results["tasks"]) if is_rate(results["tasks"][task])])
    return jsonable(
        {
            "schema_version": SCHEMA_VERSION,
            "adapter": {"path": subject.path, "adapters": evaluation.identity["adapters"]},
            "base": evaluation.identity["base"],
            "workload": workload.to_dict(),
            "tasks": {
                task: {
                    "metric": figures["metric"],
                    "n": figures["n"],
                    "unit": "points" if is_rate(figures) else "score",
                    "subtasks": figures.get("subtasks", []),
                }
                for task, figures in results["tasks"].items()
            },
            "dial": {
                "adapter_weights": columns[0].adapter_weights,
                "decay": columns[0].decay,
                "cap": columns[0].max_kl,
                "threshold": columns[0].min_kl,
                "interpolation": columns[0].interpolation,
            },
            "budget": {
                "max_kl": limits.max_kl,
                "max_drop": dict(limits.max_drop),
                "confident": limits.confident,
            },
            "points": points,
            "recommended": recommend(results, columns, limits),
            "environment": environment(subject.model.device),
        }
    )


def point(results: Mapping[str, Any], column: Column) -> dict[str, Any]:
    """One setting with its gain, its drift and its benchmarks, each an interval."""
    pairs, name = results["pairs"], column.name
    gain = pairs["columns"][name]
    neutral = results["neutral"]["columns"][name]
    return {
        "name": name,
        "strength": column.strength,
        "alpha_0": column.alpha_0,
        "accuracy": gain["accuracy"],
        "prefers_chosen": gain["prefers_chosen"],
        "margin": gain["token_margin"],
        "margin_gain": gain["token_margin_gain"],
        "log_ratio_margin": gain["log_ratio_margin"],
        "kl_chosen": pairs["chosen"]["columns"][name]["kl"],
        "kl_neutral": neutral["kl"],
        "loss_change_neutral": neutral["loss_change"],
        "tasks": {
            task: figures["differences"].get(name, UNCHANGED if name == BASE else NOT_RUN)
            for task, figures in results["tasks"].items()
        },
    }


def recommend(results: Mapping[str, Any], columns: Sequence[Column], limits: Limits) -> dict[str, Any] | None:
    """The largest measured strength that keeps every limit, as all smaller ones do; None without limits.

    A larger one that fits again, as benchmarks' noise has it now and then, would be chosen for its luck. Nothing is
    interpolated: a strength between two points has not been measured. The base keeps every limit, so there always is a
    point; `fits` is false where it is the only one.
    """
    if limits.max_kl is None and not limits.max_drop:
        return None
    candidates = [column for column in columns if column.alpha_0 is None and column.strength > 0]
    ordered = sorted(candidates, key=lambda column: column.strength)
    fitting = list(takewhile(lambda column: fits(results, column.name, limits), ordered))
    best = fitting[-1] if fitting else Column(BASE, 0.0)
    return {"name": best.name, "strength": best.strength, "fits": bool(fitting)}


def fits(results: Mapping[str, Any], column: str, limits: Limits) -> bool:
    """Whether a column keeps every limit, as the gate would have it."""
    kept = [(drop(results, task, column), points) for task, points in limits.max_drop.items()]
    if limits.max_kl is not None:
        kept += [(kl, limits.max_kl) for kl in kl_figures(results, column).values()]
    return all(keeps(figure, "at most", limit, limits.confident) for figure, limit in kept)
