"""From tokens to text, one at a time: whole characters, with the spaces that a decoder puts between tokens."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what tokenizers write for half a character
LONGEST_WAIT = 8  # tokens; a character has at most four bytes, so what still looks broken then is broken


class Reading(NamedTuple):
    """What a token reads like in its place, and its bytes there: of half a character, the text is the replacement's."""

    text: str
    raw: bytes


class Detokeniser:
    """Turns tokens into text one at a time; half characters wait for their other half, and are dropped without it.

    A window of the last tokens is decoded with and without the new one, because what a token reads like depends on
    those before it (spaces, characters of several tokens). The windows move as in text-generation-inference.

    Args:
        context: tokens before the first one, where the text goes on from them.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._start, self._sent = 0, len(self._ids)

    def push(self, token: int) -> str:
        """The text that `token` completes; empty for half a character or a special token."""
        self._ids.append(token)
        text = self._waiting()
        if not text and self._is_special(token):  # leaves nothing: a run of them must not make the window longer
            self._ids.pop()
        if not text or (text.endswith(REPLACEMENT) and len(self._ids) - self._sent < LONGEST_WAIT):
            return ""
        return self._sendable(text)

    def flush(self) -> str:
        """What still waits, less half a character at its end, when no more tokens follow."""
        return self._sendable(self._waiting())

    def reading(self, token: int) -> Reading:
        """What `token` would read like here, for reports, where special tokens are named.

        Half a character reads as the replacement character, but has bytes of its own: those of an answer's tokens,
        put together, are its text.
        """
        before = self._decoded(self._ids[self._start :])
        after = self._decoded([*self._ids[self._start :], token])
        added = after[len(before) :] if after.startswith(before) else ""
        if not added:
            added = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        raw = token_bytes(self._tokenizer.convert_ids_to_tokens(token)) if REPLACEMENT in added else None
        return Reading(added, added.encode() if raw is None else raw)

    def _is_special(self, token: int) -> bool:
        """Whether texts leave a token out; others that read like nothing alone (a space, say) count for the next."""
        return not self._decoded([token]) and bool(self._tokenizer.decode([token], skip_special_tokens=False))

    def _waiting(self) -> str:
        """The text of the tokens since the last that was sent."""
        sent = self._decoded(self._ids[self._start : self._sent])
        text = self._decoded(self._ids[self._start :])
        if not text.startswith(sent):  # half a character at the context's end has become a whole one
            sent = sent.rstrip(REPLACEMENT)
        return text[len(sent) :]

    def _sendable(self, text: str) -> str:
        """The waiting text as it may be sent; nothing waits any more."""
        tokens, self._start, self._sent = self._ids[self._sent :], self._sent, len(self._ids)
        # A replacement character that the model has written reads like half a character, but has tokens of its own.
        half = text.endswith(REPLACEMENT) and self._tokenizer.encode(text, add_special_tokens=False) != tokens
        return text.rstrip(REPLACEMENT) if half else text

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def detokenised(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of an answer, less half a character at its end: what `Detokeniser` sends in all."""
    detokeniser = Detokeniser(tokenizer)
    return "".join(map(detokeniser.push, ids)) + detokeniser.flush()


def token_bytes(piece: str) -> bytes | None:
    """The bytes of a token with half a character, from its name in the vocabulary; None for a name that is a text.

    Vocabularies name a single byte `<0xF0>` (byte fallback, as SentencePiece writes it), or write bytes as the
    printable characters of GPT-2's alphabet.
    """
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    if all(character in BYTE_OF for character in piece):
        return bytes(BYTE_OF[character] for character in piece)
    return None


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes, in their order, for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _bytes_of_characters()
