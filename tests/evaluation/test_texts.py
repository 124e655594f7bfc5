"""What is measured on, from files and from the package."""

import json

import pytest
from evaluated import CATEGORIES, pair_rows, write_jsonl
from models import tiny_policy

from qadapter.errors import ConfigError, DataError
from qadapter.evaluation.columns import Column
from qadapter.evaluation.drift import measure_texts
from qadapter.evaluation.texts import (
    Prompt,
    digest,
    excerpt,
    instructions,
    load_pairs,
    neutral_texts,
    reference_texts,
    sample,
)
from qadapter.generation import Answer, Sampling, generate_texts


def test_pairs_keep_their_categories_and_prompts(files, tokenizer):
    held_out = load_pairs(str(files["pairs"]), tokenizer)
    rows = pair_rows()
    assert [pair.chosen.category for pair in held_out.pairs] == [row["category"] for row in rows]
    assert [pair.prompt.text for pair in held_out.pairs] == [row["prompt"] for row in rows]
    assert [pair.rejected.excerpt for pair in held_out.pairs] == [row["rejected"] for row in rows]
    assert len(held_out.texts) == 18
    assert len(held_out.prompts) == len({row["prompt"] for row in rows})
    assert rows[0]["chosen"] in tokenizer.decode(held_out.pairs[0].chosen.answer)


def test_a_row_that_is_dropped_takes_its_category_along(tmp_path, tokenizer):
    rows = pair_rows(7)
    rows[2]["chosen"] = "x" * 200
    held_out = load_pairs(str(write_jsonl(tmp_path / "pairs.jsonl", rows)), tokenizer, max_length=100)
    assert [pair.chosen.category for pair in held_out.pairs] == [CATEGORIES[i] for i in (0, 1, 0, 1, 2, 0)]
    assert "1 dropped (answer too long: 1)" in held_out.summary


def test_categories_may_stand_in_another_column(tmp_path, tokenizer):
    rows = [{**row, "topic": index} for index, row in enumerate(pair_rows(3))]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    held_out = load_pairs(str(path), tokenizer, columns={"category": "topic"})
    assert [pair.chosen.category for pair in held_out.pairs] == ["0", "1", "2"]


def test_samples_are_drawn_by_the_seed_and_keep_the_order():
    assert sample(5, None, 0) == sample(5, 9, 0) == [0, 1, 2, 3, 4]
    assert sample(100, 7, 1) == sorted(sample(100, 7, 1)) != sample(100, 7, 2)
    with pytest.raises(ConfigError, match="sample of 0: must be at least 1"):
        sample(5, 0, 0)


def test_the_package_has_texts_of_each_kind(tokenizer):
    assert len(neutral_texts(tokenizer)) > 3
    assert {prompt.category for prompt in instructions()} >= {"code", "story"}
    assert len(instructions(limit=5)) == 5
    assert {pair.chosen.category for pair in load_pairs("builtin", tokenizer).pairs} >= {"cooking"}


def test_neutral_text_comes_in_paragraphs_or_rows(tmp_path, tokenizer, files):
    path = tmp_path / "text.txt"
    path.write_text("one two\r\n\r\n\r\nthree four\nfive\n\nx\n")
    texts = neutral_texts(tokenizer, path, max_length=6)
    assert [text.excerpt for text in texts] == ["one two", "three four five"]
    assert [len(text.context) + len(text.answer) for text in texts] == [6, 6]
    assert {text.category for text in neutral_texts(tokenizer, files["neutral"])} == {"words", "arithmetic"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": 3}\n', 'line 1: must be an object with a text as its text, {"text": "..."}'),
        (b'{"text": "a b"}\nnonsense\n', "line 2: not JSON: Expecting value at character 1"),
        (b"[1]\n", "line 1: must be an object with a text"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"\n\n", "no text of at least two tokens"),
        (b'{"text": "x"}\n', "no text of at least two tokens"),
    ],
)
def test_bad_text_files_are_refused_in_one_line(tmp_path, tokenizer, content, message):
    path = tmp_path / "text.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        neutral_texts(tokenizer, path)


