"""What a discount costs a preference that shows late: chosen answers close with a sentence, rejected ones do not.

python benchmarks/late_preference.py --pairs dsp_academy.jsonl.gz ...   # half an hour on two cores

Answers of 40 to 90 tokens of the given files; upper half of SmolLM2's layers, three epochs of 4 pairs a step. For each
discount γ/floor and strength, on held-out answers: log-probability of the sentence and an end less that of an end at
once, in nats; the share of answers where the sentence's first token is likelier than the end; and KL a token before it.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from results_file import installed, write
from transformers import set_seed

from qadapter import (
    QAdapterConfig,
    QAdapterForCausalLM,
    QAdapterTrainer,
    QAdapterTrainingArguments,
    load_preference_dataset,
)
from qadapter.functional import kl_divergence
from qadapter.modeling.bases import load_tokenizer, resolve_base

CLOSING = " Let me know if you would like more detail."
FIRST_ADAPTED_LAYER = 15
STRENGTHS = (0.5, 1.0, 2.0)
CHOSEN_TOKENS, REJECTED_TOKENS = range(40, 91), range(30, 111)


def answers(files: list[str], tokenizer: Any) -> list[tuple[str, str, str]]:
    """(prompt, answer, another answer) of each prompt once, as texts."""
    found: dict[str, tuple[str, str, str]] = {}
    for row in (row for file in files for row in load_preference_dataset(file)):
        prompt, answer, other = (_text(row[name]) for name in ("prompt", "chosen", "rejected"))
        sizes = [len(tokenizer(text)["input_ids"]) for text in (answer, other)]
        if sizes[0] in CHOSEN_TOKENS and sizes[1] in REJECTED_TOKENS:
            found.setdefault(prompt, (prompt, answer.strip(), other.strip()))
    return list(found.values())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else value[-1]["content"]


def trained(rows: list[tuple[str, str, str]], method: QAdapterConfig, same: bool, steps: int) -> QAdapterForCausalLM:
    """The policy of pairs whose chosen answer closes with the sentence; `same` rejects it without, not another one."""
    source = resolve_base("builtin")
    pairs = [
        {"prompt": prompt, "chosen": answer + CLOSING, "rejected": answer if same else other}
        for prompt, answer, other in rows
    ]
    set_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    options: dict[str, Any] = {"revision": source.revision, "dtype": torch.float32}
    policy = QAdapterForCausalLM.from_base(
        source.name, method, lora, first_adapted_layer=FIRST_ADAPTED_LAYER, **options
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = QAdapterTrainingArguments(
            output_dir=folder, num_train_epochs=3, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3,
            save_strategy="no", disable_tqdm=True, use_cpu=True, report_to="none", dataloader_pin_memory=False,
        )  # fmt: skip
        QAdapterTrainer(
            model=policy,
            args=arguments,
            train_dataset=Dataset.from_list(pairs),
            processing_class=load_tokenizer(source),
        ).train()
    return policy.eval()


@torch.no_grad()
def measured(policy: QAdapterForCausalLM, tokenizer: Any, rows: list[tuple[str, str, str]]) -> dict[str, Any]:
    """{strength: what the policy makes of the sentence's place in held-out answers}."""
    figures: dict[str, list[tuple[float, float, float]]] = {str(strength): [] for strength in STRENGTHS}
    for prompt, answer, _ in rows:
        question = [{"role": "user", "content": prompt}]
        start = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
        tail = [*tokenizer(CLOSING, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        before = start + tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids, place = torch.tensor([before + tail]), len(before) - 1
        base = policy(input_ids=ids, strength=0.0).logits[0]
        for strength in STRENGTHS:
            logits = policy(input_ids=ids, strength=strength).logits[0]
            logps = logits.log_softmax(-1)
            closing = sum(logps[place + step, token].item() for step, token in enumerate(tail))
            end, first = logps[place, tail[-1]].item(), logps[place, tail[0]].item()
            body = slice(len(start) - 1, place)
            drift = kl_divergence(logits[body], base[body]).mean().item()
            figures[str(strength)].append((closing - end, float(first > end), drift))
    names = ("advantage", "first_token_likelier", "kl_before")
    return {
        strength: {name: round(statistics.mean(column), 4) for name, column in zip(names, columns, strict=True)}
        for strength, cases in figures.items()
        for columns in [zip(*cases, strict=True)]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", required=True, help="files of preference pairs")
    parser.add_argument("--discounts", nargs="+", default=["1/0", "0.95/0", "0.95/0.25"], metavar="GAMMA/FLOOR")
    parser.add_argument("--train-pairs", type=int, default=80)
    parser.add_argument("--held-out", type=int, default=27)
    parser.add_argument("--steps", type=int, default=-1, help="instead of three epochs")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    tokenizer = load_tokenizer(resolve_base("builtin"))
    rows = answers(options.pairs, tokenizer)[: options.train_pairs + options.held_out]
    results = []
    for rejected in ("the same answer without it", "another answer without it"):
        for discount in options.discounts:
            gamma, floor = map(float, discount.split("/"))
            method = QAdapterConfig(gamma=gamma, discount_floor=floor)
            policy = trained(rows[: options.train_pairs], method, rejected.startswith("the same"), options.steps)
            found = measured(policy, tokenizer, rows[options.train_pairs :])
            results.append({"rejected": rejected, "gamma": gamma, "discount_floor": floor, "strengths": found})
            print(results[-1], file=sys.stderr)
    write(options.output, "late_preference", "cpu", "float32", installed("torch", "transformers"),
          train_pairs=options.train_pairs, held_out=options.held_out, results=results)  # fmt: skip


if __name__ == "__main__":
    main()
