"""Judges that work offline: how far an answer has the wanted style, 0 to 1, learned from prompts of their own."""

import json
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

from benchmarks.experiments.pools import Pair, text_of
from benchmarks.experiments.reward_model import RewardModel
from qadapter.evaluation.judges.rules import make_rule_judge
from qadapter.generation import Answer


class Judge(Protocol):
    """Scores answers; `name` goes into the results."""

    name: str

    def scores(self, prompts: Sequence[Any], answers: Sequence[Answer]) -> list[float]:
        """How good each answer is, from 0 to 1."""
        ...


class StyleJudge:
    """Logistic regression on TF-IDF of words and pairs of words: chosen against rejected answers of the judge's pairs.

    Answers are cut when it is fitted and when it is asked, to about what a sample holds.

    Args:
        words: pieces between blanks, where line breaks are pieces, and so are empty ones: often fewer words.
    """

    def __init__(self, pairs: Sequence[Pair], words: int) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        self.words = words
        self.name = f"style classifier, {len(pairs)} pairs, first {words} words"
        texts = dict.fromkeys((self.cut(text_of(pair["chosen"])), 1) for pair in pairs)
        texts |= dict.fromkeys((self.cut(text_of(pair["rejected"])), 0) for pair in pairs)
        # Punctuation counts: exclamation marks and line breaks are style.
        vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=r"\w+|[^\w\s]|\n")
        self.model = make_pipeline(vectors, LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000))
        self.model.fit([text for text, _ in texts], [label for _, label in texts])

    def cut(self, text: str) -> str:
        """The first pieces of a text, lines kept. Results hang on it: other pieces would be another judge."""
        return " ".join(text.replace("\n", " \n ").split(" ")[: self.words])

    def scores(self, prompts: Sequence[Any], answers: Sequence[Answer]) -> list[float]:
        """P(chosen) of each answer; the prompts do not matter."""
        return self.model.predict_proba([self.cut(answer.text) for answer in answers])[:, 1].tolist()


class RewardJudge:
    """A reward model trained on the judge's pairs; σ of its score."""

    def __init__(self, model: RewardModel, tokenizer: Any, pairs: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.name = f"reward model, {pairs} pairs"

    def scores(self, prompts: Sequence[Any], answers: Sequence[Answer]) -> list[float]:
        """σ(score) of each answer to its prompt."""
        return [1 / (1 + math.exp(-s)) for s in self.model.score_answers(self.tokenizer, prompts, answers)]


class RuleJudge:
    """An exact rule of the package: 1 where an answer satisfies it."""

    def __init__(self, rule: str) -> None:
        self.name = f"rule {rule}"
        self.satisfied = make_rule_judge(rule).satisfied

    def scores(self, prompts: Sequence[Any], answers: Sequence[Answer]) -> list[float]:
        """0 or 1 an answer."""
        return [float(self.satisfied(answer)) for answer in answers]


class RightAnswerJudge:
    """1 where an answer of at most so many words holds the right one: a short one that says nothing is worth nothing.

    Args:
        pairs: all of the setting's, whose chosen answers are the right ones.
    """

    def __init__(self, pairs: Sequence[Pair], words: int) -> None:
        self.words = words
        self.name = f"right in at most {words} words"
        self.right = {json.dumps(pair["prompt"]): _plain_words(text_of(pair["chosen"])) for pair in pairs}

    def scores(self, prompts: Sequence[Any], answers: Sequence[Answer]) -> list[float]:
        """0 or 1 an answer."""
        return [float(self._right(prompt, answer)) for prompt, answer in zip(prompts, answers, strict=True)]

    def _right(self, prompt: Any, answer: Answer) -> bool:
        said, right = _plain_words(answer.text), self.right[json.dumps(prompt)]
        places = range(len(said) - len(right) + 1)
        return len(answer.text.split()) <= self.words and any(
            said[place : place + len(right)] == right for place in places
        )


def _plain_words(text: str) -> list[str]:
    """Words in small letters, without punctuation and a plural's s."""
    return [word.removesuffix("s") for word in re.findall(r"\w+", text.lower())]


def held_out_accuracy(judge: Judge, pairs: Sequence[Pair]) -> float:
    """Share of held-out pairs whose chosen answer scores higher; ties count half."""
    prompts = [pair["prompt"] for pair in pairs]
    chosen, rejected = (
        judge.scores(prompts, [Answer(text_of(pair[side]), True) for pair in pairs]) for side in ("chosen", "rejected")
    )
    return sum((a > b) + (a == b) / 2 for a, b in zip(chosen, rejected, strict=True)) / len(pairs)


def equal_length_wins(
    judge: Judge, prompts: Sequence[Any], answers: Sequence[Answer], base: Sequence[Answer]
) -> list[float]:
    """1 where the answer scores higher than the base's, both cut to the words of the shorter one; ½ for a tie."""
    cut = [_cut_alike(one, other) for one, other in zip(answers, base, strict=True)]
    scores = judge.scores(prompts, [one for one, _ in cut])
    others = judge.scores(prompts, [other for _, other in cut])
    return [(a > b) + (a == b) / 2 for a, b in zip(scores, others, strict=True)]


def _cut_alike(one: Answer, other: Answer) -> tuple[Answer, Answer]:
    # Where each word ends: the white space between words is style, and stays.
    ends, others = ([0, *(word.end() for word in re.finditer(r"\S+", answer.text))] for answer in (one, other))
    words = min(len(ends), len(others)) - 1
    return Answer(one.text[: ends[words]], True), Answer(other.text[: others[words]], True)


def repetition(text: str) -> float:
    """Share of a text's sequences of four words that occurred before in it: near 1 where a policy babbles."""
    words = text.split()
    grams = [tuple(words[index : index + 4]) for index in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def quiet_sklearn() -> None:
    """scikit-learn's solver warns of convergence on tiny data; the held-out accuracy shows what it is worth."""
    warnings.filterwarnings("ignore", module="sklearn")
