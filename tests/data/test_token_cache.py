"""Tokens from the cache equal those made anew, whatever has happened to the cache."""

import datetime
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import time
from pathlib import Path

import datasets
import pytest
from data_examples import CHATML, LLAMA, THINKING, chat_pair, plain_pair
from datasets import Dataset, Features, List, Value, concatenate_datasets
from models import TEMPLATE, tiny_tokenizer
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from qadapter.data import token_cache, tokenise_preferences
from qadapter.data.token_cache import MANIFEST, cacheable, entry_name, file_digests, tokenise_cached
from qadapter.data.tokenisation import TOKENISATION_VERSION, Limits
from qadapter.modeling.fingerprints import tokenizer_fingerprint

CHATS = [chat_pair(f"Question {number}?" * (1 + number % 3), f"Paris {number}.", "No!") for number in range(7)]
PLAIN = [plain_pair(number) for number in range(7)]
# Dropped: its answer holds the end of a turn.
ENDS = chat_pair(chosen="one <|im_end|> two <|eot_id|> é three")
NO_LIMITS = Limits(None, None)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of a cache that keeps datasets of any size."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(token_cache, "LEAST_ROWS", 1)
    return tmp_path / "cache" / "qadapter"


def through_cache(rows, tokenizer, **limits):
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    assert cacheable(dataset, tokenizer)
    return tokenise_cached(dataset, tokenizer, fingerprint=tokenizer_fingerprint(tokenizer), **limits)


def assert_same(actual, expected):
    """Two (tokenised dataset, report) are equal in rows, columns, types and report."""
    assert actual[0].to_list() == expected[0].to_list()
    assert actual[0].features == expected[0].features
    assert actual[1] == expected[1]


@pytest.fixture
def not_again(monkeypatch):
    """Call it, and from then on nothing may be tokenised."""

    def forbid(*args, **kwargs):
        raise AssertionError("tokenised although it is in the cache")

    return lambda: monkeypatch.setattr(token_cache, "tokenise_preferences", forbid)


# -- equal to the slow twin ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, LLAMA, THINKING, None])
@pytest.mark.parametrize("limits", [{}, {"max_length": 40}, {"max_length": 40, "max_prompt_length": 6}])
def test_cached_tokens_and_report_equal_fresh_ones(cache, make_tokenizer, not_again, template, limits):
    tokenizer = make_tokenizer(template)
    rows = PLAIN if template is None else [*CHATS, ENDS]
    expected = tokenise_preferences(Dataset.from_list(rows), tokenizer, **limits)
    first = through_cache(rows, tokenizer, **limits)
    not_again()
    assert_same(first, expected)
    assert_same(through_cache(rows, tokenizer, **limits), expected)
    assert template is None or expected[1].dropped == {"end of turn inside": [8]}


def test_an_entry_holds_arrow_and_json_files_only(cache, chatml):
    through_cache(CHATS, chatml)
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} == {".arrow", ".json"}


def test_tokens_from_the_cache_need_its_files_no_more(cache, chatml):
    expected, _ = through_cache(CHATS, chatml)
    tokenised, _ = through_cache(CHATS, chatml)
    shutil.rmtree(cache)
    assert tokenised.to_list() == expected.to_list()
    assert tokenised.cache_files == []


# -- what an entry is named by -------------------------------------------------------------------------------------


def name_of(rows, tokenizer, limits=NO_LIMITS):
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return entry_name(dataset, tokenizer, tokenizer_fingerprint(tokenizer), limits)


@pytest.mark.parametrize(
    "rows",
    [
        PLAIN[:-1],
        PLAIN[::-1],
        [*PLAIN[:-1], PLAIN[-1] | {"rejected": "bad 7"}],
        [*PLAIN[:-1], PLAIN[-1] | {"rejected": ""}],
        [{name: row[name] for name in ("prompt", "rejected", "chosen")} for row in PLAIN],
        [row | {"score": 1} for row in PLAIN],
    ],
    ids=["fewer", "order", "text", "empty", "columns", "another column"],
)
def test_other_rows_have_another_entry(chatml, rows):
    assert name_of(rows, chatml) != name_of(PLAIN, chatml)


