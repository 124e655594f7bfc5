"""Turn preference pairs into token ids, cut and filtered to a length, with a report of what was left out."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from qadapter.data.encoding import ChatEncoder, EncodedPair, PlainEncoder
from qadapter.data.formats import FIRST_ROWS, Format, recognise
from qadapter.data.messages import as_chat
from qadapter.data.rows import TOKEN_COLUMNS, Pair, RowError
from qadapter.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

    Pairs = TypeVar("Pairs", Dataset, IterableDataset)

CLOSING = tuple(".?!:;,)")  # after these comes a space
# Kept tokens are those of one version: raise it with any change that gives some row other ids, or drops another row.
TOKENISATION_VERSION = 4
DIGEST_ROWS = 1000


@dataclass
class TokenisationReport:
    """What became of the rows; row numbers start at 1 and count the rows of the dataset that was tokenised.

    `truncated_prompts` lost tokens at the left of the prompt; `dropped` holds the rows left out, by reason, and `why`
    what each reason means, with a way out;
    in `unstable_prompts` the generation prompt is no prefix of the conversation (see encoding.ChatEncoder);
    in `unspaced` a prompt of plain text runs into an answer without a space or line break between them.
    For a stream the report fills while it is read and starts anew with each pass; readers in other processes
    (DataLoader workers) fill copies of their own.
    """

    rows: int = 0
    kept: int = 0
    truncated_prompts: list[int] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    unstable_prompts: list[int] = field(default_factory=list)
    unspaced: list[int] = field(default_factory=list)

    def clear(self) -> None:
        """Back to the report of no rows."""
        self.rows = self.kept = 0
        self.truncated_prompts = []
        self.dropped = {}
        self.why = {}
        self.unstable_prompts = []
        self.unspaced = []

    @property
    def unspaced_warning(self) -> str | None:
        """What is to be said of prompts that run into their answers."""
        if not self.unspaced:
            return None
        return (
            f"{len(self.unspaced):,} prompts run into an answer with no space between; plain text is joined as it is, "
            "so end prompts with a space or a line break, or use a model with a chat template"
        )

    def summary(self) -> str:
        """One line: "1,940 rows, 1,935 kept, 3 prompts truncated, 5 dropped (answer too long: 5)"."""
        parts = [f"{self.rows:,} rows, {self.kept:,} kept"]
        if self.truncated_prompts:
            parts.append(f"{len(self.truncated_prompts):,} prompts truncated")
        if self.unstable_prompts:
            parts.append(f"{len(self.unstable_prompts):,} prompts shortened to the part both sides share")
        if self.dropped:
            reasons = ", ".join(f"{reason}: {len(numbers):,}" for reason, numbers in self.dropped.items())
            parts.append(f"{sum(map(len, self.dropped.values())):,} dropped ({reasons})")
        return ", ".join(parts)


class Limits(NamedTuple):
    """Lengths in tokens; None is no limit."""

    max_length: int | None
    max_prompt_length: int | None


def tokenise_preferences(
    dataset: "Pairs",
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
) -> "tuple[Pairs, TokenisationReport]":
    """(dataset with prompt_ids, chosen_ids and rejected_ids, report).

    `dataset`: a Dataset or IterableDataset in any layout that `formats.recognise` knows. Plain text is put into the
    tokenizer's chat template as a user message if there is one.
    `max_length`: prompt and longer answer together. Prompts are cut at the left, keeping the
    beginning-of-sequence token, and for both sides alike; answers are never cut. Rows whose answer leaves no
    room for a prompt token, and rows whose answers are the same tokens, are dropped and reported.
    Raises DataError for rows that are no pair, a missing chat template, and when nothing is left.
    """
    limits = checked_limits(max_length, max_prompt_length)
    dataset = as_python(dataset)
    first = first_rows(dataset)
    names = list(dict.fromkeys(name for row in first for name in row))
    row_format = recognise(names, first)
    use_template = uses_template(row_format.chat, tokenizer)
    report = TokenisationReport()
    tokenise = PairTokeniser(row_format, tokenizer, use_template, limits, report)
    tokenised = mapped(dataset, tokenise, names)
    if report.rows and not report.kept:
        raise DataError(f"no pair is left after tokenisation: {report.summary()}; {tokenise.last_error}")
    return tokenised, report


def first_rows(dataset: Any) -> list[dict[str, Any]]:
    """Rows to recognise the layout by; raises DataError for anything but a dataset."""
    from datasets import Dataset, IterableDataset

    if not isinstance(dataset, Dataset | IterableDataset):
        raise DataError(f"got {type(dataset).__name__}; give one split as a Dataset, or Dataset.from_list(rows)")
    return list(islice(dataset, FIRST_ROWS))  # `take` of datasets 4.0 wants so many rows


def as_python(dataset: Any) -> Any:
    """The columns that the dataset's format shows, as Python's own values; a transform stays, as it makes the rows."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return dataset
    return dataset.select_columns(dataset.format["columns"]).with_format(None)


