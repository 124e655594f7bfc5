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
        self.taken: list[int] = []

    @property
    def tokens(self) -> int:
        """How many it has."""
        return len(self.taken)

    def echo(self, tokens: Sequence[Chosen], complete: bool) -> Delta:
        """Take the prompt's next tokens in; what may be sent. An answer of no token ends with a complete prompt."""
        reported = self.sampler.rules.top_logprobs is not None
        for chosen in tokens:
            self.text.echo(chosen, reported)
        reason = "length" if complete and not self.max_tokens else None
        if reason:
            self.text.close()
        return Delta(self.index, *self.text.take(), 0, reason)

    def take(self, chosen: Chosen) -> Delta:
        """Take the next token in; what may be sent since the last time."""
        self.taken.append(chosen.token)
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
        model: its served name, without a strength.
        prompt_ids: what the answers continue.
        dial: the policy they come from.
        answers: one a choice.
        deliver: called in the engine's thread with every event.
        condition: the share of the strength at the token that follows the prompt's ids and the answer's so far; None
            leaves it whole.
        echo: whether the answers begin with the prompt.
        cancelled: set, by any thread, when nobody waits for the answers any more.
    """

    model: str
    prompt_ids: Sequence[int]
    dial: Dial
    answers: Sequence[Answer]
    deliver: Callable[[Event], None]
    condition: Callable[[Sequence[int], Sequence[int]], float] | None = None
    echo: bool = False
    cancelled: bool = False

    def share(self, answer_ids: Sequence[int] = ()) -> float:
        """The share of the strength at the token that follows an answer so far."""
        return 1.0 if self.condition is None else self.condition(self.prompt_ids, answer_ids)

    @property
    def top_logprobs(self) -> int | None:
        """How many alternatives to report with each token; None reports no log-probabilities."""
        return self.answers[0].sampler.rules.top_logprobs

    @property
    def scored(self) -> bool:
        """Whether the prompt's tokens are reported with log-probabilities."""
        return self.echo and self.top_logprobs is not None