def test_the_same_rows_stored_otherwise_have_the_same_entry(chatml, tmp_path):
    whole = Dataset.from_list(PLAIN)
    Dataset.from_list(PLAIN[::-1]).save_to_disk(str(tmp_path / "rows"))
    stored = Dataset.load_from_disk(str(tmp_path / "rows")).select(range(6, -1, -1))
    chunks = concatenate_datasets([whole.select(range(3)), whole.select(range(3, 7))])
    assert name_of(stored, chatml) == name_of(chunks, chatml) == name_of(whole, chatml)


def test_rows_beyond_the_first_batch_count(chatml, monkeypatch):
    monkeypatch.setattr(token_cache, "BATCH_ROWS", 3)
    assert name_of([*PLAIN[:-1], plain_pair(9)], chatml) != name_of(PLAIN, chatml)


def test_other_limits_have_another_entry(chatml):
    limits = [NO_LIMITS, Limits(40, None), Limits(None, 40), Limits(40, 20)]
    assert len({name_of(PLAIN, chatml, some) for some in limits}) == 4


def test_another_tokenizer_has_another_entry_even_with_the_same_vocabulary(make_tokenizer):
    lower = make_tokenizer(CHATML)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    split = make_tokenizer(CHATML)
    split.split_special_tokens = True
    other = [
        lower,
        split,
        make_tokenizer(LLAMA),
        make_tokenizer(),
        make_tokenizer(CHATML, adds="<s> $A"),
        make_tokenizer(CHATML, eos_token="<|im_end|>"),
        make_tokenizer(CHATML),
    ]
    other[-1].add_tokens(["Question"])
    names = {name_of(PLAIN, tokenizer) for tokenizer in (make_tokenizer(CHATML), *other)}
    assert len(names) == 1 + len(other)
    assert tokenizer_fingerprint(lower) == tokenizer_fingerprint(make_tokenizer(CHATML))


def test_what_a_tokenizer_was_used_for_does_not_matter(make_tokenizer):
    used = make_tokenizer(CHATML)
    used(["one two", "three"], truncation=True, max_length=4, padding="max_length")
    assert used.backend_tokenizer.truncation is not None
    assert name_of(PLAIN, used) == name_of(PLAIN, make_tokenizer(CHATML))


@pytest.mark.parametrize("name", ["TOKENISATION_VERSION", "transformers", "tokenizers"])
def test_another_version_has_another_entry(chatml, monkeypatch, name):
    before = name_of(PLAIN, chatml)
    if name == "TOKENISATION_VERSION":
        monkeypatch.setattr(token_cache, name, 0)
    else:
        monkeypatch.setattr(f"{name}.__version__", "0")
    assert name_of(PLAIN, chatml) != before


def test_a_template_that_writes_the_date_has_an_entry_a_day(make_tokenizer, monkeypatch):
    names = {}
    for template in (CHATML, "{{ strftime_now('%d %b %Y') }} " + CHATML):
        for day in (1, 2):

            class Today(datetime.date):
                today = classmethod(lambda cls, day=day: datetime.date(2026, 3, day))

            monkeypatch.setattr(token_cache, "date", Today)
            names[template == CHATML, day] = name_of(PLAIN, make_tokenizer(template))
    assert names[True, 1] == names[True, 2]
    assert names[False, 1] != names[False, 2]


def test_ids_change_only_with_the_version():
    """If this fails, the ids of some rows have changed: raise TOKENISATION_VERSION, then put the new digest here."""
    rows = [*CHATS, ENDS, chat_pair("A long question " * 5, "Yes.", "An answer that is long " * 3)]
    ids = []
    without = [{"chosen": "one two three", "rejected": "one two four"}]
    runs = [(TEMPLATE, rows, {"max_length": 40}), (None, PLAIN, {"max_prompt_length": 5}), (None, without, {})]
    for template, some, limits in runs:
        tokenised, report = tokenise_preferences(Dataset.from_list(some), tiny_tokenizer(template), **limits)
        ids.append([tokenised.to_list(), report.truncated_prompts, report.dropped])
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    assert (TOKENISATION_VERSION, digest[:16]) == (4, "8495294aee685a98")


