"""Files of texts: paragraphs, or JSON Lines with a text and perhaps a category."""

import re
from pathlib import Path
from typing import Any

from qadapter.data.files import parse_json, require_text_or_jsonl
from qadapter.errors import DataError

CATEGORY = "category"
SURROGATE = re.compile("[\ud800-\udfff]")


def read_texts(path: Path) -> list[tuple[str, str | None]]:
    """(text, category) of each paragraph of a text file, or of each line of a JSONL file.

    Raises:
        DataError: it cannot be read, or a line is no object with a text.
    """
    require_text_or_jsonl(path)
    if path.suffix == ".jsonl":
        return read_objects(path, "text")
    paragraphs = read_utf8(path).replace("\r\n", "\n").split("\n\n")
    return [(paragraph.strip(), None) for paragraph in paragraphs if paragraph.strip()]


def read_prompts(path: Path) -> list[tuple[str, str | None]]:
    """(prompt, category) of each line of a text or JSONL file; raises DataError as `read_texts` does."""
    require_text_or_jsonl(path)
    if path.suffix == ".jsonl":
        return read_objects(path, "prompt")
    return [(line.strip(), None) for line in read_utf8(path).split("\n") if line.strip()]


def read_objects(path: Path, key: str) -> list[tuple[str, str | None]]:
    """(text under `key`, category) of each line of a JSONL file; raises DataError as `read_texts` does."""
    return objects(read_utf8(path), key, str(path))


def objects(content: str, key: str, name: str) -> list[tuple[str, str | None]]:
    """(text under `key`, category) of each JSON line; str.splitlines would cut at U+2028 inside a text, too."""
    rows = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.encode())
        except DataError as error:
            raise DataError(f"{name} line {number}: {error}.") from None
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise DataError(f'{name} line {number}: must be an object with a text as its {key}, {{"{key}": "..."}}.')
        text, category = row[key], row.get(CATEGORY)
        for what, value in ((key, text), (CATEGORY, str(category))):
            if SURROGATE.search(value):
                raise DataError(f"{name} line {number}: {what} holds half of a surrogate pair, which is no text.")
        rows.append((text, label(category)))
    return rows


def read_utf8(path: Path) -> str:
    """The text of a file, without the mark that some editors put before it.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def label(value: Any) -> str | None:
    """A category as it is shown, None for none."""
    return None if value is None or value == "" else excerpt(str(value), 80)


def excerpt(text: str, length: int = 160) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
