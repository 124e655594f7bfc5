"""The pairs of an experiment in three pools that share no prompt: to train on, to measure on, and for the judge."""

import gzip
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from benchmarks.experiments.settings import OWN_PAIRS, Setting
from qadapter.data import load_preference_dataset, tokenise_preferences
from qadapter.errors import DataError
from qadapter.generation import encode

Pair = dict[str, Any]
EVAL_SHARE, JUDGE_SHARE = 0.15, 0.35


@dataclass(frozen=True)
class Pools:
    """Pairs as messages; `train` and `held_out` also tokenised, in the same order.

    Pairs come in rounds, each prompt once a round, so that a few of them hold as many prompts as can be.
    """

    train: list[Pair]
    held_out: list[Pair]
    judge: list[Pair]
    train_ids: Dataset
    held_out_ids: Dataset
    prompts: list[list[dict[str, str]]]  # to sample answers to: held out, also those of pairs that are too long

    def digest(self) -> str:
        """SHA-256 of everything that is trained or measured on."""
        rows = json.dumps([self.train, self.held_out, self.judge], sort_keys=True)
        return hashlib.sha256(rows.encode()).hexdigest()


def load_pairs(source: str, data: Path, cache: Path) -> list[Pair]:
    """All pairs of a source as messages.

    "dsp/DOMAIN" and "hh-rlhf/KIND" are read from `data` (pairs/dsp_DOMAIN.jsonl.gz, pairs/hh_KIND.jsonl.gz) if the
    files are there, else from their authors; "polite" only from there; OWN_PAIRS were made into `cache` by
    own_pairs.py. Anything else is what `load_preference_dataset` takes.
    """
    if source in OWN_PAIRS:
        path = cache / f"{source}.jsonl"
        if not path.exists():
            raise DataError(f"{path}: make it first (own_pairs.write_pairs)")
        return as_messages(load_preference_dataset(path))
    local = data / "pairs" / f"{source.replace('hh-rlhf/', 'hh_').replace('/', '_')}.jsonl.gz"
    return as_messages(load_preference_dataset(local if local.exists() else source))


def as_messages(dataset: Dataset) -> list[Pair]:
    """Rows whose plain texts have become messages."""

    def message(text: Any, role: str) -> Any:
        return [{"role": role, "content": text}] if isinstance(text, str) else text

    return [
        {name: message(row[name], "user" if name == "prompt" else "assistant") for name in row}
        for row in dataset.to_list()
    ]


def load_pools(setting: Setting, tokenizer: Any, data: Path, cache: Path) -> Pools:
    """The pools of a setting; which prompt is where depends on the prompt alone."""
    pairs = load_pairs(setting.pairs, data, cache)
    pools: dict[str, list[Pair]] = {"train": [], "held_out": [], "judge": []}
    for pair in in_rounds(pairs):
        place = _place(pair["prompt"])
        name = "held_out" if place < EVAL_SHARE else "judge" if place < EVAL_SHARE + JUDGE_SHARE else "train"
        pools[name].append(pair)
    train, train_ids = fitting(pools["train"], tokenizer, setting.max_length, setting.train_pairs)
    held_out, held_out_ids = fitting(pools["held_out"], tokenizer, setting.max_length, setting.eval_pairs)
    train_ids = with_noise(train_ids, setting.training.label_noise)
    prompts = list({json.dumps(pair["prompt"]): pair["prompt"] for pair in pools["held_out"]}.values())
    short = [prompt for prompt in prompts if encode(tokenizer, [prompt])["input_ids"].numel() <= setting.max_length]
    return Pools(train, held_out, pools["judge"], train_ids, held_out_ids, short)


def in_rounds(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs in an order that depends on their content alone: each prompt's first, then each one's second, ..."""
    ranks: dict[str, int] = {}
    placed = []
    for pair in sorted(pairs, key=_place):
        prompt = json.dumps(pair["prompt"])
        ranks[prompt] = ranks.get(prompt, -1) + 1
        placed.append((ranks[prompt], _place(pair["prompt"]), pair))
    return [pair for _, _, pair in sorted(placed, key=lambda entry: entry[:2])]


def fitting(pairs: Sequence[Pair], tokenizer: Any, max_length: int, limit: int | None) -> tuple[list[Pair], Dataset]:
    """The first `limit` pairs of at most `max_length` tokens; longer ones are left out, never cut."""
    ids, report = tokenise_preferences(Dataset.from_list(list(pairs)), tokenizer)
    dropped = {number - 1 for numbers in report.dropped.values() for number in numbers}
    left = [pair for index, pair in enumerate(pairs) if index not in dropped]
    kept = [
        index
        for index, row in enumerate(ids)
        if len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= max_length
    ][:limit]
    if not kept:
        raise DataError(f"no pair of at most {max_length} tokens")
    return [left[index] for index in kept], ids.select(kept, keep_in_memory=True)


def with_noise(ids: Dataset, share: float) -> Dataset:
    """The dataset with the answers of that share of the pairs swapped, the same pairs whatever the seed."""
    if not share:
        return ids
    swapped = set(random.Random(0).sample(range(len(ids)), round(share * len(ids))))
    rows = [
        row | {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} if index in swapped else row
        for index, row in enumerate(ids)
    ]
    return Dataset.from_list(rows, features=ids.features)


def text_of(messages: Sequence[dict[str, str]]) -> str:
    """The last message's text."""
    return messages[-1]["content"]


def _place(content: Any) -> float:
    """A number in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.sha256(f"pools:{json.dumps(content)}".encode()).digest()[:6]) / 2**48


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a (gzipped) JSON Lines file."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.decode("utf-8").splitlines()]