# -- what is not cached --------------------------------------------------------------------------------------------


class OwnTokenizer(PreTrainedTokenizerFast):
    """A subclass whose methods the serialised pipeline does not tell of."""


def test_what_an_entry_could_not_be_named_by_is_not_cached(cache, chatml):
    dataset = Dataset.from_list(PLAIN)
    assert cacheable(dataset, chatml)
    for other in (
        dataset.to_iterable_dataset(),
        dataset.with_format("numpy"),
        dataset.with_transform(lambda batch: batch),
        dataset.with_format(None, columns=["prompt"]),
        PLAIN,
    ):
        assert not cacheable(other, chatml)
    assert not cacheable(dataset, OwnTokenizer(tokenizer_object=chatml.backend_tokenizer))
    assert not cacheable(dataset, object())


def test_small_datasets_are_not_cached(chatml):
    assert not cacheable(Dataset.from_list(PLAIN), chatml)
    row = {name: [text] for name, text in PLAIN[0].items()}
    for count, expected in ((999, False), (1000, True)):
        assert cacheable(Dataset.from_dict({name: text * count for name, text in row.items()}), chatml) is expected


# -- damage --------------------------------------------------------------------------------------------------------


def only(paths):
    [path] = paths
    return path


def rewritten(entry, rows=None, features=None, **manifest):
    """Other tokens in an entry, with digests that fit."""
    if rows is not None:
        shutil.rmtree(entry / "pairs")
        Dataset.from_list(rows, features=features).save_to_disk(str(entry / "pairs"))
    stated = json.loads((entry / MANIFEST).read_text()) | {"files": file_digests(entry / "pairs")} | manifest
    (entry / MANIFEST).write_text(json.dumps(stated))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replaced_by_a_file(entry):
    shutil.rmtree(entry)
    entry.write_text("")


