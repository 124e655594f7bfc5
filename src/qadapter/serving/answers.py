"""OpenAI's shapes of answers, whole and in chunks."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qadapter import __version__
from qadapter.detokenising import REPLACEMENT, Reading
from qadapter.serving.answer_text import TokenReport
from qadapter.serving.jobs import Delta
from qadapter.serving.schema import ChatRequest, GenerationRequest

Json = dict[str, Any]


@dataclass
class Collected:
    """One choice, put together from its deltas."""

    text: str = ""
    reports: list[TokenReport] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Take a delta in."""
        self.text += delta.text
        self.reports.extend(delta.reports)
        self.finish_reason = delta.finish_reason


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Token counts; the token that ends an answer counts, prompts count once however many choices they have."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def response_shape(request: GenerationRequest) -> "ResponseShape":
    """The shape of the answers to `request`."""
    return ChatShape(request) if isinstance(request, ChatRequest) else CompletionShape(request)


class ResponseShape:
    """What all objects of one response have in common."""

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, request: GenerationRequest) -> None:
        self.wants_logprobs = request.logprob_count is not None
        self.wants_usage = request.stream_options.include_usage
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": f"qadapter-{__version__}",
        }

    def whole(self, choices: Mapping[int, Collected], counts: Json) -> Json:
        """A complete response."""
        shaped = [self.choice(index, choices[index]) for index in sorted(choices)]
        return {**self.head, "object": self.whole_object, "choices": shaped, "usage": counts}

    def chunk(self, choices: list[Json]) -> Json:
        """A piece of a stream."""
        empty_usage = {"usage": None} if self.wants_usage else {}
        return {**self.head, "object": self.chunk_object, "choices": choices, **empty_usage}

    def last_chunk(self, counts: Json) -> Json:
        """The piece of a stream that carries the usage."""
        return {**self.chunk([]), "usage": counts}

    def first_chunks(self, indices: Sequence[int]) -> list[Json]:
        """What comes before any text."""
        return []

    def choice(self, index: int, collected: Collected) -> Json:
        """A complete choice."""
        raise NotImplementedError

    def delta(self, delta: Delta) -> Json:
        """A choice's part of a chunk."""
        raise NotImplementedError


class ChatShape(ResponseShape):
    """chat.completion and its chunks."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def first_chunks(self, indices: Sequence[int]) -> list[Json]:
        role = {"role": "assistant", "content": ""}
        return [
            self.chunk([{"index": index, "delta": role, "logprobs": None, "finish_reason": None}]) for index in indices
        ]

    def choice(self, index: int, collected: Collected) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": collected.text, "refusal": None},
            "logprobs": self._logprobs(collected.reports),
            "finish_reason": collected.finish_reason,
        }

    def delta(self, delta: Delta) -> Json:
        return {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text or delta.reports else {},
            "logprobs": self._logprobs(delta.reports) if delta.reports else None,
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, reports: Sequence[TokenReport]) -> Json | None:
        if not self.wants_logprobs:
            return None
        content = [
            {
                **_token(report.reading, report.logprob),
                "top_logprobs": [_token(reading, logprob) for reading, logprob in report.top],
            }
            for report in reports
        ]
        return {"content": content, "refusal": None}


def _token(reading: Reading, logprob: float | None) -> Json:
    return {"token": _named(reading), "logprob": logprob, "bytes": list(reading.raw)}


def _named(reading: Reading) -> str:
    r"""A token's text; half a character as OpenAI writes it, `\xf0\x9f`, which tells such tokens apart."""
    if REPLACEMENT in reading.text and reading.text.encode() != reading.raw:
        return "".join(f"\\x{byte:02x}" for byte in reading.raw)
    return reading.text


def _likeliest(report: TokenReport) -> dict[str, float] | None:
    """Log-probabilities by token, the reported one's with them.

    Of tokens that read alike, the likeliest stays: it comes first in the report, so it is written last.
    """
    if report.logprob is None:
        return None
    found = [(report.reading, report.logprob), *reversed(report.top)]
    return {_named(reading): logprob for reading, logprob in found}


class CompletionShape(ResponseShape):
    """text_completion, whole and in chunks alike."""

    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, index: int, collected: Collected) -> Json:
        return {
            "index": index,
            "text": collected.text,
            "logprobs": self._logprobs(collected.reports),
            "finish_reason": collected.finish_reason,
        }

    def delta(self, delta: Delta) -> Json:
        return self.choice(delta.index, Collected(delta.text, list(delta.reports), delta.finish_reason))

    def _logprobs(self, reports: Sequence[TokenReport]) -> Json | None:
        if not self.wants_logprobs:
            return None
        return {
            "tokens": [_named(report.reading) for report in reports],
            "token_logprobs": [report.logprob for report in reports],
            "top_logprobs": [_likeliest(report) for report in reports],
            "text_offset": [report.offset for report in reports],
        }
