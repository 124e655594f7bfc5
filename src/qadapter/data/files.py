"""Rows of local files: JSON Lines, JSON, CSV (each also gzipped) and Parquet.

Read here rather than by `datasets`, whose builders infer types (the CSV answer "N/A" becomes a missing
value), treat brackets in a path as a pattern, copy the file into a cache, and name no line in errors.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from qadapter.data.rows import RawRow, Row, RowError
from qadapter.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
MAX_LINE_BYTES = 32 * 2**20  # one row of JSON Lines or one line of CSV
MAX_JSON_BYTES = 2**30  # a JSON list is parsed as a whole; larger data belongs in JSON Lines


def has_known_suffix(name: str) -> bool:
    """Whether the name ends like a file that can be read here."""
    return name.lower().endswith(SUFFIXES)


def require_text_or_jsonl(path: Path) -> None:
    """Raise DataError for a file of rows where texts are read: JSON or CSV would pass for prose, line by line."""
    if has_known_suffix(path.name) and path.suffix != ".jsonl":
        raise DataError(f"{path}: give plain text, or JSON Lines in a file that ends with .jsonl")


def read_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a file, lazily and in order; a row that cannot be parsed carries its RowError.

    Raises DataError when the file as a whole cannot be read. Row numbers are line numbers in JSON Lines.
    """
    if path.is_dir():
        raise DataError(
            f"{path} is a folder; name a file in it ({', '.join(SUFFIXES)}), several behind each other to train on "
            "all, or write what save_to_disk left with datasets.load_from_disk(...).to_parquet('pairs.parquet')"
        )
    if not has_known_suffix(path.name):
        raise DataError(f"{path}: unknown kind of file; rename or convert it to one of {', '.join(SUFFIXES)}")
    try:
        yield from parquet_rows(path) if path.suffix.lower() == ".parquet" else text_rows(path)
    except (OSError, EOFError, zlib.error) as error:  # a damaged gzip raises any of these
        raise DataError(f"{path}: the file cannot be read: {error or type(error).__name__}") from error


def text_rows(path: Path) -> Iterator[RawRow]:
    name = path.name.lower().removesuffix(".gz")
    with open_binary(path) as stream:
        if name.endswith(".csv"):
            yield from csv_rows(stream, str(path))
        elif name.endswith(".json") and starts_with_bracket(stream):
            yield from json_list_rows(stream, str(path))
        elif re.match(rb"\[\s*\{", start_of(stream)):
            raise DataError(f"{path} holds one JSON list, not an object a line; rename it to end with .json")
        else:
            yield from json_line_rows(stream, str(path))


def open_binary(path: Path) -> io.BufferedReader:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path))  # type: ignore[arg-type]
    return path.open("rb")


def starts_with_bracket(stream: io.BufferedReader) -> bool:
    """Whether the first sign of the file opens a list; only the first 4 KiB are looked through."""
    return start_of(stream)[:1] == b"["


def start_of(stream: io.BufferedReader) -> bytes:
    """What the file begins with, without blanks and byte order mark."""
    return stream.peek(4096).removeprefix(b"\xef\xbb\xbf").lstrip()


def json_line_rows(stream: io.BufferedReader, source: str) -> Iterator[RawRow]:
    for number, line in numbered_lines(stream, source):
        if line.strip():
            yield RawRow(number, f"{source}, line {number}", row_of_line(line))


def numbered_lines(stream: io.BufferedReader, source: str) -> Iterator[tuple[int, bytes]]:
    """Every line with its 1-based number; the mark that some editors put before line 1 is left out."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{source}, line {number}: longer than {MAX_LINE_BYTES // 2**20} MiB, the limit of a row")
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def row_of_line(line: bytes) -> Row | RowError:
    """The object on a line, or the error that says why there is none."""
    try:
        return object_or_error(parse_json(line))
    except DataError as error:
        return RowError("unreadable", str(error))


def parse_json(data: bytes) -> Any:
    """The parsed JSON; raises DataError for bad UTF-8, bad JSON, NaN or Infinity, and absurd nesting."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason} at byte {error.start + 1}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise DataError("not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"not JSON that can be read: {error}") from None


def refuse_constant(name: str) -> NoReturn:
    raise DataError(f"{name} is not allowed in JSON; remove it or write null")


def object_or_error(value: Any) -> Row | RowError:
    if isinstance(value, dict):
        return value
    return RowError("unreadable", f"the row is {type(value).__name__}, an object with named columns is needed")


def json_list_rows(stream: io.BufferedReader, source: str) -> Iterator[RawRow]:
    data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise DataError(f"{source}: a JSON list above {MAX_JSON_BYTES // 2**30} GiB; convert it to JSON Lines")
    try:
        values = parse_json(data.removeprefix(b"\xef\xbb\xbf"))
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    for number, value in enumerate(values, start=1):
        yield RawRow(number, f"{source}, row {number}", object_or_error(value))


def csv_rows(stream: io.BufferedReader, source: str) -> Iterator[RawRow]:
    """The rows below the header, every value as text; quotes as in RFC 4180, fields up to 128 KiB."""
    reader = csv.DictReader(decoded_lines(stream, source), strict=True)
    try:
        header = reader.fieldnames or []
        if len(header) == 1 and (other := re.search("[;\t|]", header[0])):
            raise DataError(f"{source}: its fields are separated by {other[0]!r}; save it with commas between them")
        for name in header:
            if name and header.count(name) > 1:
                times = header.count(name)
                raise DataError(f"{source}: its header names the column {name!r} {times} times: keep one")
        for number, row in enumerate(reader, start=1):
            yield RawRow(number, f"{source}, row {number} (line {reader.reader.line_num})", complete_or_error(row))
    except csv.Error as error:
        raise DataError(f"{source}, line {reader.reader.line_num}: not CSV: {error}") from None


def decoded_lines(stream: io.BufferedReader, source: str) -> Iterator[str]:
    for number, line in numbered_lines(stream, source):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            place = f"{source}, line {number}"
            raise DataError(f"{place}: not UTF-8: {error.reason}; save the file as UTF-8") from None


def complete_or_error(row: dict[Any, Any]) -> Row | RowError:
    """DictReader files surplus fields under None and gives None to the missing ones."""
    if None in row or None in row.values():
        return RowError("unreadable", "the row has another number of fields than the header")
    return row


def parquet_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(number, f"{path}, row {number}", row)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the Parquet file cannot be read after row {number}: {error}") from error
