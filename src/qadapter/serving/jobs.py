"""What the engine works on, and what it reports back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qadapter.serving.answer_text import AnswerText, TokenReport
from qadapter.serving.api_errors import ApiError
from qadapter.serving.catalogue import Dial
from qadapter.serving.sampling import Chosen, Sampler


@dataclass(frozen=True)
class Delta:
    """What one answer gained: text and reports that may be sent, tokens, and why it ended if it did."""

    index: int
    text: str
    reports: Sequence[TokenReport]
    tokens: int
    finish_reason: str | None


class Failure(NamedTuple):
    """The end of a job without an answer."""

    error: ApiError


Event = Delta | Failure


class Answer:
    """One choice of a prompt while it is generated.

    Args:
        index: of the choice in the response.
        sampler: draws its tokens.
        text: collects its text.
        ends: tokens that end an answer; they are counted but have no text.
        max_tokens: length at which it is cut.
    """

    def __init__(self, index: int, sampler: Sampler, text: AnswerText, ends: frozenset[int], max_tokens: int) -> None:
        self.index, self.sampler, self.text = index, sampler, text
        self.ends, self.max_tokens = ends, max_tokens
        self.tokens = 0
        self.last_token = -1

    def take(self, chosen: Chosen) -> Delta:
        """Take the next token in; what may be sent since the last time."""
        self.tokens += 1
        self.last_token = chosen.token
        reason = None
        if chosen.token in self.ends or self.text.add(chosen):
            reason = "stop"
        elif self.tokens >= self.max_tokens:
            reason = "length"
        if (reason == "length" or chosen.token in self.ends) and self.text.close():
            reason = "stop"
        return Delta(self.index, *self.text.take(), 1, reason)


@dataclass(eq=False)
class Job:
    """One prompt and the answers wanted for it.

    Args:
        model: its served name.
        prompt_ids: what the answers continue.
        dial: the policy they come from.
        answers: one a choice.
        deliver: called in the engine's thread with every event.
        cancelled: set, by any thread, when nobody waits for the answers any more.
    """

    model: str
    prompt_ids: Sequence[int]
    dial: Dial
    answers: Sequence[Answer]
    deliver: Callable[[Event], None]
    cancelled: bool = False
