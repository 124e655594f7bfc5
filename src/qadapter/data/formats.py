"""Recognise how a dataset writes its preference pairs, and turn any known layout into one.

A layout is chosen once for a dataset, from its column names and first rows, and then holds for every row: a
row that deviates is an error, not another layout. Chat layouts give lists of {"role", "content"}; plain
text stays text, because base models without a chat template are trained on it.
"""

import difflib
import shlex
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qadapter.data import messages
from qadapter.data.layouts import LAYOUTS, PROMPT_COLUMNS, SYSTEM_COLUMNS, system_text
from qadapter.data.rows import Pair, Row, RowError
from qadapter.errors import DataError

FIRST_ROWS = 100  # rows that decide on the layout
# The names that can be mapped, with all columns from which each is read where it is not.
MAPPABLE = {
    "prompt": (*PROMPT_COLUMNS, "input", "history", "messages", "conversations"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "system": SYSTEM_COLUMNS,
}
# Columns by which a prompt is more than its text, and the JSON texts that say nothing in one.
EMPTY = ("", "[]", "{}", "null")
UNREAD = ("image", "images", "audio", "audios", "video", "videos", "tools", "functions", "chat_template_kwargs")


@dataclass(frozen=True)
class Format:
    """How one dataset writes its pairs: the layout's name, whether it is a chat, and the columns to read."""

    layout: str
    chat: bool
    columns: Mapping[str, str] | None = None

    def normalise(self, row: Row) -> Pair:
        """{"prompt", "chosen", "rejected"} as messages (chat) or text; raises RowError without a place."""
        selected = select(row, self.columns)
        if unread := [name for name in UNREAD if holds_something(selected.get(name))]:
            raise RowError(
                "wrong type",
                f"the prompt has {unread[0]}, which pairs of text cannot hold; remove the column, or read the text "
                "alone with --columns prompt=... chosen=... rejected=...",
            )
        pair = LAYOUTS[self.layout].read(selected)
        system = system_text(selected)
        if not self.chat:
            if system:
                raise RowError("wrong type", "a system text, but the first rows have none and were taken as plain text")
            return checked_plain(pair, prompt_needed=self.layout != "plain-implicit")
        pair = messages.as_chat(pair)
        if system:
            pair["prompt"] = messages.with_system(pair["prompt"], messages.as_text(system, "system"))
        return messages.checked_chat(pair)

    def columns_read(self, row: Row) -> set[str]:
        """The columns of a row, or dotted paths into them, from which its pair is made."""
        read = LAYOUTS[self.layout].columns_read(select(row, self.columns))
        return {(self.columns or {}).get(name, name) for name in read}


def recognise(
    column_names: Iterable[str],
    first_rows: Sequence[Row],
    columns: Mapping[str, str] | None = None,
    source: str = "dataset",
) -> Format:
    """The format of a dataset, from its columns and first rows.

    `columns` maps prompt, chosen, rejected and system to the dataset's own names; a dotted name reaches into
    an object ("responses.academy"). Raises DataError when nothing fits; `source` names the dataset in it.
    """
    names = list(column_names)
    if not first_rows:
        raise DataError(f"{source}: the dataset is empty; at least one preference pair is needed")
    check_mapping(columns, names, source)
    selected = [select(row, columns) for row in first_rows]
    example = example_row(selected)
    warn_of_input(selected, example_row(first_rows), columns, source)
    has_system = any(system_text(row) for row in selected)
    for name, layout in LAYOUTS.items():
        if layout.matches(example):
            if name == "plain-implicit":
                warn_of_unread_text(example_row(first_rows), columns, source)
            return Format(name, layout.chat or has_system, columns)
    raise unknown_layout(example_row(first_rows), names, columns, source)


def select(row: Row, columns: Mapping[str, str] | None) -> dict[str, Any]:
    """The row under our column names: the mapped columns, and for what is not mapped those that we know."""
    if columns is None:
        return dict(row)
    known = [name for part, names in MAPPABLE.items() if part not in columns for name in names]
    same = {name: row[name] for name in known if name in row and name not in columns.values()}
    named = {name: value_at(row, path) for name, path in columns.items()}
    if columns.get("prompt") == "instruction" and "input" in row and "input" not in columns.values():
        named |= {"instruction": named.pop("prompt"), "input": row["input"]}  # Alpaca's input belongs to it
    return same | named


def holds_something(value: Any) -> bool:
    """Whether a value is more than nothing, as a column may say it: no items, none as JSON, None in every field."""
    if isinstance(value, str):
        return value.strip() not in EMPTY
    if isinstance(value, Mapping):  # Arrow gives each row the fields of all
        return any(part is not None for part in value.values())
    return bool(value)


def value_at(row: Any, path: str) -> Any:
    """The value under a column name, or under a dotted path into nested objects; None where there is none."""
    if not isinstance(row, Mapping):
        return None
    if path in row or "." not in path:
        return row.get(path)
    head, rest = path.split(".", 1)
    return value_at(row.get(head), rest)


def example_row(rows: Sequence[Row]) -> dict[str, Any]:
    """The first filled value of each column, so that a hole in row 1 does not decide the layout."""
    example: dict[str, Any] = {}
    for row in rows:
        example |= {name: value for name, value in row.items() if value not in (None, "") and name not in example}
    for name in ("chosen", "rejected"):
        if any(row.get(name) == "" for row in rows):
            example.setdefault(name, "")  # empty answers in all first rows are errors of the rows
    return example


def checked_plain(pair: Pair, prompt_needed: bool) -> Pair:
    """The pair of plain texts if both answers hold text and differ; raises RowError."""
    if prompt_needed and not pair["prompt"].strip():
        raise RowError("no prompt", "the prompt is empty")
    for name in ("chosen", "rejected"):
        if not pair[name].strip():
            raise RowError("no answer", f"{name} holds no answer")
    if pair["chosen"] == pair["rejected"]:
        raise messages.identical_answers()
    return pair


def check_mapping(columns: Mapping[str, str] | None, names: list[str], source: str) -> None:
    if columns is not None and not isinstance(columns, Mapping):
        raise DataError(f"columns is a {type(columns).__name__}; give {{'chosen': 'name of the column', ...}}")
    for name, path in (columns or {}).items():
        if name not in MAPPABLE:
            known = f"{', '.join(MAPPABLE)}, and in evaluations category"
            raise DataError(f"--columns: {name!r} cannot be mapped; the names are {known}")
        if path not in names and path.split(".", 1)[0] not in names:
            raise DataError(f"{source}: --columns maps {name} to {path!r}, the columns are {', '.join(names)}")


def warn_of_input(selected: Sequence[Row], example: Row, columns: Mapping[str, str] | None, source: str) -> None:
    """Warn where Alpaca's input is left aside by a prompt that --columns names."""
    named = columns or {}
    if example.get("input") and "prompt" in named and "input" not in named.values() and "input" not in selected[0]:
        warnings.warn(
            f"{source}: the column input is not read beside --columns prompt={named['prompt']}; if it continues the "
            "prompt, name that column instruction in the data",
            stacklevel=2,
        )


def warn_of_unread_text(example: Row, columns: Mapping[str, str] | None, source: str) -> None:
    """Warn where the pairs have no prompt, but a column that --columns left aside may well hold it."""
    used = {"chosen", "rejected", *SYSTEM_COLUMNS, *(path.split(".", 1)[0] for path in (columns or {}).values())}
    unread = [name for name, value in example.items() if isinstance(value, str | list) and name not in used]
    if unread:
        warnings.warn(
            f"{source}: the pairs have no prompt, and nothing is read from the columns {', '.join(unread)}; "
            f"if the prompt is there, name it: --columns {shlex.quote(f'prompt={unread[0]}')}",
            stacklevel=2,
        )


def unknown_layout(example: Row, names: list[str], columns: Mapping[str, str] | None, source: str) -> DataError:
    """The refusal, with the --columns that would read columns whose names are nearly ours."""
    texts = [name for name in names if isinstance(example.get(name), str | list | dict)]
    wanted = {part: near_name(part, texts) for part in ("prompt", "chosen", "rejected")} | dict(columns or {})
    near = wanted["chosen"] and wanted["rejected"]
    line = shlex.join(f"{part}={name or '...'}" for part, name in wanted.items())
    return DataError(
        f"{source}: no known preference layout; found the columns {', '.join(names) or '(none)'}. "
        + (f"Do you mean --columns {line}? " if near else f"Name them with --columns {line}; ")
        + "docs/data.md lists the layouts"
    )


def near_name(part: str, names: list[str]) -> str | None:
    """The column that is named nearly as `part`: in other case, within a longer name, or misspelt; None if none is."""
    known = PROMPT_COLUMNS if part == "prompt" else (part,)
    folded = {name.lower(): name for name in reversed(names)}
    same = [folded[name] for name in known if name in folded]
    within = sorted((name for name in names if any(word in name.lower() for word in known)), key=len)
    misspelt = [folded[match] for match in difflib.get_close_matches(part, folded, n=1, cutoff=0.75)]
    return next(iter(same + within + misspelt), None)
