"""Load preference pairs from a file, the Hugging Face hub, the package itself, or a mixture of these."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from qadapter.data.dsp import DOMAINS, PREFIX, domain_pairs, dsp_source, published_file
from qadapter.data.files import has_known_suffix, read_rows
from qadapter.data.formats import FIRST_ROWS, Format, recognise
from qadapter.data.hub import hub_rows, is_hub_id
from qadapter.data.mixtures import interleave, join, mix, parse_mixture
from qadapter.data.rows import Pair, RawRow, RowError
from qadapter.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

logger = logging.getLogger(__name__)

BUILTIN_FILES = {"train": "concise_train.jsonl", "test": "concise_eval.jsonl"}


@dataclass(frozen=True)
class NamedSource:
    """A dataset of the hub that has a short name here."""

    hub_id: str
    data_dir: str


NAMED_SOURCES = {
    "hh-rlhf/harmless": NamedSource("Anthropic/hh-rlhf", "harmless-base"),
    "hh-rlhf/helpful": NamedSource("Anthropic/hh-rlhf", "helpful-base"),
    "hh-rlhf/harmless-base": NamedSource("Anthropic/hh-rlhf", "harmless-base"),
    "hh-rlhf/helpful-base": NamedSource("Anthropic/hh-rlhf", "helpful-base"),
}
SHORT_NAMES = (*(PREFIX + domain for domain in DOMAINS), *NAMED_SOURCES)

Source = Union[str, "PathLike[str]"]


def load_preference_dataset(
    source: Source | Iterable[str] | Mapping[str, float],
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    streaming: bool = False,
    max_rows: int | None = None,
    seed: int = 0,
    on_error: Literal["raise", "drop"] = "raise",
) -> "Dataset | IterableDataset":
    """Pairs with the columns prompt, chosen and rejected, as a Dataset (an IterableDataset if `streaming`).

    `source` is one of
      - a path to a .jsonl, .json, .csv (each also with .gz) or .parquet file;
      - a hub id, "org/name" or "org/name:config", or a name in NAMED_SOURCES ("hh-rlhf/harmless", "hh-rlhf/helpful");
      - "dsp/academy" (business, entertainment, literature): the domain's pairs of the published DSP data, or
        of a copy of its file, "dsp/academy:FILE";
      - "builtin": the small dataset of the package, with the splits train and test;
      - a mixture, {source: weight} or ["source=weight", ...]. Weights are shares of the result, whose rows
        are drawn without replacement: it is as large as the source that runs out first allows, and the same
        for the same `seed`. A list without weights joins all rows. Where one source is a chat, plain text
        becomes messages.
    `split`: a split of the hub or the built-in data; a file has only "train".
    `columns`: {"prompt": "my_question", ...} for columns of other names; see `formats.recognise`.
    `max_rows`: the first rows of a single source or of a list without weights; the size limit of a mixture.
    `on_error`: "drop" leaves out rows that are unreadable or no pair, and logs how many and why.
    A Dataset is held in memory; use `streaming` for what does not fit.

    Raises:
        DataError: a source cannot be read, its layout is unknown, a row is no pair, or a mixture cannot be made.
        ConfigError: `max_rows` or `on_error` is none of the above.
    """
    check_arguments(max_rows, on_error)
    if isinstance(source, str | PathLike):
        return load(open_source(source, split, columns, streaming), streaming, max_rows, on_error)
    weights = parse_mixture(source)
    parts = as_one_kind([open_source(name, split, columns, streaming) for name in weights])
    datasets = [load(part, streaming, None, on_error) for part in parts]
    if None in weights.values():
        return join(datasets, max_rows)
    shares = {name: weight for name, weight in weights.items() if weight is not None}
    return (interleave if streaming else mix)(datasets, shares, max_rows, seed)


def check_arguments(max_rows: int | None, on_error: str) -> None:
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"max_rows is {max_rows}; it has to be at least 1, or None for all rows")
    if on_error not in ("raise", "drop"):
        raise ConfigError(f"on_error is {on_error!r}; it has to be 'raise' or 'drop'")


@dataclass(frozen=True)
class OpenSource:
    """A source whose layout is known; `rows` is one pass over its raw rows, of which none is read twice."""

    name: Source
    split: str
    row_format: Format
    rows: Iterator[RawRow]


def open_source(source: Source, split: str, columns: Mapping[str, str] | None, streaming: bool) -> OpenSource:
    """The source with the format of its first rows; raises DataError if there is none."""
    rows = open_rows(source, split, streaming)
    first = list(islice(rows, FIRST_ROWS))
    return OpenSource(source, split, recognise_rows(first, columns, str(source)), chain(first, rows))


def as_one_kind(parts: list[OpenSource]) -> list[OpenSource]:
    """The parts, all as chats if any is one: such a mixture can only be trained with a chat template."""
    if not any(part.row_format.chat for part in parts):
        return parts
    return [replace(part, row_format=replace(part.row_format, chat=True)) for part in parts]


def load(source: OpenSource, streaming: bool, max_rows: int | None, on_error: str) -> "Dataset | IterableDataset":
    """The pairs of a single source as a dataset; a stream opens the source anew for each pass."""
    from datasets import Dataset, IterableDataset

    features = pair_features(source.row_format.chat)
    if not streaming:
        pairs = normalised(source.rows, source.row_format, on_error, str(source.name))
        return Dataset.from_list(list(islice(pairs, max_rows)), features=features)
    arguments = {
        "source": source.name,
        "split": source.split,
        "row_format": source.row_format,
        "on_error": on_error,
    }
    stream = IterableDataset.from_generator(streamed_pairs, features=features, gen_kwargs=arguments)
    return stream if max_rows is None else stream.take(max_rows)


def open_rows(source: Source, split: str = "train", streaming: bool = False) -> Iterator[RawRow]:
    """The raw rows of a single source; raises DataError with the way out where there is no such source."""
    name = str(source)
    if name == "builtin":
        return read_rows(builtin_path(split))
    if name in NAMED_SOURCES:
        named = NAMED_SOURCES[name]
        return hub_rows(named.hub_id, split, streaming, data_dir=named.data_dir)
    dsp = dsp_source(name)
    if dsp is not None:
        domain, file = dsp
        rows = read_rows(published_file(split) if file is None else file)
        return domain_pairs(rows, domain)
    path = existing_path(source)
    if path is not None:
        require_train(split, name)
        return read_rows(path)
    if has_known_suffix(name) or not is_hub_id(name):
        raise DataError(
            f"{name}: no such file, and not a dataset name either. Give the path of a file that exists, "
            f"a hub id like 'org/name', 'builtin', or one of {', '.join(SHORT_NAMES)}"
        )
    hub_id, _, config = name.partition(":")
    return hub_rows(hub_id, split, streaming, config=config or None)


def existing_path(source: Source) -> Path | None:
    """The path if it leads anywhere."""
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, the home of an unknown user
        return None


def builtin_path(split: str) -> Path:
    if split not in BUILTIN_FILES:
        raise DataError(f"builtin: no split {split!r}; the splits are {', '.join(BUILTIN_FILES)}")
    return Path(str(files("qadapter") / "builtin" / BUILTIN_FILES[split]))


def require_train(split: str, name: str) -> None:
    if split != "train":
        raise DataError(
            f"{name}: a file has only the split 'train', not {split!r}; "
            "leave --split out, or name the file of the other split"
        )


def recognise_rows(first: list[RawRow], columns: Mapping[str, str] | None, source: str) -> Format:
    """The format of the rows that could be read; raises the first row's error if none could."""
    readable = [row.content for row in first if not isinstance(row.content, RowError)]
    if first and not readable:
        raise located(first[0])
    names = dict.fromkeys(name for row in readable for name in row)
    return recognise(names, readable, columns, source)


