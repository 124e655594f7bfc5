"""The quickstart's training with packed rows and the shared trunk, and without either, in turn.

python benchmarks/quickstart_training.py        # a few minutes on two cores
"""

import argparse
import functools
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress

from qadapter import QAdapterTrainingArguments, load_preference_dataset, quickstart
from qadapter.modeling.bases import load_tokenizer, resolve_base

OUTPUT = Path(__file__).parent / "results" / "quickstart_training.json"
KINDS = {"with both": True, "without": False}


def train(fast: bool, steps: int, dtype: torch.dtype) -> float:
    """Seconds of a training run, the model's loading included."""
    source, pairs = resolve_base("builtin"), load_preference_dataset("builtin")
    quickstart.QAdapterTrainingArguments = functools.partial(  # type: ignore[misc]
        QAdapterTrainingArguments, packing=fast, share_trunk=fast
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Progress(disable=True) as progress:
        quickstart.train_adapter(Path(folder), source, load_tokenizer(source), pairs, dtype, steps, progress)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="of the quickstart's 60")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    dtype = quickstart.faster_dtype()
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds):
        for kind, fast in KINDS.items():
            seconds[kind].append(train(fast, options.steps, dtype))
            print(f"round {number + 1} of {options.rounds}, {kind}: {seconds[kind][-1]:.1f} s", file=sys.stderr)
    ratio = statistics.median(slow / fast for fast, slow in zip(*seconds.values(), strict=True))
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
        "steps": options.steps,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": {kind: round(statistics.median(values), 1) for kind, values in seconds.items()},
        "ratio": round(ratio, 3),
    }
    OUTPUT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["seconds"]), f"{ratio:.2f}x")


if __name__ == "__main__":
    main()
