"""The quickstart's training with packed rows and the shared trunk, and without either, in turn.

python benchmarks/quickstart_training.py        # a few minutes on two cores
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from results_file import installed, write
from rich.progress import Progress

from qadapter import QAdapterTrainingArguments, load_preference_dataset, quickstart
from qadapter.devices import cpu_dtype
from qadapter.modeling.bases import load_tokenizer, resolve_base

KINDS = {"with both": True, "without": False}


def train(fast: bool, steps: int, dtype: torch.dtype) -> float:
    """Seconds of a training run, the model's loading included."""
    source, pairs = resolve_base("builtin"), load_preference_dataset("builtin")
    tokenizer = load_tokenizer(source)
    # The quickstart has no switches for the two: its trainer's arguments get them here.
    quickstart.QAdapterTrainingArguments = functools.partial(  # type: ignore[misc]
        QAdapterTrainingArguments, packing=fast, share_trunk=fast
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Progress(disable=True) as progress:
        quickstart.train_adapter(Path(folder), source, tokenizer, pairs, dtype, steps, progress)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="of the quickstart's 60")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    dtype = cpu_dtype()
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds):
        for kind, fast in KINDS.items():
            seconds[kind].append(train(fast, options.steps, dtype))
            print(f"round {number + 1} of {options.rounds}, {kind}: {seconds[kind][-1]:.1f} s", file=sys.stderr)
    ratio = statistics.median(slow / fast for fast, slow in zip(*seconds.values(), strict=True))
    medians = {kind: round(statistics.median(values), 1) for kind, values in seconds.items()}
    write(
        None,
        "quickstart_training",
        "cpu",
        str(dtype).removeprefix("torch."),
        installed("torch", "transformers"),
        steps=options.steps,
        seconds=medians,
        ratio=round(ratio, 3),
    )
    print(medians, f"{ratio:.2f}x")


if __name__ == "__main__":
    main()