def located(row: RawRow) -> RowError:
    assert isinstance(row.content, RowError)
    return row.content.at(row.place)


def pair_or_error(row: RawRow, row_format: Format) -> Pair | RowError:
    """The normalised pair of a raw row, or what is wrong with it and where."""
    if isinstance(row.content, RowError):
        return located(row)
    try:
        return row_format.normalise(row.content)
    except RowError as error:
        return error.at(row.place)


def normalised(rows: Iterable[RawRow], row_format: Format, on_error: str, source: str) -> Iterator[Pair]:
    """The pairs of the rows; a bad row raises its RowError, or is counted and left out."""
    dropped: Counter[str] = Counter()
    kept = 0
    for row in rows:
        pair = pair_or_error(row, row_format)
        if not isinstance(pair, RowError):
            kept += 1
            yield pair
        elif on_error == "raise":
            raise pair
        else:
            if not dropped:
                logger.warning("dropping bad rows; the first one is %s", pair)
            dropped[pair.reason] += 1
            last = pair
    if dropped:
        counts = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common())
        if not kept:
            raise DataError(f"{source}: every row was dropped ({counts}); the last one is {last}")
        logger.warning("%s: dropped %d of %d rows (%s)", source, dropped.total(), dropped.total() + kept, counts)


def streamed_pairs(source: Source, split: str, row_format: Format, on_error: str) -> Iterator[Pair]:
    """A fresh pass over the source, for IterableDataset.from_generator."""
    return normalised(open_rows(source, split, streaming=True), row_format, on_error, str(source))


def pair_features(chat: bool) -> "Features":
    """The columns of a dataset of pairs."""
    from datasets import Features, List, Value

    text = Value("string")
    column: Any = List({"role": text, "content": text}) if chat else text
    return Features(dict.fromkeys(("prompt", "chosen", "rejected"), column))