def mapped(dataset: Any, tokenise: "PairTokeniser", names: list[str]) -> Any:
    """The dataset with its columns replaced; in memory, because a cache file would outlive the tokenizer.

    A transform has made the rows by then, and must not be handed their tokens.
    """
    from datasets import Dataset
    from datasets.fingerprint import generate_random_fingerprint

    options: dict[str, Any] = {
        "batched": True,
        "with_indices": True,
        "remove_columns": names,
        "features": token_features(),
    }
    if isinstance(dataset, Dataset):
        # A fingerprint of our own spares `datasets` from pickling the tokenizer to compute one.
        options |= {"keep_in_memory": True, "load_from_cache_file": False, "desc": "Tokenising pairs"}
        options["new_fingerprint"] = generate_random_fingerprint()
        options["remove_columns"] = dataset.column_names  # as they are stored: a transform may show others
        return dataset.map(tokenise, **options).with_format(None)
    return dataset.map(tokenise, **options)


def token_features() -> "Features":
    """The columns of tokenised pairs."""
    from datasets import Features, List, Value

    return Features(dict.fromkeys(TOKEN_COLUMNS, List(Value("int32"))))


def pairs_digest(pairs: "Dataset") -> str:
    """SHA-256 of tokenised pairs in their order, however they are stored."""
    import pyarrow.compute as pc

    digest = hashlib.sha256()
    if pairs.format["type"] == "custom":  # a transform makes the rows
        for row in pairs:
            digest.update(repr([as_python(row[name]) for name in TOKEN_COLUMNS]).encode())
        return digest.hexdigest()
    for table in pairs.with_format("arrow").iter(DIGEST_ROWS):
        for name in TOKEN_COLUMNS:
            column = table.column(name)
            for numbers in (pc.list_value_length(column), pc.list_flatten(column)):
                digest.update(pc.cast(numbers, "int64").to_numpy().tobytes())
    return digest.hexdigest()


