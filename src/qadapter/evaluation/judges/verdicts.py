"""What judges say of two answers, and the rates that follow from it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from qadapter.errors import DataError
from qadapter.evaluation.intervals import Interval, wilson
from qadapter.evaluation.progress import Advance
from qadapter.generation import Answer, Message

Winner = Literal["a", "b", "tie"]
Prompt = str | Sequence[Message]


class Verdict(NamedTuple):
    """Which answer is better, and why.

    Args:
        winner: "a", "b" or "tie"; None if there is no verdict, which is never counted as a win.
        reason: one line for people, who need not know which answer is a: it speaks of the winner, or of places.
        flipped: whether the judge decided otherwise when it saw the answers in the other order; None for judges that
            see no order, and without a verdict.
    """

    winner: Winner | None
    reason: str
    flipped: bool | None = None


class Comparison(NamedTuple):
    """One question for a judge: two answers to the same prompt."""

    prompt: Prompt
    a: Answer
    b: Answer


class Judge(Protocol):
    """Anything that compares answers; give `judge_all` your own, or one from `make_judge`."""

    def judge(self, comparisons: Sequence[Comparison], progress: Advance) -> list[Verdict]:
        """One verdict a comparison, in order; `progress` is told how many were judged since the last call."""
        ...


class WinRate(NamedTuple):
    """How often answer a was the better one.

    Args:
        rate: (wins + ties / 2) / (wins + losses + ties) with its Wilson interval; missing verdicts are left out.
        order_bias: share of the comparisons seen in both orders whose verdict changed with the order; None for judges
            that see no order.
    """

    wins: int
    losses: int
    ties: int
    missing: int
    rate: Interval
    order_bias: Interval | None


def judge_all(
    judge: Judge,
    prompts: Sequence[Prompt],
    answers_a: Sequence[str | Answer],
    answers_b: Sequence[str | Answer],
    progress: Advance | None = None,
) -> list[Verdict]:
    """One verdict a prompt, in order.

    Args:
        answers_a, answers_b: texts, or what `generate_texts` returned; a plain text counts as ended by the model.
        progress: called with the number of prompts judged since the last call.

    Raises:
        DataError: numbers of prompts and answers that differ.
    """
    if not len(prompts) == len(answers_a) == len(answers_b):
        raise DataError(
            f"{len(prompts)} prompts, {len(answers_a)} answers a and {len(answers_b)} answers b: one of each is needed."
        )
    comparisons = [
        Comparison(prompt, _answer(a), _answer(b)) for prompt, a, b in zip(prompts, answers_a, answers_b, strict=True)
    ]
    return judge.judge(comparisons, progress or (lambda done: None))


def _answer(answer: str | Answer) -> Answer:
    return answer if isinstance(answer, Answer) else Answer(answer, finished=True)


def win_rate(verdicts: Sequence[Verdict]) -> WinRate:
    """The win rate of the answers a."""
    winners = [verdict.winner for verdict in verdicts]
    wins, losses, ties, missing = (winners.count(kind) for kind in ("a", "b", "tie", None))
    flips = [verdict.flipped for verdict in verdicts if verdict.flipped is not None]
    return WinRate(
        wins,
        losses,
        ties,
        missing,
        wilson(wins + ties / 2, wins + losses + ties),
        wilson(sum(flips), len(flips)) if flips else None,
    )


def of_both_orders(a_first: Verdict, b_first: Verdict) -> Verdict:
    """One verdict from two looks, each already in terms of a and b: an answer wins if it wins in both orders.

    Looks that disagree make a tie that says so; a look without verdict leaves the comparison without one.
    """
    if a_first.winner is None or b_first.winner is None:
        return a_first if a_first.winner is None else b_first
    if a_first.winner == b_first.winner:
        return Verdict(a_first.winner, a_first.reason, flipped=False)
    first_look = {"a": "the first", "b": "the second", "tie": "neither"}
    second_look = {"b": "the first", "a": "the second", "tie": "neither"}
    one, other = first_look[a_first.winner], second_look[b_first.winner]
    return Verdict("tie", f"changes with the order: in one {one} answer wins, in the other {other}", True)
