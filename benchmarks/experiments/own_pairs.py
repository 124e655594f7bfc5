"""Pairs made from the base's own answers, for preferences that conflict with an ability.

"terse" prefers a word or two to the base's own long answer, which costs reasoning aloud; "capitals" prefers that answer
in capital letters, a spelling that the base hardly knows, to the answer itself, which costs all ordinary text.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.experiments.answers import kept_answers
from benchmarks.experiments.pools import read_lines
from qadapter import QAdapterForCausalLM
from qadapter.data import load_preference_dataset
from qadapter.errors import DataError
from qadapter.new_folders import whole_file

QUESTIONS = ("sciq_val",)
LONGEST_ANSWER = 4  # words
MOST = 600
CAPITALS_PROMPTS = 300
TERSE_TOKENS, CAPITALS_TOKENS = 64, 32  # of the base's own answers; capitals take twice as many


def write_pairs(
    source: str, policy: QAdapterForCausalLM, tokenizer: Any, data: Path, cache: Path, batch_size: int
) -> Path:
    """Write SOURCE.jsonl into `cache` unless it is there.

    Raises:
        DataError: the questions are not in `data`.
    """
    path = cache / f"{source}.jsonl"
    if path.exists():
        return path
    terse = source == "terse"
    rows = _questions(data) if terse else _builtin_prompts()
    prompts = [[{"role": "user", "content": question}] for question, _ in rows]
    longest = TERSE_TOKENS if terse else CAPITALS_TOKENS
    own = kept_answers(cache / f"{source}_own.json", lambda: policy, tokenizer, prompts, 0, longest, 0.0, batch_size)
    wanted = [answer if terse else said.text.upper() for (_, answer), said in zip(rows, own, strict=True)]
    pairs = [
        {"prompt": prompt, "chosen": [_said(chosen)], "rejected": [_said(said.text)]}
        for prompt, chosen, said in zip(prompts, wanted, own, strict=True)
        if said.text.strip() and said.text.strip() != chosen.strip()
    ]
    with whole_file(path) as scratch:
        scratch.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def _questions(data: Path) -> list[tuple[str, str]]:
    """Questions with a short right answer."""
    rows = []
    for name in QUESTIONS:
        file = data / "bench" / f"{name}.jsonl.gz"
        if not file.exists():
            raise DataError(f"{file} is not there: the setting terse cannot be made. Pass --data.")
        rows += [(row["question"], row["choices"][row["gold"]]) for row in read_lines(file)]
    return [(question, answer) for question, answer in rows if len(answer.split()) <= LONGEST_ANSWER][:MOST]


def _builtin_prompts() -> list[tuple[str, str]]:
    """The prompts of the package's own pairs; what is wanted is made of the base's answers."""
    rows = [row for split in ("train", "test") for row in load_preference_dataset("builtin", split=split)]
    return [(prompt, "") for prompt in dict.fromkeys(row["prompt"] for row in rows)][:CAPITALS_PROMPTS]


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