class PairTokeniser:
    """Tokenises batches of rows for `dataset.map` and writes down in `report` what it leaves out."""

    def __init__(
        self,
        row_format: Format,
        tokenizer: Any,
        use_template: bool,
        limits: Limits,
        report: TokenisationReport,
    ):
        self.row_format = row_format
        self.use_template = use_template
        self.encoder = ChatEncoder(tokenizer) if use_template else PlainEncoder(tokenizer)
        self.joins_texts = not use_template and joins_texts(tokenizer)
        self.bos = tokenizer.bos_token_id
        self.limits = limits
        self.report = report
        self.last_error: RowError | None = None

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[list[int]]]:
        columns: dict[str, list[list[int]]] = {name: [] for name in TOKEN_COLUMNS}
        for index, *values in zip(indices, *batch.values(), strict=True):
            encoded = self.encode(index + 1, dict(zip(batch, values, strict=True)))
            if encoded is not None:
                for column, ids in zip(columns.values(), encoded[:3], strict=True):
                    column.append(ids)
        return columns

    def encode(self, number: int, row: dict[str, Any]) -> EncodedPair | None:
        """The ids of a row, or None if it is dropped; raises RowError for a row that is no pair."""
        if number == 1:
            self.report.clear()
        self.report.rows += 1
        pair = self.pair_of(number, row)
        try:
            encoded = self.encoder.encode(pair)
            require_different(encoded)
            prompt_ids = fit_prompt(encoded, self.limits, self.bos)
        except RowError as error:
            self.last_error = error.at(f"row {number}")
            self.report.why.setdefault(error.reason, str(error))
            self.report.dropped.setdefault(error.reason, []).append(number)
            return None
        self.note(number, encoded, prompt_ids)
        if self.joins_texts and any(runs_into(pair["prompt"], pair[side]) for side in ("chosen", "rejected")):
            self.report.unspaced.append(number)
        return encoded._replace(prompt_ids=prompt_ids)

    def pair_of(self, number: int, row: dict[str, Any]) -> Pair:
        try:
            pair = self.row_format.normalise(row)
            return as_chat(pair) if self.use_template else pair
        except RowError as error:
            raise error.at(f"row {number}") from None

    def note(self, number: int, encoded: EncodedPair, prompt_ids: list[int]) -> None:
        self.report.kept += 1
        if len(prompt_ids) < len(encoded.prompt_ids):
            self.report.truncated_prompts.append(number)
        if not encoded.stable:
            self.report.unstable_prompts.append(number)


def joins_texts(tokenizer: Any) -> bool:
    """Whether texts tokenised apart follow each other without a space, unlike with some SentencePiece models."""
    ids = [token for text in "ab" for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return not any(character.isspace() for character in tokenizer.decode(ids).strip())


def runs_into(prompt: Any, answer: Any) -> bool:
    """Whether a word or a sentence of `prompt` is followed at once by one of `answer`, in a script that has spaces."""
    last, first = str(prompt)[-1:], str(answer)[:1]
    return last.isascii() and (last.isalnum() or last in CLOSING) and first.isascii() and first.isalnum()


def checked_limits(max_length: int | None, max_prompt_length: int | None) -> Limits:
    for name, value in (("max_length", max_length), ("max_prompt_length", max_prompt_length)):
        if value is not None and value < 2:
            raise ConfigError(f"{name} is {value}; it has to be at least 2 tokens, or None for no limit")
    return Limits(max_length, max_prompt_length)


def uses_template(data_is_chat: bool, tokenizer: Any) -> bool:
    """Whether pairs go through the chat template; raises for a chat without one."""
    has_template = bool(tokenizer.chat_template)
    if data_is_chat and not has_template:
        raise DataError(
            "the pairs are to be a chat, but the tokenizer has no chat template; use an instruction-tuned "
            "model, set tokenizer.chat_template, or give prompt, chosen and rejected as plain text"
        )
    return has_template


def require_different(encoded: EncodedPair) -> None:
    if encoded.chosen_ids == encoded.rejected_ids:
        raise RowError("identical tokens", "both answers are the same tokens, so nothing can be learnt from them")


def fit_prompt(encoded: EncodedPair, limits: Limits, bos: int | None) -> list[int]:
    """The prompt cut at the left to the limits, its beginning-of-sequence token kept; raises RowError."""
    prompt_ids = encoded.prompt_ids
    head = 1 if bos is not None and prompt_ids[:1] == [bos] else 0
    if not prompt_ids:
        raise RowError("no shared prompt", "the template renders prompt and sides without a common first token")
    longest = max(len(encoded.chosen_ids), len(encoded.rejected_ids))
    room = len(prompt_ids) if limits.max_length is None else limits.max_length - longest
    if room < min(head + 1, len(prompt_ids)):
        raise RowError(
            "answer too long",
            f"the longer answer has {longest} tokens, which leaves no room for a prompt in max_length "
            f"{limits.max_length}; raise max_length to keep such rows",
        )
    room = room if limits.max_prompt_length is None else min(room, limits.max_prompt_length)
    if len(prompt_ids) <= room:
        return prompt_ids
    return prompt_ids[:head] + prompt_ids[len(prompt_ids) - (room - head) :]
