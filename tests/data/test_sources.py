import contextlib
import gzip
import itertools
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from data_examples import chat_pair, plain_pair

from qadapter.data import NAMED_SOURCES, dsp, load_preference_dataset, sources
from qadapter.errors import ConfigError, DataError

PAIRS = [plain_pair(number) for number in range(1, 12)]
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "pairs"


def test_importing_the_data_package_and_its_loader_does_not_import_torch():
    code = "import sys, qadapter.data as data; data.load_preference_dataset; data.render; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_plain_text_pairs_stay_strings(write_lines):
    loaded = load_preference_dataset(write_lines(PAIRS))
    assert loaded.column_names == ["prompt", "chosen", "rejected"]
    assert loaded.to_list() == PAIRS


def test_chat_pairs_have_role_and_content_only(write_lines):
    pair = chat_pair()
    extended = pair | {"chosen": [pair["chosen"][0] | {"name": "x"}], "id": 3}
    assert load_preference_dataset(write_lines([extended])).to_list() == [pair]


def test_a_bad_row_is_named_by_file_and_line(write_lines):
    path = write_lines([PAIRS[0], PAIRS[1] | {"rejected": PAIRS[1]["chosen"]}])
    with pytest.raises(DataError, match="line 2: chosen and rejected are the same"):
        load_preference_dataset(path)


def test_bad_rows_can_be_dropped_and_are_counted(write_lines, caplog):
    rows = [PAIRS[0], "oops", PAIRS[1] | {"chosen": ""}, PAIRS[2] | {"chosen": None}, PAIRS[3]]
    with caplog.at_level(logging.WARNING, logger="qadapter"):
        loaded = load_preference_dataset(write_lines(rows), on_error="drop")
    assert loaded.to_list() == [PAIRS[0], PAIRS[3]]
    assert "line 2: not JSON" in caplog.text
    assert "dropped 3 of 5 rows (no answer: 2, unreadable: 1)" in caplog.text


def test_dropping_every_row_is_an_error(write_lines):
    with pytest.raises(DataError, match=r"every row was dropped \(no answer: 1\); the last one is .*line 1"):
        load_preference_dataset(write_lines([PAIRS[0] | {"chosen": ""}]), on_error="drop")


def test_a_file_of_unreadable_lines_raises_the_first(write_lines):
    with pytest.raises(DataError, match="line 1: not JSON"):
        load_preference_dataset(write_lines(["oops", "again"]), on_error="drop")


@pytest.mark.parametrize("streaming", [False, True])
def test_max_rows_takes_the_first_rows(write_lines, streaming):
    loaded = load_preference_dataset(write_lines([*PAIRS, "never read"]), max_rows=3, streaming=streaming)
    assert list(loaded) == PAIRS[:3]


def test_max_rows_counts_valid_rows(write_lines):
    rows = [PAIRS[0], "oops", *PAIRS[1:]]
    assert load_preference_dataset(write_lines(rows), max_rows=3, on_error="drop").to_list() == PAIRS[:3]


