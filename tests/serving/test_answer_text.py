"""Text is sent in whole characters, once, and never a part of a stop string."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from models import byte_tokenizer, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qadapter.detokenising import Detokeniser
from qadapter.serving.answer_text import AnswerText, StopStrings
from qadapter.serving.answers import ChatShape, Collected, CompletionShape
from qadapter.serving.jobs import Answer
from qadapter.serving.sampling import Chosen
from qadapter.serving.schema import ChatRequest, CompletionRequest, Message


def fallback_tokenizer():
    """Characters a and b; all others as bytes that the vocabulary names by number, as SentencePiece's do."""
    names = ["<unk>", "a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: place for place, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = byte_tokenizer()
# Tokens of a whole character and the first byte of the next: of an emoji after a space, of é after n.
STRADDLING = byte_tokenizer(("Ġ", "ð"), ("n", "Ã"))
FALLBACK = fallback_tokenizer()
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
    assert [(text, [report.reading.text for report in reports]) for text, reports in pieces] == [
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
    assert reports[0].top == ((("a", b"a"), -1.0), (("</s>", b"</s>"), -9.0))


@pytest.mark.parametrize(("stop", "kept"), [("bX", "a"), ("X", "ab")])
def test_tokens_of_a_stop_string_are_not_reported(stop, kept):
    pieces = answer_of("abXcd", stops=[stop])
    assert "".join(text for text, _ in pieces) == kept
    assert "".join(report.reading.text for _, reports in pieces for report in reports) == kept


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


def test_half_a_character_of_the_prompt_is_completed_by_the_answer():
    for tokenizer, prompt, text in [(BYTES, "B", "😀Cé"), (STRADDLING, "n ", "😀n"), (FALLBACK, "a", "😀b")]:
        before, after = tokenizer(prompt)["input_ids"], tokenizer(prompt + text)["input_ids"]
        for cut in range(len(before), len(after)):
            detokeniser = Detokeniser(tokenizer, context=after[:cut])
            sent = "".join(detokeniser.push(token) for token in after[cut:]) + detokeniser.flush()
            whole = tokenizer.decode(after[:cut], skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
            assert whole + sent == prompt + text


def test_half_a_character_of_the_prompt_that_nothing_completes_leaves_nothing_in_the_answer():
    detokeniser = Detokeniser(BYTES, context=BYTES("B😀")["input_ids"][:-1])
    assert [detokeniser.push(token) for token in BYTES("ab")["input_ids"]] == ["a", "b"]


def reported(tokenizer, text, top=1):
    """The choice that an answer of these tokens makes, each beside the others as alternatives."""
    answer, tokens = AnswerText(Detokeniser(tokenizer), StopStrings(())), tokenizer(text)["input_ids"]
    for token in tokens:
        answer.add(Chosen(token, -1.0, tuple((other, -2.0 - place) for place, other in enumerate(tokens[:top]))))
    answer.close()
    return Collected(*answer.take(), "length")


CHAT = ChatRequest(model="m", messages=[Message(role="user", content="a")], logprobs=True, top_logprobs=1)


@given(whole_text)
@example("né 😀 n𝔸")
def test_bytes_of_reported_tokens_make_up_the_text(text):
    for tokenizer in (BYTES, STRADDLING):
        found = ChatShape(CHAT).choice(0, reported(tokenizer, text))
        assert b"".join(bytes(entry["bytes"]) for entry in found["logprobs"]["content"]).decode() == text
        assert found["message"]["content"] == text


def test_bytes_that_a_vocabulary_names_by_number_are_reported():
    (*first, _) = ChatShape(CHAT).choice(0, reported(FALLBACK, "a😀b"))["logprobs"]["content"]
    assert [entry["bytes"] for entry in first] == [[97], [0xF0], [0x9F], [0x98], [0x80]]
    assert [entry["token"] for entry in first] == ["a", "\\xf0", "\\x9f", "\\x98", "\\x80"]


def test_a_replacement_character_in_a_vocabulary_is_a_text():
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "▁one": 1, "▁\N{REPLACEMENT CHARACTER}": 2}, unk_token="</s>"))
    tokenizer.decoder = decoders.Metaspace()
    detokeniser = Detokeniser(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"), context=[1])
    assert detokeniser.reading(2) == (" \N{REPLACEMENT CHARACTER}", " \N{REPLACEMENT CHARACTER}".encode())


def test_halves_of_characters_stay_apart_in_the_older_shape():
    request = CompletionRequest(model="m", prompt="a", logprobs=4)
    logprobs = CompletionShape(request).choice(0, reported(BYTES, "😀", top=4))["logprobs"]
    assert logprobs["tokens"] == ["\\xf0", "\\x9f", "\\x98", "\\x80"]
    assert all(set(top) == set(logprobs["tokens"]) for top in logprobs["top_logprobs"])


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
