"""Hold out pairs for evaluation without leaking a prompt."""

import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from qadapter.data.messages import user
from qadapter.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset


def train_eval_split(dataset: "Dataset", *, eval_fraction: float, seed: int = 0) -> "tuple[Dataset, Dataset]":
    """(train, eval), split by prompt: no prompt stands on both sides, however many pairs it has.

    `eval_fraction`, of the rows, is an upper limit, because prompts are not divided; where every prompt has more rows,
    one is held out all the same. The choice depends on the prompts and `seed`, not on the order of the rows. Rows keep
    their order. Raises ConfigError for impossible fractions and DataError for the data.
    """
    require_prompts(dataset)
    limit = eval_limit(len(dataset), eval_fraction)
    keys = [json.dumps(prompt, sort_keys=True) for prompt in dataset["prompt"]]
    held_out = prompts_up_to(limit, Counter(keys), seed)
    train = [index for index, key in enumerate(keys) if key not in held_out]
    if not train:
        raise DataError("all rows have the same prompt, so none can be held out; give a separate evaluation file")
    held_out_rows = [index for index, key in enumerate(keys) if key in held_out]
    return dataset.select(train, keep_in_memory=True), dataset.select(held_out_rows, keep_in_memory=True)


def pairs_of_trained_prompts(train: "Dataset", held_out: "Dataset") -> int:
    """How many held-out pairs have a prompt that stands in the training pairs too; text counts as a user's message."""
    trained = set(map(prompt_key, train["prompt"]))
    return sum(prompt_key(prompt) in trained for prompt in held_out["prompt"])


def prompt_key(prompt: Any) -> bytes:
    """A short stand-in for a prompt."""
    messages = user(prompt) if isinstance(prompt, str) else prompt
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).digest()[:16]


def require_prompts(dataset: Any) -> None:
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise DataError(f"a {type(dataset).__name__} cannot be split by prompt; load it without streaming")
    if "prompt" not in dataset.column_names:
        found = ", ".join(dataset.column_names)
        raise DataError(f"no prompt column among {found}; load the data with load_preference_dataset first")


def eval_limit(rows: int, fraction: float) -> int:
    """How many rows may be held out."""
    if not 0 < fraction < 1:
        raise ConfigError(f"eval_fraction is {fraction}; it has to lie between 0 and 1")
    return max(1, round(rows * fraction))


def prompts_up_to(limit: int, rows_of: Counter[str], seed: int) -> set[str]:
    """Prompts in the order of their seeded hash, skipping those that do not fit in `limit` rows any more."""

    def rank(key: str) -> bytes:
        return hashlib.sha256(f"{seed}:{key}".encode()).digest()

    taken: set[str] = set()
    room = limit
    for key in sorted(rows_of, key=rank):
        if rows_of[key] <= room:
            taken.add(key)
            room -= rows_of[key]
    return taken or {min(rows_of, key=rank)}