def test_a_stream_gives_the_same_rows_on_every_pass(write_lines):
    stream = load_preference_dataset(write_lines(PAIRS, "pairs.jsonl.gz"), streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    assert list(stream) == list(stream) == PAIRS


def test_a_stream_is_lazy_and_raises_at_the_bad_row(write_lines, monkeypatch):
    monkeypatch.setattr(sources, "FIRST_ROWS", 2)
    stream = iter(load_preference_dataset(write_lines([*PAIRS[:3], "oops"]), streaming=True))
    assert [next(stream) for _ in range(3)] == PAIRS[:3]
    with pytest.raises(DataError, match="line 4: not JSON"):
        next(stream)


def test_columns_reach_the_rows(write_lines):
    path = write_lines([{"q": "a", "good": "b", "bad": "c"}])
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert load_preference_dataset(path, columns=columns).to_list() == [{"prompt": "a", "chosen": "b", "rejected": "c"}]


def test_a_missing_file_is_told_from_a_hub_id():
    with pytest.raises(
        DataError, match=r"pairs/none.jsonl: no such file.*'org/name', 'builtin', or one of dsp/academy"
    ):
        load_preference_dataset("pairs/none.jsonl")


@pytest.mark.parametrize(
    "name", ["no such thing", "a/b/c", "../pairs", "org/name:config:more", "~nobody/x", "a\0b", "x" * 5000]
)
def test_what_is_neither_file_nor_hub_id_is_refused(name):
    with pytest.raises(DataError, match="no such file, and not a dataset name either"):
        load_preference_dataset(name)


def test_a_split_of_a_file_is_refused(write_lines):
    with pytest.raises(DataError, match="only the split 'train', not 'test'"):
        load_preference_dataset(write_lines(PAIRS), split="test")


@pytest.mark.parametrize("options", [{"max_rows": 0}, {"on_error": "ignore"}])
def test_impossible_options_are_refused(write_lines, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        load_preference_dataset(write_lines(PAIRS), **options)


class Caused(datasets.exceptions.DatasetGenerationError):
    """An error of the builders, which says what went wrong in its cause."""

    __cause__ = ValueError("JSON parse error\nand a long story")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach the Hub\nand a long story"), "Couldn't reach the Hub"),
        (StopIteration(), "there are no rows"),
        (Caused("An error occurred"), "JSON parse error"),
    ],
)
def test_a_hub_dataset_that_cannot_be_loaded_is_one_line_with_the_way_out(monkeypatch, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=rf"nobody/nothing: the dataset cannot be loaded.*: {said}\. .*local file"
    ) as caught:
        load_preference_dataset("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: remembers what was asked for and gives two HH-RLHF rows."""
    asked = []
    rows = [{side: f"\n\nHuman: hi {n}\n\nAssistant: {side}" for side in ("chosen", "rejected")} for n in range(2)]

    def load_dataset(*names, **options):
        asked.append((names, options))
        dataset = datasets.Dataset.from_list(rows)
        return dataset.to_iterable_dataset() if options["streaming"] else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_id_may_name_a_config_and_a_split(hub, streaming):
    loaded = load_preference_dataset("org/name:small", split="test", streaming=streaming)
    assert hub[0] == (("org/name", "small"), {"data_dir": None, "split": "test", "streaming": streaming})
    assert list(loaded)[1]["prompt"] == [{"role": "user", "content": "hi 1"}]


@pytest.mark.parametrize("name", NAMED_SOURCES)
def test_named_sources_are_found_on_the_hub(hub, name):
    assert load_preference_dataset(name).num_rows == 2
    ((names, options),) = hub
    assert names == ("Anthropic/hh-rlhf", None)
    assert options["data_dir"] == name.removeprefix("hh-rlhf/").removesuffix("-base") + "-base"


DSP_ROWS = [
    {"query": "Why is the sky blue?", "responses": {"academy": "Rayleigh.", "business": "Value!", "normal": "Light."}},
    {"query": "Two words?", "responses": {"academy": "Here.", "business": "Here.", "normal": "Yes."}},
]
DSP_PAIRS = [("Rayleigh.", "Value!"), ("Rayleigh.", "Light."), ("Here.", "Yes.")]


def test_a_copy_of_the_published_dsp_file_gives_the_pairs_of_a_domain(tmp_path):
    path = tmp_path / "domain_specific_preference.train.json"
    path.write_text(json.dumps(DSP_ROWS), encoding="utf-8")
    loaded = load_preference_dataset(f"dsp/academy:{path}")
    assert [(row["chosen"], row["rejected"]) for row in loaded] == DSP_PAIRS
    assert loaded[0]["prompt"] == "Why is the sky blue?"


class Publisher(BaseHTTPRequestHandler):
    """Answers with `content` of its server: bytes, None (there is no such file), or an iterator of them."""

    def do_GET(self):
        content = self.server.content
        self.server.asked.append(self.path)
        self.send_response(404 if content is None else 200)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client has had enough
            for part in [content or b""] if not isinstance(content, Iterator) else content:
                self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A server of this machine that stands in for that of the published files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Publisher) as server:
        server.content, server.asked = json.dumps(DSP_ROWS).encode(), []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(dsp, "ADDRESS", f"http://127.0.0.1:{server.server_port}/published.{{split}}.json")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()
        thread.join()


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").glob("qadapter-downloads/**/*"))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_dsp_name_reads_the_published_split_and_fetches_it_once(published, tmp_path, split, streaming):
    for _ in range(2):
        loaded = list(load_preference_dataset("dsp/academy", split=split, streaming=streaming))
        assert [(row["chosen"], row["rejected"]) for row in loaded] == DSP_PAIRS
    assert published.asked == [f"/published.{split}.json"]
    assert kept(tmp_path) == [f"published.{split}.json"]


def test_the_published_address_is_that_of_the_authors(monkeypatch):
    asked = []
    monkeypatch.setattr(dsp, "downloaded_list", lambda *arguments: asked.append(arguments))
    dsp.published_file("test")
    [(address, most_bytes)] = asked
    assert address.endswith("/Linear95/DSP/HEAD/data/domain_specific_preference.test.json")
    assert most_bytes == 100 * 2**20


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "404"),
        (b"", "not JSON: Expecting value"),
        (b"<html><body>404: Not Found</body></html>", "not JSON: Expecting value"),
        (json.dumps(DSP_ROWS).encode()[:-30], "not JSON"),
        (b'{"a": 1}', "no list of rows"),
    ],
    ids=["missing", "empty", "another page", "cut short", "no list"],
)
def test_a_published_file_that_is_not_what_it_should_be_is_one_line_and_not_kept(published, tmp_path, content, cause):
    whole, published.content = published.content, content
    with pytest.raises(DataError, match=rf"http://.*/published.train.json: .*{cause}.*'dsp/academy:FILE'") as caught:
        load_preference_dataset("dsp/academy")
    assert "\n" not in str(caught.value)
    assert kept(tmp_path) == []
    published.content = whole
    assert load_preference_dataset("dsp/academy").num_rows == len(DSP_PAIRS)


