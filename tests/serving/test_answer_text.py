"""Text is sent in whole characters, once, and never a part of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import byte_tokenizer, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qadapter.detokenising import Detokeniser
from qadapter.serving.answer_text import AnswerText, StopStrings
from qadapter.serving.jobs import Answer
from qadapter.serving.sampling import Chosen

BYTES = byte_tokenizer()
# Tokens of a whole character and the first byte of the next: of an emoji after a space, of é after n.
STRADDLING = byte_tokenizer(("Ġ", "ð"), ("n", "Ã"))
whole_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\N{REPLACEMENT CHARACTER}"))


@given(whole_text)
def test_pieces_make_up_the_text_in_whole_characters(text):
    detokeniser = Detokeniser(BYTES)
    pieces = [detokeniser.push(token) for token in BYTES(text)["input_ids"]]
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(st.lists(st.integers(0, 256), max_size=60))
def test_any_bytes_give_text_that_is_utf8(tokens):
    detokeniser = Detokeniser(BYTES)
    "".join(detokeniser.push(token) for token in tokens).encode("utf-8")


def test_half_a_character_at_the_end_is_dropped():
    tokens = BYTES("né")["input_ids"]
    detokeniser = Detokeniser(BYTES)
    assert [detokeniser.push(token) for token in tokens[:-1]] == ["n", ""]


def cut_answer(tokenizer, tokens, stops=()):
    """Text and finish reason of an answer that is cut after these tokens."""
    text = AnswerText(Detokeniser(tokenizer), StopStrings(stops))
    answer = Answer(0, None, text, frozenset(), max_tokens=len(tokens))
    deltas = [answer.take(Chosen(token, -1.0, ())) for token in tokens]
    assert stops or sum(len(delta.reports) for delta in deltas) == len(tokens)
    return "".join(delta.text for delta in deltas), deltas[-1].finish_reason


@pytest.mark.parametrize(
    ("text", "cut", "whole"),
    [
        ("Well done 🎉", 1, "Well done "),
        ("Well done 🎉", 3, "Well done "),
        ("né", 1, "n"),
        ("né", 0, "né"),
        ("n\N{REPLACEMENT CHARACTER}", 0, "n\N{REPLACEMENT CHARACTER}"),
        ("n\N{REPLACEMENT CHARACTER}", 1, "n"),
    ],
)
def test_a_cut_inside_a_character_takes_only_that_character(text, cut, whole):
    tokens = STRADDLING(text)["input_ids"]
    assert cut_answer(STRADDLING, tokens[: len(tokens) - cut]) == (whole, "length")


def test_a_stop_string_before_half_a_character_ends_the_answer():
    assert cut_answer(STRADDLING, STRADDLING("so né")["input_ids"][:-1], stops=["n"]) == ("so ", "stop")


def test_replacement_characters_that_the_model_writes_are_sent_however_many():
    tokenizer, text = byte_tokenizer(("ï", "¿"), ("ï¿", "½")), "\N{REPLACEMENT CHARACTER}" * 11
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == 11
    assert cut_answer(tokenizer, tokens) == (text, "length")


def test_characters_appear_with_their_last_byte():
    detokeniser = Detokeniser(BYTES)
    assert [detokeniser.push(token) for token in BYTES("a😀b")["input_ids"]] == ["a", "", "", "", "😀", "b"]


def test_a_context_decides_how_the_first_token_reads():
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "▁one": 1, "▁two": 2}, unk_token="</s>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    assert Detokeniser(tokenizer).push(2) == "two"
    assert Detokeniser(tokenizer, context=[1]).push(2) == " two"


@given(
    st.lists(st.text("abc", max_size=3), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_text_passes_up_to_the_first_stop_string(pieces, stops):
    # The definition: after each piece, look for stop strings in all the text so far.
    expected, text = None, ""
    for piece in pieces:
        text += piece
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            expected = text[: min(places)]
            break
    stopper, passed, stopped = StopStrings(stops), "", False
    for piece in pieces:
        part, stopped = stopper.push(piece)
        passed += part
        assert text.startswith(passed)
        if stopped:
            break
    if not stopped:
        passed += stopper.flush()
    assert stopped == (expected is not None)
    assert passed == (text if expected is None else expected)


def test_only_what_may_become_a_stop_string_is_held_back():
    stops = StopStrings(["STOP"])
    assert [stops.push(piece) for piece in ("go ST", "ART S", "TO", "P on")] == [
        ("go ", False),
        ("START ", False),
        ("", False),
        ("", True),
    ]


CHARACTERS = tiny_tokenizer()


def answer_of(text, stops=()):
    """The pieces (text, reports) of an answer of one token a character, log-probability -1, -2, ..."""
    answer = AnswerText(Detokeniser(CHARACTERS), StopStrings(stops))
    pieces = []
    for number, token in enumerate(CHARACTERS(text)["input_ids"], 1):
        stopped = answer.add(Chosen(token, -float(number), ((token, -float(number)), (1, -9.0))))
        pieces.append(answer.take())
        if stopped:
            return pieces
    answer.close()
    return [*pieces, answer.take()]


def test_reports_travel_with_their_text():
    pieces = answer_of("abXcd", stops=["XY"])
    assert [(text, [report.text for report in reports]) for text, reports in pieces] == [
        ("a", ["a"]),
        ("b", ["b"]),
        ("", []),
        ("Xc", ["X", "c"]),
        ("d", ["d"]),
        ("", []),
    ]
    reports = [report for _, part in pieces for report in part]
    assert [report.offset for report in reports] == [0, 1, 2, 3, 4]
    assert [report.logprob for report in reports] == [-1, -2, -3, -4, -5]
    assert reports[0].top == (("a", -1.0), ("</s>", -9.0))


@pytest.mark.parametrize(("stop", "kept"), [("bX", "a"), ("X", "ab")])
def test_tokens_of_a_stop_string_are_not_reported(stop, kept):
    pieces = answer_of("abXcd", stops=[stop])
    assert "".join(text for text, _ in pieces) == kept
    assert "".join(report.text for _, reports in pieces for report in reports) == kept


@pytest.mark.parametrize(
    ("tokens", "offsets"),
    [
        ([*BYTES("a😀b")["input_ids"]], [0, 1, 1, 1, 1, 2]),
        ([BYTES("😀")["input_ids"][0], *BYTES("ab")["input_ids"]], [0, 1, 2]),  # a byte that no other completes
    ],
)
def test_a_tokens_offset_is_where_its_text_begins(tokens, offsets):
    answer = AnswerText(Detokeniser(BYTES), StopStrings(()))
    for token in tokens:
        answer.add(Chosen(token, -1.0, ()))
    answer.close()
    assert [report.offset for report in answer.take()[1]] == offsets


def test_special_tokens_leave_nothing_and_make_nothing_slower():
    """A model may write thousands of them; each is looked at once, whatever came before."""
    tokenizer = CountingTokenizer(BYTES)
    tokens = BYTES("so né")["input_ids"]
    special = BYTES.all_special_ids[0]
    detokeniser = Detokeniser(tokenizer)
    pieces = [detokeniser.push(token) for token in [*tokens, *[special] * 500]]
    assert "".join(pieces) == "so né"
    assert tokenizer.longest <= len(tokens) + 1
    spread = Detokeniser(BYTES)
    assert "".join(spread.push(token) for token in [special, *tokens[:1], special, *tokens[1:]]) == "so né"


class CountingTokenizer:
    """BYTES, and how many ids were ever decoded at once."""

    def __init__(self, tokenizer):
        self._tokenizer, self.longest = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def decode(self, ids, **options):
        self.longest = max(self.longest, len(ids))
        return self._tokenizer.decode(ids, **options)
