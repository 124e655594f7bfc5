"""How memory and time of a training step grow with length, prompt, vocabulary, batch and layers: ours and TRL's DPO.

    python benchmarks/scaling.py

A small random Llama on the CPU; one quantity varies at a time. Memory is the counted peak of what a step allocates
(`allocations.py`), the same on every run; seconds are of processor time on one thread, medians of five steps of each,
taken in turn.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from allocations import PeakAllocations
from contenders import our_step, trl_step
from results_file import RESULTS, installed, write
from train import random_pairs
from transformers import LlamaConfig, LlamaForCausalLM

from qadapter.plots import line_chart

ROUNDS = 5
MIDDLE = {"length": 128, "prompt": 32, "vocabulary": 16_384, "pairs": 2, "layers": 4}
PROMPTED = MIDDLE | {"length": 512}  # where the prompt's share varies
AXES = {
    "length": [64, 128, 256, 512, 1024],
    "prompt": [32, 128, 256, 384, 448],
    "vocabulary": [4_096, 16_384, 65_536, 131_072],
    "pairs": [1, 2, 4, 8],
    "layers": [2, 4, 8, 16],
}
LABELS = {
    "length": "tokens a row",
    "prompt": f"prompt tokens of {PROMPTED['length']} a row",
    "vocabulary": "vocabulary",
    "pairs": "pairs a step",
    "layers": "layers",
}


def point(axis: str, value: int) -> dict[str, Any]:
    """MiB and seconds of a step of each contender."""
    sizes = (PROMPTED if axis == "prompt" else MIDDLE) | {axis: value}
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=sizes["layers"],
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=sizes["vocabulary"],
            max_position_embeddings=2048,
        )
    )
    options = argparse.Namespace(device="cpu", checkpoint_every=0, targets=None, dtype=torch.float32)
    upper = list(range(sizes["layers"] // 2, sizes["layers"]))
    steps = {
        "TRL DPO": trl_step(base, options, None),
        "ours": our_step(base, options, None, packing=True, trunk=True),
        "ours, upper half": our_step(base, options, upper, packing=True, trunk=True),
    }
    if axis == "prompt":  # what runs a prompt twice, otherwise alike: all rows have one length, so none is padded
        steps["ours, a row each"] = our_step(base, options, None, packing=False, trunk=True)
    pairs = random_pairs(sizes["pairs"], sizes["length"], sizes["prompt"])
    result: dict[str, Any] = {axis: value}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        step(pairs)
        with PeakAllocations() as allocations:
            step(pairs)
        result[name] = {"peak_mib": round(allocations.peak / 2**20, 2)}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.process_time()
            step(pairs)
            seconds[name].append(time.process_time() - start)
    for name, measured in seconds.items():
        result[name]["seconds"] = round(statistics.median(measured), 4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="only these; others keep theirs")
    options = parser.parse_args()
    torch.set_num_threads(1)  # processor time of threads that wait for each other would tell of the machine's load
    kept = RESULTS / "scaling.json"
    figures = json.loads(kept.read_text())["figures"] if options.axes != list(AXES) else {}
    for axis in options.axes:
        figures[axis] = [point(axis, value) for value in AXES[axis]]
        for row in figures[axis]:
            print(row)
        names = [name for name in figures[axis][0] if name != axis]
        for quantity, suffix, what, unit in (
            ("peak_mib", "", "Memory", "MiB at the peak"),
            ("seconds", "_seconds", "Time", "seconds of one thread"),
        ):
            lines = {name: [(row[axis], row[name][quantity]) for row in figures[axis]] for name in names}
            chart = line_chart(lines, f"{what} of a training step by {LABELS[axis]}", LABELS[axis], unit)
            (RESULTS / f"scaling_{axis}{suffix}.svg").write_text(chart)
    write(None, "scaling", "cpu", "float32", installed("torch", "transformers", "trl"), middle=MIDDLE,
          prompted=PROMPTED, figures=figures)  # fmt: skip


if __name__ == "__main__":
    main()