def test_a_published_file_of_another_list_is_one_line(published):
    published.content = b'[{"a": 1}]'
    with pytest.raises(DataError, match=r"row 1: responses has to hold the answers by domain"):
        load_preference_dataset("dsp/academy")


def test_no_more_is_fetched_than_the_limit(published, tmp_path, monkeypatch):
    monkeypatch.setattr(dsp, "MOST_BYTES", 10_000)
    published.content = itertools.repeat(b" " * 1000)
    with pytest.raises(DataError, match=r"published.train.json: the file has more than 10000 bytes, the most that are"):
        load_preference_dataset("dsp/academy")
    assert kept(tmp_path) == []


def test_a_file_as_large_as_the_limit_is_fetched(published, monkeypatch):
    monkeypatch.setattr(dsp, "MOST_BYTES", len(published.content))
    assert load_preference_dataset("dsp/academy").num_rows == len(DSP_PAIRS)


def test_nothing_is_fetched_offline(published, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot be fetched: .*offline mode is enabled"):
        load_preference_dataset("dsp/academy")
    assert published.asked == []


def test_a_cache_that_cannot_be_written_is_named(published, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot be kept in .*cache/qadapter-downloads .*'dsp/academy:FILE'"):
        load_preference_dataset("dsp/academy")


def test_a_copy_of_an_hh_rlhf_file_is_read_as_the_hub_gives_it(hub, tmp_path):
    rows = [{side: f"\n\nHuman: hi {n}\n\nAssistant: {side}" for side in ("chosen", "rejected")} for n in range(2)]
    with gzip.open(tmp_path / "train.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    copied = load_preference_dataset(tmp_path / "train.jsonl.gz")
    assert copied.to_list() == load_preference_dataset("hh-rlhf/harmless").to_list()
    assert copied[1]["chosen"] == [{"role": "assistant", "content": "chosen"}]


@pytest.mark.parametrize(
    ("name", "message"),
    [("dsp/sports", "the domains are dsp/academy"), ("dsp/academy:", "name the file after the colon")],
)
def test_a_wrong_dsp_name_is_refused(name, message):
    with pytest.raises(DataError, match=message):
        load_preference_dataset(name)


def test_a_dsp_split_that_is_not_published_is_refused():
    with pytest.raises(DataError, match="the splits are train, test"):
        load_preference_dataset("dsp/academy", split="validation")


def test_a_dsp_row_without_the_domain_is_named(tmp_path):
    path = tmp_path / "dsp.json"
    path.write_text(json.dumps([{"query": "a", "responses": {"normal": "b"}}]), encoding="utf-8")
    with pytest.raises(DataError, match=r"dsp.json.*that of academy among them"):
        load_preference_dataset(f"dsp/academy:{path}")


def test_builtin_reads_the_files_of_the_package(tmp_path, monkeypatch):
    folder = tmp_path / "builtin"
    folder.mkdir()
    for name, pair in (("concise_train.jsonl", PAIRS[0]), ("concise_eval.jsonl", PAIRS[1])):
        (folder / name).write_text(json.dumps(pair | {"category": "x"}))
    monkeypatch.setattr(sources, "files", lambda package: tmp_path)
    assert load_preference_dataset("builtin").to_list() == [PAIRS[0]]
    assert load_preference_dataset("builtin", split="test").to_list() == [PAIRS[1]]
    with pytest.raises(DataError, match="no split 'validation'; the splits are train, test"):
        load_preference_dataset("builtin", split="validation")


def test_the_shipped_pairs_load_and_no_prompt_is_both_trained_on_and_held_out():
    train, held_out = load_preference_dataset("builtin"), load_preference_dataset("builtin", split="test")
    assert train.num_rows >= 300
    assert held_out.num_rows >= 80
    assert not {str(row["prompt"]) for row in train} & {str(row["prompt"]) for row in held_out}


@pytest.mark.parametrize("name", ["dsp_academy", "dsp_literature", "hh_harmless", "hh_helpful", "polite"])
def test_the_development_data_loads(name):
    path = SHARED / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        first = json.loads(stream.readline())
    loaded = load_preference_dataset(path, max_rows=53)
    assert loaded.num_rows == 53
    assert loaded[0] == first
