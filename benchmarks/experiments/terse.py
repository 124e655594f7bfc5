"""Pairs that prefer an answer of a word or two to the base's own long one: a preference that costs reasoning aloud."""

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.experiments.answers import cached_answers, sample_answers
from benchmarks.experiments.pools import read_lines
from qadapter import QAdapterForCausalLM
from qadapter.errors import DataError

QUESTIONS = ("sciq_val",)
LONGEST_ANSWER = 4  # words
MOST = 600


def write_pairs(policy: QAdapterForCausalLM, tokenizer: Any, data: Path, cache: Path, batch_size: int) -> Path:
    """Write terse.jsonl: questions with a short right answer, and the base's greedy answer as the rejected one.

    Raises:
        DataError: the questions are not in `data`.
    """
    path = cache / "terse.jsonl"
    if path.exists():
        return path
    rows = []
    for name in QUESTIONS:
        file = data / "bench" / f"{name}.jsonl.gz"
        if not file.exists():
            raise DataError(f"{file} is not there: the setting terse cannot be made. Pass --data.")
        rows += [(row["question"], row["choices"][row["gold"]]) for row in read_lines(file)]
    rows = [(question, answer) for question, answer in rows if len(answer.split()) <= LONGEST_ANSWER][:MOST]
    prompts = [[{"role": "user", "content": question}] for question, _ in rows]
    own = cached_answers(
        cache / "terse_own.json",
        lambda: sample_answers(policy, tokenizer, prompts, 0.0, 0, 64, 0.0, batch_size),
    )
    pairs = [
        {"prompt": prompt, "chosen": [_said(answer)], "rejected": [_said(long.text)]}
        for prompt, (_, answer), long in zip(prompts, rows, own, strict=True)
        if long.text.strip() and long.text.strip() != answer
    ]
    scratch = path.with_suffix(".partial")
    scratch.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    os.replace(scratch, path)
    return path


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
