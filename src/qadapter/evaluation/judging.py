"""Win rates of answers against the base's."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qadapter.evaluation.judges import Judge, Verdict, judge_all, win_rate
from qadapter.evaluation.judges.endpoint import NOT_ASKED
from qadapter.evaluation.progress import Advance
from qadapter.evaluation.texts import Prompt
from qadapter.generation import Answer

# What differs between reasons of one kind: numbers, and what an endpoint replied. Addresses are nobody's business.
PARTICULARS = re.compile(r"\d+|'.*'|\".*\"")
ADDRESS = re.compile(r"\b\w+://\S+")
WINNERS = {"a": "policy", "b": "base", "tie": "tie", None: None}


def ask(
    judge: Judge,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    base: Sequence[Answer],
    known: Sequence[Verdict],
    advance: Advance,
) -> list[Verdict]:
    """The verdicts on `answers` against the base's: those known already, one a prompt or none, and else the judge's."""
    verdicts = list(known) or [Verdict(None, "")] * len(prompts)
    missing = [index for index, verdict in enumerate(verdicts) if verdict.winner is None]
    advance(len(verdicts) - len(missing))
    contents = [prompts[index].content for index in missing]
    asked = judge_all(judge, contents, [answers[i] for i in missing], [base[i] for i in missing], advance)
    for index, verdict in zip(missing, asked, strict=True):
        verdicts[index] = verdict
    return verdicts


def judged(
    verdicts: Sequence[Verdict], prompts: Sequence[Prompt], answers: Sequence[Answer], base: Sequence[Answer]
) -> dict[str, Any]:
    """Win rate of `answers` against the base's, with each verdict; a missing verdict is no win and no loss."""
    return {
        **win_rate(verdicts)._asdict(),
        "verdicts": [
            {
                "prompt": prompt.text,
                "winner": WINNERS[verdict.winner],
                "reason": verdict.reason,
                "policy": answer.text,
                "base": other.text,
                "policy_finished": answer.finished,
                "base_finished": other.finished,
            }
            for prompt, answer, other, verdict in zip(prompts, answers, base, verdicts, strict=True)
        ],
    }


def missing_reason(judged: Mapping[str, Any]) -> tuple[str, int] | None:
    """Why verdicts are missing, most often, and how often; None where none is missing.

    Reasons of one kind count together, the first of them stands for all. That a judge was given up is no reason.
    """
    reasons = [verdict["reason"] for verdict in judged["verdicts"] if verdict["winner"] is None]
    told = [reason for reason in reasons if not reason.startswith(NOT_ASKED)] or reasons
    kinds = [PARTICULARS.sub("", reason) for reason in told]
    if not kinds:
        return None
    kind, count = Counter(kinds).most_common(1)[0]
    return ADDRESS.sub("(address)", told[kinds.index(kind)]), count
