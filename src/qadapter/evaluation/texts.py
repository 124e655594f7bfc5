"""What is measured on: held-out pairs, neutral text, general instructions; each with its categories, as token ids."""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from datasets import Dataset

from qadapter.builtin import neutral_paragraphs
from qadapter.data import RowError, tokenise_preferences
from qadapter.data.formats import value_at
from qadapter.data.sources import existing_path, open_source, pair_features, pair_or_error
from qadapter.data.texts import CATEGORY, excerpt, label, objects, read_prompts, read_texts
from qadapter.errors import ConfigError, DataError
from qadapter.evaluation.workload import BUILTIN
from qadapter.generation import Answer, Message, encode


@dataclass(frozen=True)
class Text:
    """An answer after its context, as token ids; only the answer is scored.

    Args:
        context: at least one token.
        answer: at least one token.
        category: a heading of the per-category breakdown, or None.
        excerpt: its first words, for people.
    """

    context: Sequence[int]
    answer: Sequence[int]
    category: str | None = None
    excerpt: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer: a user's text or a chat."""

    content: str | list[Message]
    category: str | None = None

    @property
    def text(self) -> str:
        """The prompt for people: the last message of a chat."""
        return self.content if isinstance(self.content, str) else self.content[-1]["content"]


@dataclass(frozen=True)
class HeldOutPair:
    """A preference pair: both answers as texts, and its prompt."""

    prompt: Prompt
    chosen: Text
    rejected: Text


@dataclass(frozen=True)
class HeldOutPairs:
    """Held-out pairs, and one line on what was left out."""

    pairs: list[HeldOutPair]
    summary: str

    @property
    def texts(self) -> list[Text]:
        """Both answers of each pair, the chosen one first."""
        return [text for pair in self.pairs for text in (pair.chosen, pair.rejected)]

    @property
    def groups(self) -> list[str]:
        """What pairs of one prompt share, in the pairs' order."""
        return [json.dumps(pair.prompt.content, sort_keys=True) for pair in self.pairs]

    @property
    def prompts(self) -> list[Prompt]:
        """Each different prompt once, in order."""
        return list(dict(zip(self.groups, (pair.prompt for pair in self.pairs), strict=True)).values())


def load_pairs(
    source: str,
    tokenizer: Any,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_pairs: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> HeldOutPairs:
    """Held-out pairs with their categories.

    Args:
        source: file, hub id or "builtin".
        split: None takes "train" of a file, which has no other, and "test" elsewhere.
        columns: names of your columns, as in `load_preference_dataset`, and `category`.
        max_pairs: a sample of that size, drawn by `seed`; all in the file's order.
        max_length: longer pairs (in tokens) are left out or lose the left of their prompt.

    Raises:
        DataError: no such source, a row that is no pair, or nothing left.
    """
    columns = dict(columns or {})
    category_column = columns.pop(CATEGORY, CATEGORY)
    split = split or ("train" if source != BUILTIN and existing_path(source) else "test")
    opened = open_source(source, split, columns or None, streaming=False)
    rows, categories = [], []
    for raw in opened.rows:
        pair = pair_or_error(raw, opened.row_format)
        if isinstance(pair, RowError):
            raise pair
        rows.append(pair)
        assert not isinstance(raw.content, RowError)
        categories.append(label(value_at(raw.content, category_column)))
    if category_column != CATEGORY and not any(categories):
        raise DataError(f"{source}: --columns maps category to {category_column!r}, under which no row has anything.")
    kept = sample(len(rows), max_pairs, seed)
    rows, categories = [rows[index] for index in kept], [categories[index] for index in kept]
    dataset = Dataset.from_list(rows, features=pair_features(opened.row_format.chat))
    tokenised, report = tokenise_preferences(dataset, tokenizer, max_length=max_length)
    dropped = {number for numbers in report.dropped.values() for number in numbers}
    left = [index for index in range(len(rows)) if index + 1 not in dropped]
    pairs = []
    for index, ids in zip(left, tokenised, strict=True):
        category, row = categories[index], rows[index]
        sides = (
            Text(ids["prompt_ids"], ids[f"{side}_ids"], category, excerpt(_content(row[side])))
            for side in ("chosen", "rejected")
        )
        pairs.append(HeldOutPair(Prompt(row["prompt"], category), *sides))
    return HeldOutPairs(pairs, report.summary())


def _content(side: str | list[Message]) -> str:
    return side if isinstance(side, str) else side[-1]["content"]


def sample(total: int, size: int | None, seed: int) -> list[int]:
    """`size` of `total` indices, drawn by `seed`, in ascending order; all of them if there are no more.

    Raises:
        ConfigError: a size below 1.
    """
    if size is not None and size < 1:
        raise ConfigError(f"a sample of {size}: must be at least 1.")
    if size is None or size >= total:
        return list(range(total))
    return sorted(random.Random(seed).sample(range(total), size))


def neutral_texts(tokenizer: Any, path: Path | None = None, max_length: int | None = None) -> list[Text]:
    """Texts that have nothing to do with the preference, each scored after its first token.

    Args:
        path: a text file of paragraphs, or JSONL with a text and perhaps a category; None: the package's prose.

    Raises:
        DataError: unreadable, or no text of two tokens in it.
    """
    rows = [(text, None) for text in neutral_paragraphs()] if path is None else read_texts(path)
    texts = []
    for text, category in rows:
        ids = tokenizer(text)["input_ids"][:max_length]
        if len(ids) > 1:
            texts.append(Text(ids[:1], ids[1:], category, excerpt(text)))
    if not texts:
        raise DataError(f"{path}: there is no text of at least two tokens in it.")
    return texts


def instructions(path: Path | None = None, limit: int | None = None, seed: int = 0) -> list[Prompt]:
    """General instructions with their categories: the package's, or those of a text or JSONL file of prompts.

    Raises:
        DataError: unreadable, or no prompt in it.
    """
    if path is None:
        content = files("qadapter.builtin").joinpath("neutral_prompts.jsonl").read_text(encoding="utf-8")
        rows = objects(content, "prompt", "the built-in prompts")
    else:
        rows = read_prompts(path)
    rows = [(text, category) for text, category in rows if text.strip()]
    if not rows:
        raise DataError(f"{path}: there is no prompt in it.")
    return [Prompt(*rows[index]) for index in sample(len(rows), limit, seed)]


def reference_texts(tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[Text | None]:
    """Given answers after their prompts, as texts to be scored; None for an empty answer.

    They are the tokens that were written, where those are known. A finished text ends with its own end token, else
    with the tokenizer's: a model may have several.
    """
    texts: list[Text | None] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        context = encode(tokenizer, [prompt.content])["input_ids"][0].tolist()
        ids = answer.ids
        if ids is None:
            ids = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
            end = tokenizer.eos_token_id if answer.end is None else answer.end
            if answer.finished and end is not None:
                ids = [*ids, end]
        texts.append(Text(context, ids, prompt.category, excerpt(prompt.text)) if ids else None)
    return texts


def digest(texts: Iterable[Text]) -> str:
    """SHA-256 of the token ids, their split, and the categories."""
    result = hashlib.sha256()
    for text in texts:
        result.update(json.dumps([list(text.context), list(text.answer), text.category]).encode())
    return result.hexdigest()
