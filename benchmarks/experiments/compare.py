"""Stored samples against the base's, by any judge of the package (a language model behind an endpoint, say)."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.experiments.cells import read_results
from benchmarks.experiments.pools import read_lines
from qadapter.errors import DataError
from qadapter.evaluation.judges.specs import make_judge
from qadapter.evaluation.judges.verdicts import judge_all, win_rate
from qadapter.evaluation.part_store import jsonable
from qadapter.generation import Answer
from qadapter.new_folders import write_ordered_json


def judge_samples(spec: str, results: Path, work: Path) -> None:
    """Write judged/NAME.json beside each results file whose samples are stored; finished ones are not judged again.

    Raises:
        DataError: no samples are stored.
    """
    judge = make_judge(spec)
    done = 0
    for result in read_results(results):
        samples = work / "samples" / f"{Path(result['file']).stem}.jsonl"
        target = results / "judged" / result["file"]
        if not samples.exists() or (target.exists() and json.loads(target.read_text())["judge"] == spec):
            continue
        rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in read_lines(samples):
            rows[row["point"]].append(row)
        base = rows.pop("base")
        rates = {}
        for point, own in rows.items():
            answers = ([Answer(row["text"], row["finished"]) for row in part] for part in (own, base))
            rates[point] = win_rate(judge_all(judge, [row["prompt"] for row in own], *answers))
        write_ordered_json(target, jsonable({"judge": spec, "cell": result["cell"], "win_rates": rates}))
        done += 1
    if not done:
        raise DataError(f"{work / 'samples'}: no samples that are not judged yet.")