INTS = Features(dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), List(Value("int32"))))
ROW = {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5]}
DAMAGES = {
    "a bit": (lambda entry: flip(only(entry.rglob("*.arrow"))), "not as they were written"),
    "cut": (lambda entry: only(entry.rglob("*.arrow")).write_bytes(b""), "not as they were written"),
    "lost": (lambda entry: only(entry.rglob("*.arrow")).unlink(), "not as they were written"),
    "more": (lambda entry: (entry / "pairs" / "more.arrow").write_bytes(b""), "not as they were written"),
    "folder lost": (lambda entry: shutil.rmtree(entry / "pairs"), "No such file"),
    "no manifest": (lambda entry: (entry / MANIFEST).unlink(), "No such file"),
    "half a manifest": (lambda entry: (entry / MANIFEST).write_text('{"report"'), "Expecting"),
    "an empty manifest": (lambda entry: (entry / MANIFEST).write_text("{}"), "files"),
    "another report": (lambda entry: rewritten(entry, report={"columns": 3}), "columns"),
    "a file": (replaced_by_a_file, "Not a directory"),
    "no Arrow": (
        lambda entry: (only(entry.rglob("*.arrow")).write_bytes(b"ARROW"), rewritten(entry)),
        "",
    ),
    "another type": (lambda entry: rewritten(entry, [ROW] * 7), r"its columns are .*int64"),
    "another column": (
        lambda entry: rewritten(entry, [ROW | {"score": 1}] * 7, Features(INTS | {"score": Value("int32")})),
        "its columns are",
    ),
    "fewer rows": (lambda entry: rewritten(entry, [ROW] * 6, INTS), "it has 6 rows, but 7 were kept"),
    "an empty row": (lambda entry: rewritten(entry, [ROW] * 6 + [ROW | {"chosen_ids": []}], INTS), "a row .* empty"),
    "no row": (lambda entry: rewritten(entry, [ROW] * 6 + [ROW | {"prompt_ids": None}], INTS), "a row .* empty"),
    "long": (lambda entry: rewritten(entry, [ROW] * 6 + [ROW | {"chosen_ids": [4] * 60}], INTS), "has 61 tokens"),
    "long prompt": (lambda entry: rewritten(entry, [ROW] * 6 + [ROW | {"prompt_ids": [3] * 9}], INTS), "has 9 tokens"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_said_and_made_anew(cache, chatml, damage, caplog, not_again):
    limits = {"max_length": 60, "max_prompt_length": 8}
    expected = through_cache(CHATS, chatml, **limits)
    entry = only(cache.iterdir())
    spoil, match = DAMAGES[damage]
    spoil(entry)
    with caplog.at_level(logging.WARNING):
        assert_same(through_cache(CHATS, chatml, **limits), expected)
    [record] = caplog.records
    assert record.getMessage().startswith(f"the cached tokens in {entry} are damaged (")
    assert record.getMessage().endswith("): the pairs are tokenised anew.")
    assert "\n" not in record.getMessage()
    assert re.search(match, record.getMessage())
    assert list(cache.iterdir()) == [entry]
    not_again()
    assert_same(through_cache(CHATS, chatml, **limits), expected)
    assert len(caplog.records) == 1


def test_an_entry_that_another_process_removes_while_it_is_read_is_made_anew(cache, chatml, monkeypatch, caplog):
    expected = through_cache(CHATS, chatml)
    read_entry = token_cache.read_entry

    def reading(entry, limits):
        shutil.rmtree(entry)
        return read_entry(entry, limits)

    monkeypatch.setattr(token_cache, "read_entry", reading)
    assert_same(through_cache(CHATS, chatml), expected)
    assert len(list(cache.iterdir())) == 1
    assert caplog.records == []


# -- the size limit ------------------------------------------------------------------------------------------------


def aged(path, seconds):
    """Last used so many seconds before now."""
    os.utime(path, (time.time() - seconds,) * 2)
    return path


@pytest.fixture
def three(cache, chatml):
    """Entries of different rows by their number, the last used longest ago."""
    entries = {}
    for number in (1, 2, 3):
        before = set(cache.iterdir()) if cache.exists() else set()
        through_cache(CHATS[number:], chatml)
        entries[number] = aged(only(set(cache.iterdir()) - before), 100 * number)
    return entries


def limit_to(monkeypatch, *entries):
    monkeypatch.setattr(token_cache, "MOST_BYTES", sum(map(token_cache.folder_bytes, entries)))


def test_a_cache_within_the_limit_loses_nothing(cache, chatml, three, monkeypatch):
    monkeypatch.setattr(token_cache, "MOST_BYTES", 10**6)
    through_cache(CHATS, chatml)
    assert len(list(cache.iterdir())) == 4


def test_a_new_entry_drives_out_those_used_longest_ago(cache, chatml, three, monkeypatch, not_again):
    limit_to(monkeypatch, *three.values())
    through_cache(CHATS[2:], chatml)  # reading is use
    through_cache(CHATS, chatml)
    assert not three[3].exists()
    assert not three[1].exists()  # the new one is larger than the one used longest ago
    not_again()
    through_cache(CHATS[2:], chatml)
    through_cache(CHATS, chatml)


def test_the_entry_in_use_stays_though_it_alone_is_larger_than_the_limit(cache, chatml, three, monkeypatch):
    monkeypatch.setattr(token_cache, "MOST_BYTES", 1)
    expected = through_cache(CHATS, chatml)
    entry = only(cache.iterdir())
    assert_same(through_cache(CHATS, chatml), expected)
    assert list(cache.iterdir()) == [entry]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(cache, chatml, monkeypatch):
    left, written, foreign = (cache / name for name in (".writing-old", ".writing-new", "notes"))
    for folder in (left, written, foreign):
        folder.mkdir(parents=True)
        (folder / "data.arrow").write_bytes(b"ARROW")
    for folder in (left, foreign):
        aged(folder, 2 * token_cache.STALE_SECONDS)
    monkeypatch.setattr(token_cache, "MOST_BYTES", 1)
    through_cache(CHATS, chatml)
    assert [folder.exists() for folder in (left, written, foreign)] == [False, True, True]


def test_entries_that_cannot_be_removed_are_left(three, monkeypatch):
    def forbid(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(token_cache, "MOST_BYTES", 1)
    monkeypatch.setattr(os, "replace", forbid)
    token_cache.remove_oldest(three[1])
    assert all(entry.exists() for entry in three.values())


# -- writing -------------------------------------------------------------------------------------------------------


def broken_writer(error):
    def save_to_disk(self, path):
        Path(path).mkdir(parents=True)
        (Path(path) / "data.arrow").write_bytes(b"ARROW")
        raise error

    return save_to_disk


def test_a_write_that_fails_is_said_and_leaves_nothing(cache, chatml, monkeypatch, caplog):
    expected = tokenise_preferences(Dataset.from_list(CHATS), chatml)
    monkeypatch.setattr(Dataset, "save_to_disk", broken_writer(OSError(28, "No space left on device")))
    with caplog.at_level(logging.WARNING):
        assert_same(through_cache(CHATS, chatml), expected)
    assert [record.getMessage() for record in caplog.records] == [
        f"the tokens cannot be kept in {cache} ([Errno 28] No space left on device): the next run tokenises again."
    ]
    assert list(cache.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(cache, chatml, monkeypatch):
    monkeypatch.setattr(Dataset, "save_to_disk", broken_writer(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        through_cache(CHATS, chatml)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_done_without(cache, chatml, caplog):
    cache.parent.write_text("a file where the folder should be")
    expected = tokenise_preferences(Dataset.from_list(CHATS), chatml)
    with caplog.at_level(logging.WARNING):
        assert_same(through_cache(CHATS, chatml), expected)
    assert "the tokens cannot be kept in" in caplog.text


def test_of_two_that_tokenise_at_once_the_first_leaves_its_entry(cache, chatml, monkeypatch, caplog):
    """The other one ends while this one tokenises."""
    inodes = []

    def slowly(*args, **kwargs):
        monkeypatch.setattr(token_cache, "tokenise_preferences", tokenise_preferences)
        through_cache(CHATS, chatml)
        inodes.append(only(cache.iterdir()).stat().st_ino)
        return tokenise_preferences(*args, **kwargs)

    monkeypatch.setattr(token_cache, "tokenise_preferences", slowly)
    assert_same(through_cache(CHATS, chatml), tokenise_preferences(Dataset.from_list(CHATS), chatml))
    assert inodes == [only(cache.iterdir()).stat().st_ino]
    assert caplog.records == []


def tokenise_in_process(folder, barrier, results, most_bytes, datasets_of_rows):
    datasets.config.HF_DATASETS_CACHE = folder
    datasets.disable_progress_bars()
    token_cache.LEAST_ROWS, token_cache.MOST_BYTES = 1, most_bytes
    tokenizer = tiny_tokenizer()
    barrier.wait()
    for rows in datasets_of_rows:
        tokenised, report = through_cache(rows, tokenizer)
        results.put((tokenised.to_list(), report))


@pytest.mark.slow
@pytest.mark.parametrize("most_bytes", [2**30, 1])
def test_two_processes_at_once_get_the_same_tokens(cache, most_bytes):
    """Also where each removes what the other has just written, or reads."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    others = [CHATS[1:], CHATS] * 5 if most_bytes == 1 else []
    arguments = (str(cache.parent), barrier, results, most_bytes, [*others, CHATS, CHATS, CHATS])
    processes = [context.Process(target=tokenise_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    got = [results.get(timeout=120) for _ in range(2 * (len(others) + 3))]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    fresh = [tokenise_preferences(Dataset.from_list(rows), tiny_tokenizer()) for rows in (CHATS, CHATS[1:])]
    expected, fewer = [(tokenised.to_list(), report) for tokenised, report in fresh]
    assert got.count(fewer) == len(others)
    assert got.count(expected) == len(others) + 6
    assert len(list(cache.iterdir())) == 1