def test_a_byte_order_mark_and_line_separators_inside_a_text_are_no_matter(tmp_path, tokenizer):
    path = tmp_path / "text.jsonl"
    path.write_bytes('\ufeff{"text": "one\u2028two\x85three", "prompt": "four\u2028five"}\n'.encode())
    assert [text.excerpt for text in neutral_texts(tokenizer, path)] == ["one two three"]
    assert [prompt.content for prompt in instructions(path)] == ["four\u2028five"]
    plain = tmp_path / "text.txt"
    plain.write_bytes("\ufeffone\u2028two\r\nthree\r\n".encode())
    assert [prompt.content for prompt in instructions(plain)] == ["one\u2028two", "three"]
    assert [text.excerpt for text in neutral_texts(tokenizer, plain)] == ["one two three"]


def test_a_category_may_lie_in_an_object_and_one_that_is_nowhere_is_refused(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n}?", "chosen": "a", "rejected": "b", "meta": {"topic": f"t{n}"}} for n in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_pairs(str(path), tokenizer, columns={"category": "meta.topic"})
    assert [pair.prompt.category for pair in found.pairs] == ["t0", "t1"]
    with pytest.raises(DataError, match=r"pairs.jsonl: --columns maps category to 'tpoic', under which no row has"):
        load_pairs(str(path), tokenizer, columns={"category": "tpoic"})


def test_missing_files_and_prompts(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"none\.txt cannot be read: No such file"):
        neutral_texts(tokenizer, tmp_path / "none.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(DataError, match="no prompt in it"):
        instructions(empty)


def test_answers_of_the_base_become_texts_that_end_where_it_ended(tokenizer):
    prompts = instructions(limit=3)
    answers = [Answer("so it is", True), Answer("and then", False), Answer("", True)]
    others = [Answer(answer.text, answer.finished, 7 if answer.finished else None) for answer in answers]
    ended, cut, empty = reference_texts(tokenizer, prompts, answers)
    assert ended.answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(cut.answer) == "and then"
    assert list(empty.answer) == [tokenizer.eos_token_id]
    assert reference_texts(tokenizer, prompts[:1], [Answer("", False)]) == [None]
    own_end, still_cut, only_end = reference_texts(tokenizer, prompts, others)  # a model may have several end tokens
    assert list(own_end.answer) == [*ended.answer[:-1], 7]
    assert (still_cut, list(only_end.answer)) == (cut, [7])


def test_answers_are_scored_on_the_tokens_that_were_written(tokenizer):
    """Their text, without the blanks around it, may be that of others: " a" and "a" are two tokens to many bases."""
    (text,) = reference_texts(tokenizer, instructions(limit=1), [Answer("so it is", True, 7, ids=[3, 9, 4, 7])])
    assert text.answer == [3, 9, 4, 7]


def test_what_a_model_writes_is_what_is_scored(tokenizer):
    policy = tiny_policy()
    (answer,) = generate_texts(policy, tokenizer, ["say"], Sampling(max_new_tokens=5), strength=0.0)
    (text,) = reference_texts(tokenizer, [Prompt("say")], [answer])
    (drift,) = measure_texts(policy, [text], [Column("policy")])
    assert bool(drift.base.greedy.all())  # a greedy answer is the base's likeliest at each token


def test_half_a_surrogate_pair_is_refused_with_its_line(tmp_path, tokenizer):
    for row, what in (({"prompt": "a\ud800"}, "prompt"), ({"prompt": "a", "category": "\udfff"}, "category")):
        path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "fine"}, row])
        with pytest.raises(DataError, match=f"line 2: {what} holds half of a surrogate pair"):
            instructions(path)


def test_the_digest_sees_ids_split_and_category(files, tokenizer):
    texts = neutral_texts(tokenizer, files["neutral"])
    assert digest(texts) == digest(list(texts))
    assert digest(texts) != digest(texts[::-1])
    assert excerpt("a\n b " + "c" * 300, 9) == "a b cccc…"


@pytest.mark.parametrize("name", ["texts.json", "texts.csv", "texts.JSONL"])
def test_rows_of_another_kind_are_neither_prose_nor_instructions(tmp_path, tokenizer, name):
    (tmp_path / name).write_text('[{"text": "Two words.", "prompt": "Why?"}]')
    with pytest.raises(DataError, match=f"{name}: give plain text, or JSON Lines in a file that ends with .jsonl"):
        neutral_texts(tokenizer, tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: give plain text, or JSON Lines in a file that ends with .jsonl"):
        instructions(tmp_path / name)
