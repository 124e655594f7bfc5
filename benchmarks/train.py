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
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from allocations import PeakAllocations
from datasets import Dataset
from decode import LLAMA_8B, TARGETS, copy_of, synchronise
from experiments.authors import authors_loss
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from trl import DPOConfig, DPOTrainer

from qadapter import QAdapterConfig, QAdapterForCausalLM, load_preference_dataset
from qadapter.base_states import IN_MEMORY, BaseStatesCollator, keep_base_states
from qadapter.data import PackedCollator, PreferenceCollator, tokenise_preferences
from qadapter.fused import TokenStatistics
from qadapter.modeling.bases import load_base, load_tokenizer, resolve_base
from qadapter.modeling.packed import enable_packing
from qadapter.objective import pair_losses

RESULTS = Path(__file__).parent / "results"
Pairs = Sequence[dict[str, Any]]
METHOD = QAdapterConfig()
# What --check holds: pairs a second over TRL's, and peak allocations of a step over TRL's.
FLOORS = {"ours": 1.5, "ours, upper half": 1.8}
CEILINGS = {"ours": 0.5, "ours, upper half": 0.5}


@dataclass
class Contender:
    """A way to train; `step` runs one optimiser step on pairs. Ratios are to `rival`."""

    name: str
    step: Callable[[Pairs], Any]
    rival: str


def lora(layers: Sequence[int] | None) -> LoraConfig:
    """Rank 8 on every linear layer, of the given decoder layers or of all."""
    chosen = None if layers is None else list(layers)
    return LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, layers_to_transform=chosen, task_type="CAUSAL_LM")


def stepper(loss_of: Callable[[Pairs], torch.Tensor], model: torch.nn.Module) -> Callable[[Pairs], torch.Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=parameters[0].is_cuda)

    def step(pairs: Pairs) -> torch.Tensor:
        loss = loss_of(pairs)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return step


def on(device: str, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def our_step(
    base: PreTrainedModel,
    options: argparse.Namespace,
    layers: Any,
    packing: bool,
    trunk: bool,
    kept: Pairs | None = None,
) -> Any:
    """The objective through `QAdapterForCausalLM`, as the trainer runs it.

    Args:
        kept: all pairs of the run, for the base's states of which to be kept: a step of a later epoch.
    """
    model = QAdapterForCausalLM.from_base(copy_of(base), METHOD, lora(layers)).train()
    checkpointed(model, options)
    if not trunk:
        model.shared_layers = 0
    packing = packing and enable_packing(model.base)
    collator = PackedCollator() if packing else PreferenceCollator(pad_token_id=0)

    states = None if kept is None else keep_base_states(model, Dataset.from_list(list(kept)), collator, IN_MEMORY, 1)
    places = {id(pair): place for place, pair in enumerate(kept or ())}
    with_states = BaseStatesCollator(collator)

    def loss_of(pairs: Pairs) -> torch.Tensor:
        rows = pairs if states is None else [states[places[id(pair)]] for pair in pairs]
        batch = on(options.device, with_states(rows))
        mask = batch["completion_mask"] if packing else batch["completion_mask"][:, 1:]
        return pair_losses(TokenStatistics(*model(**batch)), mask, METHOD)[0].mean()

    return stepper(loss_of, model)


def trl_step(base: PreTrainedModel, options: argparse.Namespace, layers: Any) -> Any:
    """TRL's DPOTrainer: its collator, its loss."""
    words = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=get_peft_model(copy_of(base), lora(layers)),
            args=DPOConfig(
                output_dir=folder,
                use_cpu=options.device == "cpu",
                bf16=False,
                gradient_checkpointing=options.checkpointing,
                max_length=None,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(words),
            processing_class=load_tokenizer(resolve_base("builtin")),
        )
    model = trainer.model.train()
    checkpointed(model, options)

    def loss_of(pairs: Pairs) -> torch.Tensor:
        return trainer.compute_loss(model, on(options.device, trainer.data_collator(list(pairs))))

    return stepper(loss_of, model)


def authors_step(base: PreTrainedModel, options: argparse.Namespace, layers: Any) -> Any:
    """The authors' loss as their code computes it: full logits of padded rows, two passes."""
    model = get_peft_model(copy_of(base), lora(layers)).train()
    checkpointed(model, options)
    collator = PreferenceCollator(pad_token_id=0)

    def loss_of(pairs: Pairs) -> torch.Tensor:
        batch = on(options.device, collator(pairs))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), model.disable_adapter():
            base_logits = model(**inputs, use_cache=False).logits
        logits = model(**inputs, use_cache=False).logits
        return authors_loss(
            logits.float(), base_logits.float(), batch["input_ids"], batch["completion_mask"], 1.0, 0.01, 1.0, 0.1
        )

    return stepper(loss_of, model)


def checkpointed(model: Any, options: argparse.Namespace) -> None:
    if options.checkpointing:
        model.activation_checkpointing_enable()
        model.base.enable_input_require_grads() if hasattr(model, "base") else model.enable_input_require_grads()


