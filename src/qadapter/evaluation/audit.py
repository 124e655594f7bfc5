"""The audit: what one adapter gained and what it cost, with a gate, as one JSON document (docs/evaluation.md)."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qadapter.evaluation.columns import Column
from qadapter.evaluation.differences import without_items
from qadapter.evaluation.environment import environment
from qadapter.evaluation.evaluate import Evaluation
from qadapter.evaluation.findings import findings
from qadapter.evaluation.gate import Limits, check, verdict
from qadapter.evaluation.part_store import PartStore, jsonable
from qadapter.evaluation.progress import Track, silent
from qadapter.evaluation.subjects import Subject
from qadapter.evaluation.workload import Workload

SCHEMA_VERSION = 1
POLICY = "policy"
# The trade-off curve in the report costs next to nothing, as all strengths share one pass, and where weights are
# interpolated a pass each (drift.py).
CURVE_SHARES = (0.25, 0.5, 0.75, 1.25, 1.5)


def curve_columns(column: Column) -> list[Column]:
    """The audited column first, then others along the same path, named by their strength."""
    if column.strength == 0.0:
        return [column]
    others = [column.strength * share for share in CURVE_SHARES]
    return [column, *(replace(column, name=f"{POLICY}@{strength:g}", strength=strength) for strength in others)]


def run_audit(
    subject: Subject,
    column: Column,
    workload: Workload,
    limits: Limits,
    store: PartStore,
    track: Track = silent,
) -> dict[str, Any]:
    """The audit of one setting of one adapter.

    Everything but `environment` depends on the inputs alone. Parts that an interrupted audit finished are taken from
    the store.
    """
    start = time.perf_counter()
    columns = curve_columns(column)
    evaluation = Evaluation(
        subject, columns, workload, store, track, detailed=[column.name], limited_tasks=tuple(limits.max_drop)
    )
    results = without_items(measure_everything(evaluation))
    gate = check(results, column.name, limits)
    identity = evaluation.identity
    document = {
        "schema_version": SCHEMA_VERSION,
        "verdict": verdict(gate),
        "column": column.name,
        "gate": gate,
        "findings": findings(results, column.name),
        "adapter": {"name": Path(subject.path).resolve().name, "adapters": identity["adapters"]},
        "base": identity["base"],
        "settings": {
            **{name: value for name, value in asdict(column).items() if name != "name"},
            "columns": [asdict(own) for own in columns],
            "limits": asdict(limits),
            "workload": workload.to_dict(),
        },
        "results": results,
    }
    seconds = {"seconds": round(time.perf_counter() - start, 1), "reused_parts": sorted(store.reused)}
    return jsonable({**document, "environment": {**environment(subject.model.device), **seconds}})


def measure_everything(evaluation: Evaluation) -> dict[str, Any]:
    """All parts, the cheap ones first, so that an interruption loses little."""
    return {
        "pairs": evaluation.pairs(),
        "neutral": evaluation.neutral(),
        "instructions": evaluation.instructions(),
        "behaviour": evaluation.behaviour(),
        "judged": evaluation.judged(),
        "tasks": evaluation.tasks(),
    }


def curve(audit: Mapping[str, Any], gain: str = "token_margin_gain") -> Sequence[tuple[float, float, float]]:
    """(strength, KL on chosen answers, preference gain) along the audited path, from the base on."""
    pairs = audit["results"]["pairs"]
    points = [(0.0, 0.0, 0.0 if gain == "token_margin_gain" else pairs["columns"]["base"][gain]["value"])]
    for column in audit["settings"]["columns"]:
        kl = pairs["chosen"]["columns"][column["name"]]["kl"]["value"]
        points.append((column["strength"], kl, pairs["columns"][column["name"]][gain]["value"]))
    return sorted(point for point in points if None not in point)
