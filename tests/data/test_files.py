import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from data_examples import plain_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from qadapter.data import files, load_preference_dataset
from qadapter.errors import DataError

PAIRS = [plain_pair(number) for number in range(1, 8)]


def write_csv(path, rows, header=("prompt", "chosen", "rejected")):
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.JSONL"])
def test_json_lines_are_read_in_order(write_lines, name):
    assert load_preference_dataset(write_lines(PAIRS, name)).to_list() == PAIRS


@pytest.mark.parametrize("name", ["pairs.json", "pairs.json.gz"])
@pytest.mark.parametrize("as_list", [True, False])
def test_json_may_be_a_list_or_lines(write_lines, name, as_list):
    rows = ["\n " + json.dumps(PAIRS, indent=1)] if as_list else PAIRS
    assert load_preference_dataset(write_lines(rows, name)).to_list() == PAIRS


def test_csv_keeps_text_as_text(tmp_path):
    """pandas, behind the CSV builder of `datasets`, reads these answers as missing values and numbers."""
    rows = [["a, b", "N/A", "null"], ['say "hi"\nplease', "42", "1e3"], ["naïve?", "None", "TRUE"]]
    loaded = load_preference_dataset(write_csv(tmp_path / "pairs.csv", rows))
    assert [list(row.values()) for row in loaded.to_list()] == rows


def test_csv_may_be_gzipped(tmp_path):
    path = write_csv(tmp_path / "pairs.csv", [pair.values() for pair in PAIRS])
    zipped = tmp_path / "zipped.csv.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert load_preference_dataset(zipped).to_list() == PAIRS


def test_csv_names_the_row_with_too_many_fields(tmp_path):
    path = write_csv(tmp_path / "pairs.csv", [["a", "b", "c"], ["a", "b", "c", "d"]])
    with pytest.raises(DataError, match=r"pairs.csv, row 2 \(line 3\): the row has another number of fields"):
        load_preference_dataset(path)


def test_csv_that_names_a_column_twice_is_refused(tmp_path):
    path = write_csv(tmp_path / "pairs.csv", [["a", "b", "c", "d"]], ("prompt", "chosen", "chosen", "rejected"))
    with pytest.raises(DataError, match=r"pairs.csv: its header names the column 'chosen' 2 times: keep one"):
        load_preference_dataset(path)
    unnamed = write_csv(tmp_path / "pairs.csv", [["a", "b", "c", "", ""]], ("prompt", "chosen", "rejected", "", ""))
    assert load_preference_dataset(unnamed)[0]["chosen"] == "b"


def test_csv_with_an_open_quote_is_refused(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,chosen,rejected\na,"b,c\n')
    with pytest.raises(DataError, match="line 2: not CSV: unexpected end of data"):
        load_preference_dataset(path)


def test_csv_with_invalid_utf8_names_the_line(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes(b"prompt,chosen,rejected\na,b,c\na,\xff,c\n")
    with pytest.raises(DataError, match="line 3: not UTF-8"):
        load_preference_dataset(path)


def test_parquet_is_read_with_nested_columns(tmp_path):
    path = tmp_path / "pairs [1].parquet"  # `datasets` would take the brackets for a pattern
    rows = [{"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]} for text in "abc"]
    rejected = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "z"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {"rejected": rejected} for row in rows]), path)
    loaded = load_preference_dataset(path)
    assert [row["chosen"][0]["content"] for row in loaded] == ["a", "b", "c"]


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = tmp_path / "pairs.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="Parquet file cannot be read after row 0"):
        load_preference_dataset(path)


def test_blank_lines_count_but_are_skipped(write_lines):
    path = write_lines([PAIRS[0], "", "  ", "not json"])
    with pytest.raises(DataError, match="line 4: not JSON"):
        load_preference_dataset(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\xff"}', "not UTF-8: invalid start byte at byte 13"),
        (b'{"prompt": ', "not JSON: Expecting value at character 13"),
        (b'{"prompt": NaN}', "NaN is not allowed"),
        (b'{"prompt": -Infinity}', "-Infinity is not allowed"),
        (b"[1, 2]", "the row is list, an object"),
        (b"7", "the row is int, an object"),
        (b"[" * 100_000, "not JSON that can be read: nested too deeply"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not JSON that can be read"),
    ],
)
def test_an_unreadable_line_is_named(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(PAIRS[0]).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=f"pairs.jsonl, line 2: {message}"):
        load_preference_dataset(path)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_that_is_called_json_lines_is_named(tmp_path, indent):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIRS, indent=indent))
    with pytest.raises(DataError, match="holds one JSON list, not an object a line; rename it to end with .json"):
        load_preference_dataset(path)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_csv_with_other_separators_is_named(tmp_path, separator):
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(separator.join(row) for row in [("prompt", "chosen", "rejected"), ("a", "b", "c")]))
    with pytest.raises(DataError, match="pairs.csv: its fields are separated by .*; save it with commas between them"):
        load_preference_dataset(path)


