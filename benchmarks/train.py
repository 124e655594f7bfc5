"""Training speed and memory: ours, TRL's DPO and the authors' loss, on the same pairs in the same run.

    python benchmarks/train.py                                   # SmolLM2-135M-Instruct on the CPU
    python benchmarks/train.py --device cuda --shape llama-8b    # random weights of an 8B Llama, bfloat16
    python benchmarks/train.py --check                           # fails where a ratio or an allocation got worse

A step is forward, backward and AdamW on LoRA parameters (rank 8, all linear layers or those of the upper half). The
contenders take turns within each round, on the same pairs; figures are medians over rounds, ratios are to TRL's
DPOTrainer (its fused head, reference by disabled adapter) of the same round and the same adapted layers. Without
--pairs-file the pairs are the built-in ones.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from allocations import PeakAllocations
from arithmetic import matmul_rate, needed_operations
from contenders import Contender, Pairs, contenders
from decode import LLAMA_8B, random_llama, synchronise
from results_file import installed, write
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from qadapter import load_preference_dataset
from qadapter.data import tokenise_preferences
from qadapter.modeling.bases import load_base, load_tokenizer, resolve_base
from qadapter.plots import line_chart

# What --check holds: pairs a second over TRL's, a bit more than half of what they are; peak allocations of a step over
# TRL's; and matmuls of a step over what it cannot do without. The latter two are counted, and so have next to no room:
# full logits, chunks of the head too large, prompts or a trunk that run twice are beyond them (benchmarks/LOG.md).
FLOORS = {"ours": 2.5, "ours, upper half": 3.0}
CEILINGS = {"ours": 0.13, "ours, upper half": 0.1}
MOST_OPERATIONS = 1.0  # attention is needed, and not counted: 0.97


def load_pairs(options: argparse.Namespace, needed: int) -> list[dict[str, Any]]:
    """Tokenised pairs: the first `needed` of a shuffled file or of the built-in ones, or random ones."""
    if options.length or options.shape == "small":
        return random_pairs(needed, options.length, options.prompt)
    pairs = load_preference_dataset(str(options.pairs_file or "builtin"))
    tokenizer = load_tokenizer(resolve_base("builtin"))
    tokenised, _ = tokenise_preferences(pairs.shuffle(seed=0).select(range(min(len(pairs), 2 * needed))), tokenizer)
    rows = [tokenised[index] for index in range(len(tokenised))]
    return (rows * (needed // len(rows) + 1))[:needed]


def random_pairs(count: int, length: int | None, prompt: int) -> list[dict[str, Any]]:
    """Pairs of `length` tokens a row, `prompt` of them the prompt's; without a length, of many lengths."""
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high + 1, (1,), generator=generator))
        return torch.randint(5, 1000, (size,), generator=generator).tolist()

    sizes = (prompt // 2, prompt, 20, 180) if length is None else (prompt, prompt, length - prompt, length - prompt)
    return [
        {"prompt_ids": ids(*sizes[:2]), "chosen_ids": ids(*sizes[2:]), "rejected_ids": ids(*sizes[2:])}
        for _ in range(count)
    ]


def measure(base: PreTrainedModel, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Median seconds a step of each contender, pairs a second, ratios, and memory, in one setting."""
    rounds = options.rounds + 1
    pairs = load_pairs(options, rounds * options.pairs)
    batches = [pairs[start : start + options.pairs] for start in range(0, rounds * options.pairs, options.pairs)]
    entries: list[Contender] = []
    memory: dict[str, int] = {}
    operations: dict[str, int | None] = {}
    for name, make in contenders(base, options, pairs).items():
        try:
            entry, memory[name], operations[name] = with_counts(make, base, batches[0], options)  # warms up, too
            entries.append(entry)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory", file=sys.stderr)
        gc.collect()
        torch.cuda.empty_cache()
    seconds: dict[str, list[float]] = {entry.name: [] for entry in entries}
    for number, batch in enumerate(batches[1:], start=1):
        for entry in entries:
            synchronise(options.device)
            start = time.perf_counter()
            entry.step(batch)
            synchronise(options.device)
            seconds[entry.name].append(time.perf_counter() - start)
        print(f"round {number} of {options.rounds}", file=sys.stderr)
    halves = (False, True)
    first = {half: needed_operations(base, batches[0], half * base.config.num_hidden_layers // 2) for half in halves}
    tokens = sum(len(ids) for pair in pairs[options.pairs :] for ids in pair.values()) / options.rounds
    needed = {
        half: statistics.median(
            needed_operations(base, batch, half * base.config.num_hidden_layers // 2) for batch in batches[1:]
        )
        for half in halves
    }
    rate = matmul_rate(options.device, options.dtype)
    return {
        entry.name: {
            "seconds": round(median, 4),
            "pairs_per_second": round(options.pairs / median, 3),
            "ratio_to_rival": median_ratio(seconds[entry.name], seconds.get(entry.rival)),
            "rival": entry.rival,
            "ratio_to_trl": median_ratio(seconds[entry.name], seconds.get("TRL DPO")),
            "peak_mib": round(memory[entry.name] / 2**20, 1),
            "matmuls_over_needed": share(operations[entry.name], first["upper half" in entry.name]),
            "share_of_matmul_rate": round(needed["upper half" in entry.name] / median / rate, 3),
            "matmul_tflops": round(rate / 1e12, 1),
            "distinct_tokens_a_step": round(tokens),
        }
        for entry in entries
        for median in [statistics.median(seconds[entry.name])]
    }


def median_ratio(ours: list[float], theirs: list[float] | None) -> float | None:
    """How many times as fast as the rival, by the rounds; None if it did not run."""
    return None if theirs is None else round(statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 3)


def share(part: float | None, whole: float) -> float | None:
    """The part of the whole; None if it is not known."""
    return None if part is None else round(part / whole, 3)


def with_counts(
    make: Any, base: PreTrainedModel, batch: Pairs, options: argparse.Namespace
) -> tuple[Contender, int, int | None]:
    """The contender, bytes at the peak of its step, and the floating-point operations of its matmuls if countable.

    Bytes are, on the CPU, what the step itself allocates; on a GPU, the base's weights, the contender's own and the
    step's. Compiled code hides its matmuls.
    """
    before = held(options.device)
    entry = make()
    entry.step(batch)
    if options.device == "cpu":
        gc.collect()
        with PeakAllocations() as allocations:
            entry.step(batch)
        with FlopCounterMode(display=False) as matmuls:  # a step of its own: it takes operations apart
            entry.step(batch)
        return entry, allocations.peak, None if options.compile else matmuls.get_total_flops()
    entry.step(batch)  # a second shape of the compiled code, perhaps
    torch.cuda.reset_peak_memory_stats()
    others = before - sum(p.numel() * p.element_size() for p in {id(p): p for p in base.parameters()}.values())
    entry.step(batch)
    torch.cuda.synchronize()
    return entry, torch.cuda.max_memory_allocated() - others, None


def held(device: str) -> int:
    """Bytes that tensors hold on the GPU."""
    gc.collect()
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def base_model(options: argparse.Namespace) -> PreTrainedModel:
    if options.shape == "builtin":
        return load_base(resolve_base("builtin"), dtype=options.dtype).to(options.device)
    return random_llama(LLAMA_8B if options.shape == "llama-8b" else SMALL, options)


SMALL = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 16_384,
}


def check(figures: dict[str, dict[str, Any]]) -> list[str]:
    """What is worse than --check allows."""
    problems = []
    for name, floor in FLOORS.items():
        ratio = figures[name]["ratio_to_rival"]
        if ratio < floor:
            problems.append(f"{name}: {ratio:.2f} times the pairs a second of {figures[name]['rival']}; floor {floor}")
    for name, ceiling in CEILINGS.items():
        peak = figures[name]["peak_mib"] / figures[figures[name]["rival"]]["peak_mib"]
        if peak > ceiling:
            problems.append(f"{name}: {peak:.3f} times the peak of {figures[name]['rival']}; ceiling {ceiling}")
        if (operations := figures[name]["matmuls_over_needed"]) > MOST_OPERATIONS:
            problems.append(f"{name}: {operations:.3f} times the matmuls needed; ceiling {MOST_OPERATIONS}")
    return problems


def plot(figures: dict[str, dict[str, Any]]) -> str:
    """Speed against memory as SVG: for each contender a line from all layers adapted to their upper half alone."""
    series: dict[str, list[tuple[float, float]]] = {}
    for contender, values in figures.items():
        if "padded" not in contender:
            point = values["peak_mib"], values["pairs_per_second"]
            series.setdefault(contender.replace(", upper half", ""), []).append(point)
    return line_chart(
        series,
        "Training: speed against memory; from all layers to the upper half",
        "MiB that a step allocates at its peak, besides the weights",
        "pairs a second",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="builtin", choices=["builtin", "llama-8b", "small"])
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"])
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["4"],
        metavar="PAIRS[/N]",
        help="pairs a step, and, after a slash, that every Nth layer is checkpointed",
    )
    parser.add_argument("--targets", nargs="+", default=None, help="modules with LoRA; default: every linear one")
    parser.add_argument("--compile", action="store_true", help="contenders with compiled layers, too")
    parser.add_argument("--pairs-file", type=Path, default=None, help="JSONL of pairs, may be gzipped")
    parser.add_argument("--length", type=int, default=None, help="random pairs of this many tokens a row instead")
    parser.add_argument("--prompt", type=int, default=64, help="of which the prompt has so many")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=[], help="contenders by name; a ratio needs the rival, too")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    if options.check:
        options.shape, options.only = "small", [*FLOORS, "TRL DPO", "TRL DPO, upper half"]
    name = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.dtype = getattr(torch, name)
    torch.manual_seed(0)
    base, results = base_model(options), []
    for setting in options.settings:
        pairs, _, every = setting.partition("/")
        options.pairs, options.checkpoint_every = int(pairs), int(every or 0)
        figures = measure(base, options)
        results.append({"pairs": options.pairs, "checkpoint_every": options.checkpoint_every, "figures": figures})
        if not options.check:  # after each setting: a run that is cut short leaves what it has measured
            written = write(
                options.output,
                f"train_{options.shape}_{options.device}",
                options.device,
                name,
                installed("torch", "transformers", "peft", "trl"),
                shape=options.shape,
                targets=options.targets or "all linear layers",
                length=options.length,
                prompt=options.prompt,
                results=results,
            )
            stem = written.stem if len(options.settings) == 1 else f"{written.stem}_{setting.replace('/', '-')}"
            written.with_name(f"{stem}.svg").write_text(plot(figures))
        print(f"{options.pairs} pairs a step, checkpoints every {options.checkpoint_every} layers")
        for contender, values in figures.items():
            ratio = values["ratio_to_rival"] or math.nan
            print(
                f"  {contender:<40} {values['pairs_per_second']:>8.2f} pairs/s {ratio:>6.2f}x"
                f" {values['peak_mib']:>9.1f} MiB {values['share_of_matmul_rate']:>6.2f} of the matmul rate"
            )
    if options.check:
        problems = check(figures)
        for problem in problems:
            print(f"worse than allowed: {problem}")
        return 1 if problems else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
