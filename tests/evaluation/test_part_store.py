"""Finished parts on disk: taken if nothing they depend on has changed, never half written."""

import errno
import json
import math
from pathlib import Path

import pytest

from qadapter.evaluation import part_store
from qadapter.evaluation.intervals import Interval
from qadapter.evaluation.part_store import PartStore, fingerprint, jsonable
from qadapter.new_folders import write_ordered_json, write_whole


def test_a_stored_part_is_taken_and_equals_a_fresh_one(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"b": Interval(0.5, 0.25, math.inf, 3), "a": [math.nan, (1, 2)]}

    fresh = PartStore(tmp_path).part("pairs", {"x": 1}, compute)
    again = PartStore(tmp_path)
    assert again.part("pairs", {"x": 1}, compute) == fresh
    assert again.reused == ["pairs"]
    assert len(calls) == 1
    assert fresh == {"b": {"value": 0.5, "low": 0.25, "high": None, "n": 3}, "a": [None, [1, 2]]}
    assert list(fresh) == ["b", "a"]  # columns have an order


def test_another_input_is_another_part(tmp_path, monkeypatch):
    store = PartStore(tmp_path)
    assert store.part("pairs", [1], lambda: "one") == "one"
    assert store.part("pairs", [2], lambda: "two") == "two"
    assert store.part("neutral", [1], lambda: "other") == "other"
    monkeypatch.setattr(part_store, "version", lambda name: "of another day")
    assert store.part("pairs", [1], lambda: "again") == "again"


def test_parts_can_be_measured_again(tmp_path):
    assert PartStore(tmp_path).part("pairs", [], lambda: 1) == 1
    assert PartStore(tmp_path, reuse=False).part("pairs", [], lambda: 2) == 2
    assert PartStore(tmp_path).part("pairs", [], lambda: 3) == 2


def test_a_part_is_computed_once_in_a_run_whatever_is_reused(tmp_path):
    PartStore(tmp_path).part("answers", [], lambda: 1)
    store = PartStore(tmp_path, reuse=False)
    assert [store.part("answers", [], lambda: 2), store.part("answers", [], lambda: 3)] == [2, 2]
    assert store.reused == []


def test_where_parts_cannot_be_kept_they_are_kept_for_the_run_and_it_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    store = PartStore(tmp_path / "file" / "evaluation")
    assert [store.part("answers", [n], lambda: {"b": 1, "a": 2}) for n in (0, 1)] == [{"b": 1, "a": 2}] * 2
    assert list(store.part("answers", [0], lambda: 3)) == ["b", "a"]
    assert store.reused == []
    assert [record.message for record in caplog.records] == [
        f"finished parts cannot be kept in {store.folder} (Not a directory): were this run interrupted, it would begin "
        "anew."
    ]


def test_a_cache_that_may_not_be_looked_into_is_as_good_as_none(tmp_path, monkeypatch, caplog):
    """As in a container whose HOME is another user's."""

    def refused(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for name in ("stat", "read_text", "mkdir"):
        monkeypatch.setattr(Path, name, refused)
    assert PartStore(tmp_path / "closed").part("pairs", [], lambda: 1) == 1
    assert "(Permission denied)" in caplog.text


def test_a_damaged_part_is_computed_again(tmp_path):
    store = PartStore(tmp_path)
    store.part("pairs", [], lambda: 1)
    (path,) = tmp_path.iterdir()
    path.write_text('{"half')
    assert store.part("pairs", [], lambda: 2) == 2
    assert json.loads(path.read_text()) == 2


def test_what_is_not_final_is_not_stored(tmp_path):
    store = PartStore(tmp_path)
    assert store.part("judged", [], lambda: {"missing": 3}, keep=lambda value: not value["missing"]) == {"missing": 3}
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_part_leaves_nothing(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PartStore(tmp_path).part("pairs", [], interrupted)
    assert list(tmp_path.iterdir()) == []


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_ordered_json(path, {"z": 1, "a": "é"})
    assert path.read_text() == '{\n "z": 1,\n "a": "é"\n}\n'
    with pytest.raises(ValueError, match="Out of range"):
        write_ordered_json(path, math.nan)
    assert json.loads(path.read_text())["z"] == 1


def test_a_file_that_could_not_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_whole(path, "as it wäs")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert path.read_text(encoding="utf-8") == "as it wäs"
    assert list(tmp_path.iterdir()) == [path]


def test_fingerprints_ignore_the_order_of_keys_and_see_values():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})
    assert jsonable({"path": part_store.Path("x")}) == {"path": "x"}
