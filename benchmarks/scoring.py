"""Cost of scoring pairs and of a sweep, against the two bare passes that they need.

    python benchmarks/scoring.py [--pairs 24] [--rounds 5] [--threads 2]

All variants take turns within each round, over the same batches of the same texts (built-in held-out pairs,
SmolLM2-135M-Instruct with a random LoRA of rank 8 on all linear layers); figures are medians over rounds. Ratios are of
processor seconds within a round, because wall-clock time on a shared machine says more about its other users.

What the two passes are, from less to more: bare decoder passes end at the hidden states, from which nothing can be
scored yet; bare scoring passes also make the logits of the answers' positions, the least that any log-probability
needs; bare forward passes make the logits of every position, as a model call does. The goal is at most 1.1 times the
second.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from results_file import installed, write

from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.evaluation.batches import batches_by_length
from qadapter.evaluation.columns import Column, strength_columns
from qadapter.evaluation.drift import measure_texts
from qadapter.evaluation.texts import Text, load_pairs
from qadapter.modeling.bases import load_base, load_tokenizer, resolve_base

BATCH_TOKENS = 2048
POINTS = 20
BARE_CHUNK = 340  # rows of logits at a time, as scoring has them


def bare_passes(model: transformers.PreTrainedModel, texts: Sequence[Text], logits: str) -> None:
    """Two passes of the plain base over padded batches; logits of "no", "answers" or "all" positions."""
    lengths = [len(text.context) + len(text.answer) for text in texts]
    run = model if logits == "all" else model.get_decoder()
    for batch in batches_by_length([[*text.context, *text.answer] for text in texts], BATCH_TOKENS):
        width = max(lengths[index] for index in batch)
        input_ids = torch.zeros(len(batch), width, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, index in enumerate(batch):
            input_ids[row, : lengths[index]] = torch.tensor([*texts[index].context, *texts[index].answer])
            attention_mask[row, : lengths[index]] = 1
        for _ in range(2):
            output = run(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            if logits == "answers":
                places = [range(len(texts[i].context) - 1, lengths[i] - 1) for i in batch]
                states = torch.cat(
                    [hidden[list(place)] for hidden, place in zip(output.last_hidden_state, places, strict=True)]
                )
                for chunk in states.split(BARE_CHUNK):
                    model.get_output_embeddings()(chunk)


def random_policy() -> QAdapterForCausalLM:
    """The built-in model with an adapter that moves it a little."""
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = QAdapterForCausalLM.from_base("builtin", QAdapterConfig(), lora, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.05)
    return model.eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    source = resolve_base("builtin")
    base = load_base(source, dtype=torch.float32).eval()
    policy = random_policy()
    texts = load_pairs("builtin", load_tokenizer(source), max_pairs=options.pairs).texts
    one, many = [Column("policy")], strength_columns("p", [2 * (index + 1) / POINTS for index in range(POINTS)])
    variants: dict[str, Callable[[], object]] = {
        "two bare decoder passes": lambda: bare_passes(base, texts, logits="no"),
        "two bare scoring passes": lambda: bare_passes(base, texts, logits="answers"),
        "two bare forward passes": lambda: bare_passes(base, texts, logits="all"),
        "pair scoring": lambda: measure_texts(policy, texts, one, BATCH_TOKENS),
        f"sweep of {POINTS} strengths": lambda: measure_texts(policy, texts, many, BATCH_TOKENS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    wall: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(options.rounds + 1):
        for name, run in variants.items():
            start, wall_start = time.process_time(), time.perf_counter()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - start)
                wall[name].append(time.perf_counter() - wall_start)
        print(f"round {number} of {options.rounds}", file=sys.stderr)
    tokens = sum(len(text.context) + len(text.answer) for text in texts)
    figures = {}
    for name, times in seconds.items():
        ratios = {
            f"to {other}": round(statistics.median(a / b for a, b in zip(times, seconds[other], strict=True)), 3)
            for other in (*(f"two bare {kind} passes" for kind in ("decoder", "scoring", "forward")), "pair scoring")
        }
        figures[name] = {
            "processor_seconds": round(statistics.median(times), 3),
            "wall_seconds": round(statistics.median(wall[name]), 3),
            "tokens_a_processor_second": round(tokens / statistics.median(times)),
            **ratios,
        }
        shown = "  ".join(f"{ratio:.2f}x {other.removeprefix('to ')}," for other, ratio in ratios.items())
        print(f"{name:<26} {figures[name]['processor_seconds']:>7.2f} s  {shown.rstrip(',')}")
    answer_tokens = sum(len(text.answer) for text in texts)
    write(options.output, "scoring", "cpu", "float32", installed("torch", "transformers"), texts=len(texts),
          tokens=tokens, answer_tokens=answer_tokens, figures=figures)  # fmt: skip


if __name__ == "__main__":
    main()