def contenders(base: PreTrainedModel, options: argparse.Namespace, pairs: Pairs) -> dict[str, Callable[[], Contender]]:
    """Each made when it is first needed."""
    depth = base.config.num_hidden_layers
    upper = list(range(depth // 2, depth))
    whole, half = "TRL DPO", "TRL DPO, upper half"
    made: dict[str, tuple[str, Callable[[], Any]]] = {
        "authors": (whole, lambda: authors_step(base, options, None)),
        whole: (whole, lambda: trl_step(base, options, None)),
        "ours, padded": (whole, lambda: our_step(base, options, None, packing=False, trunk=False)),
        "ours": (whole, lambda: our_step(base, options, None, packing=True, trunk=True)),
        half: (half, lambda: trl_step(base, options, upper)),
        "ours, upper half, padded": (half, lambda: our_step(base, options, upper, packing=False, trunk=False)),
        "ours, upper half, padded, shared trunk": (half, lambda: our_step(base, options, upper, False, trunk=True)),
        "ours, upper half": (half, lambda: our_step(base, options, upper, packing=True, trunk=True)),
        "ours, base kept": (whole, lambda: our_step(base, options, None, packing=True, trunk=True, kept=pairs)),
        "ours, upper half, base kept": (
            half,
            lambda: our_step(base, options, upper, packing=True, trunk=True, kept=pairs),
        ),
    }
    return {
        name: (lambda name=name, rival=rival, make=make: Contender(name, make(), rival))  # type: ignore[misc]
        for name, (rival, make) in made.items()
        if not options.only or name in options.only
    }


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
    """Median seconds a step of each contender, pairs a second, ratios, and memory."""
    rounds = options.rounds + 1
    pairs = load_pairs(options, rounds * options.pairs)
    batches = [pairs[start : start + options.pairs] for start in range(0, rounds * options.pairs, options.pairs)]
    entries = [make() for make in contenders(base, options, pairs).values()]
    seconds: dict[str, list[float]] = {entry.name: [] for entry in entries}
    memory: dict[str, int] = {}
    for number, batch in enumerate(batches):
        for entry in entries:
            if number == 0:  # warms up, and counts memory
                memory[entry.name] = peak_memory(entry, batch, options)
                continue
            synchronise(options.device)
            start = time.perf_counter()
            entry.step(batch)
            synchronise(options.device)
            seconds[entry.name].append(time.perf_counter() - start)
        print(f"round {number} of {options.rounds}", file=sys.stderr)
    tokens = sum(len(ids) for pair in pairs[options.pairs :] for ids in pair.values()) / options.rounds
    return {
        entry.name: {
            "seconds": round(statistics.median(seconds[entry.name]), 4),
            "pairs_per_second": round(options.pairs / statistics.median(seconds[entry.name]), 3),
            "ratio_to_rival": median_ratio(seconds[entry.name], seconds.get(entry.rival)),
            "rival": entry.rival,
            "peak_mib": round(memory[entry.name] / 2**20, 1),
            "distinct_tokens_a_step": round(tokens),
        }
        for entry in entries
    }


def median_ratio(ours: list[float], theirs: list[float] | None) -> float | None:
    """How many times as fast as the rival, by the rounds; None if it did not run."""
    return None if theirs is None else round(statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 3)


def peak_memory(entry: Contender, batch: Pairs, options: argparse.Namespace) -> int:
    """Bytes at the peak of a step: of the whole device, or, on the CPU, of what the step itself allocates."""
    entry.step(batch)
    gc.collect()
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        entry.step(batch)
        return torch.cuda.max_memory_allocated()
    with PeakAllocations() as allocations:
        entry.step(batch)
    return allocations.peak


def base_model(options: argparse.Namespace) -> PreTrainedModel:
    if options.shape == "builtin":
        return load_base(resolve_base("builtin"), dtype=options.dtype).to(options.device)
    shape = LLAMA_8B if options.shape == "llama-8b" else SMALL
    with torch.device(options.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(options.dtype)
        model = LlamaForCausalLM(LlamaConfig(**shape))
        torch.set_default_dtype(default)
    return model


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
        share = figures[name]["peak_mib"] / figures[figures[name]["rival"]]["peak_mib"]
        if share > ceiling:
            problems.append(f"{name}: {share:.2f} times the peak of {figures[name]['rival']}; ceiling {ceiling}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="builtin", choices=["builtin", "llama-8b", "small"])
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--pairs-file", type=Path, default=None, help="JSONL of pairs, may be gzipped")
    parser.add_argument("--length", type=int, default=None, help="random pairs of this many tokens a row instead")
    parser.add_argument("--prompt", type=int, default=64, help="of which the prompt has so many")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=None, help="contenders by name; a ratio needs the rival, too")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    if options.check:
        options.shape, options.only = "small", [*FLOORS, "TRL DPO", "TRL DPO, upper half"]
    name = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.dtype = getattr(torch, name)
    torch.manual_seed(0)
    figures = measure(base_model(options), options)
    for contender, values in figures.items():
        print(
            f"{contender:<40} {values['pairs_per_second']:>8.2f} pairs/s  {values['ratio_to_rival'] or math.nan:>5.2f}x"
            f" {values['peak_mib']:>9.1f} MiB"
        )
    if options.check:
        problems = check(figures)
        for problem in problems:
            print(f"worse than allowed: {problem}")
        return 1 if problems else 0
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    report = {
        "command": " ".join(["python", *sys.argv]),
        "device": f"{device}, {torch.get_num_threads()} threads",
        "dtype": name,
        "shape": options.shape,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft, trl)},
        "figures": figures,
    }
    output = options.output or RESULTS / f"train_{options.shape}_{options.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