def test_of_a_repeated_key_the_last_value_counts(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}\n')
    assert load_preference_dataset(path)[0]["chosen"] == "d"


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path, name):
    path = tmp_path / name
    rows = json.dumps(PAIRS) if name == "pairs.json" else "\n".join(map(json.dumps, PAIRS))
    path.write_text(rows, encoding="utf-8-sig")
    assert load_preference_dataset(path).to_list() == PAIRS


def test_a_row_above_the_size_limit_is_refused(write_lines, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 200)
    path = write_lines([PAIRS[0], plain_pair(2, prompt="x" * 200)])
    with pytest.raises(DataError, match="line 2: longer than"):
        load_preference_dataset(path)


def test_a_json_list_above_the_size_limit_is_refused(write_lines, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100)
    with pytest.raises(DataError, match="convert it to JSON Lines"):
        load_preference_dataset(write_lines([json.dumps(PAIRS)], "pairs.json"))


DAMAGED_GZIP = {
    "no gzip": b"no gzip",
    "cut": gzip.compress(b'{"prompt": "a"}' * 500)[:-9],
    "head": b"\x1f\x8b\x08\x00rest",
}


@pytest.mark.parametrize("data", DAMAGED_GZIP.values(), ids=DAMAGED_GZIP)
def test_a_damaged_gzip_file_is_refused(tmp_path, data):
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(data)
    with pytest.raises(DataError, match="the file cannot be read"):
        load_preference_dataset(path)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"is a folder; name a file in it .*load_from_disk\(\.\.\.\)\.to_parquet"):
        load_preference_dataset(tmp_path)


def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path):
    path = tmp_path / "pairs.xlsx"
    path.touch()
    with pytest.raises(DataError, match=r"unknown kind of file.*\.jsonl.*\.parquet"):
        load_preference_dataset(path)


@pytest.mark.parametrize("name", files.SUFFIXES[:-1])
def test_an_empty_file_is_refused(tmp_path, name):
    path = tmp_path / f"pairs{name}"
    path.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    with pytest.raises(DataError, match="the dataset is empty"):
        load_preference_dataset(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
LINES = st.binary() | st.builds(lambda value: json.dumps(value).encode(), JSON)
LINES |= st.builds(lambda pair: json.dumps(pair).encode(), st.builds(plain_pair, st.integers(0, 3)))


@settings(max_examples=200)
@given(
    lines=st.lists(LINES, max_size=5),
    suffix=st.sampled_from(files.SUFFIXES),
    on_error=st.sampled_from(["raise", "drop"]),
)
def test_any_bytes_load_or_raise_a_data_error(tmp_path_factory, lines, suffix, on_error):
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(b"\n".join(lines))
    try:
        loaded = load_preference_dataset(path, on_error=on_error)
    except DataError:
        return
    assert 0 < len(loaded) <= len(lines) + 1
