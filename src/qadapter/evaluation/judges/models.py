"""Judges on this machine: reward models and pair rankers, both sequence classifiers with one score."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qadapter.data import RowError
from qadapter.data.encoding import render
from qadapter.data.messages import assistant, user
from qadapter.devices import default_device
from qadapter.errors import ConfigError
from qadapter.evaluation.judges.verdicts import Comparison, Prompt, Verdict, of_both_orders
from qadapter.evaluation.progress import Advance
from qadapter.generation import Answer
from qadapter.modeling.fingerprints import tokenizer_fingerprint, weight_fingerprint


class Unscored(Exception):
    """A text that the model cannot score; the message is the verdict's reason."""


@dataclass(frozen=True)
class Scorer:
    """A sequence classifier with one score, and its tokenizer. Texts go through one by one: no padding, no mates."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str | os.PathLike[str]) -> Scorer:
        """The scorer in a folder or on the hub, from safetensors only and without running code that comes with it.

        Raises:
            ConfigError: it cannot be loaded so, has more than one score, or is a language model without a trained head.
        """
        if not os.fspath(name):
            raise ConfigError("the judge names no model: use reward:MODEL or pair:MODEL.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"judge model {name} cannot be loaded: {error}") from error
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ConfigError(
                f"judge model {name} has no weights for {sorted(info['missing_keys'])}: "
                "its head would be random. Give a trained sequence classifier."
            )
        if model.config.num_labels != 1:
            raise ConfigError(f"judge model {name} has {model.config.num_labels} scores: a judge has one.")
        return cls(model.eval().to(default_device()), tokenizer)

    def fingerprint(self) -> list[Any]:
        """What its scores depend on: another model in the same folder has another one."""
        return [weight_fingerprint(self.model), tokenizer_fingerprint(self.tokenizer)]

    @torch.no_grad()
    def score(self, ids: Sequence[int]) -> float:
        """The score of one text.

        Raises:
            Unscored: a text longer than the model takes, or a score that is no number.
        """
        # RoBERTa counts two positions that texts cannot use; its tokenizer knows. T5 has no limit in its config.
        longest = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", len(ids)))
        if len(ids) > longest:
            raise Unscored(f"{len(ids)} tokens are more than the judge's {longest}")
        input_ids = torch.tensor([ids], device=self.model.device)
        score = float(self.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits.squeeze())
        if not math.isfinite(score):
            raise Unscored(f"the judge's score is {score}")
        return score


@dataclass(frozen=True)
class ModelJudge(ABC):
    """A judge by a scorer; what it makes of a comparison, a subclass says."""

    scorer: Scorer

    @classmethod
    def load(cls, name: str | os.PathLike[str]) -> Self:
        """The judge by a model; see `Scorer.load`."""
        return cls(Scorer.load(name))

    def judge(self, comparisons: Sequence[Comparison], progress: Advance) -> list[Verdict]:
        """As of `Judge`."""
        verdicts = []
        for comparison in comparisons:
            try:
                verdicts.append(self._verdict(comparison))
            except Unscored as error:
                verdicts.append(Verdict(None, str(error)))
            progress(1)
        return verdicts

    @abstractmethod
    def _verdict(self, comparison: Comparison) -> Verdict:
        """The verdict on one comparison; raises Unscored where the model gives no number."""


class RewardJudge(ModelJudge):
    """A reward model: each answer is scored by itself, so that no order can matter."""

    def _verdict(self, comparison: Comparison) -> Verdict:
        score_a, score_b = (self._score(comparison.prompt, answer) for answer in (comparison.a, comparison.b))
        high, low = max(score_a, score_b), min(score_a, score_b)
        return _by_sign(score_a - score_b, f"the better one scores {high:.4g}, the other {low:.4g}")

    def _score(self, prompt: Prompt, answer: Answer) -> float:
        """Of the chat that ends with the answer; without a chat template, of the pair (prompt, answer)."""
        tokenizer = self.scorer.tokenizer
        if tokenizer.chat_template is None:
            return self.scorer.score(tokenizer(readable(prompt), answer.text)["input_ids"])
        messages = [*(user(prompt) if isinstance(prompt, str) else prompt), *assistant(answer.text)]
        try:
            ids = render(tokenizer, messages)
        except RowError as error:
            raise Unscored(str(error)) from error
        return self.scorer.score(ids)


class PairJudge(ModelJudge):
    """A ranker that reads prompt and both answers at once, in PairRM's format; both orders are asked."""

    def _verdict(self, comparison: Comparison) -> Verdict:
        prompt, a, b = comparison
        a_first, b_first = self._score(prompt, a, b), self._score(prompt, b, a)
        reason = f"ahead by {abs(a_first):.4g} in one order, by {abs(b_first):.4g} in the other"
        return of_both_orders(_by_sign(a_first, reason), _by_sign(-b_first, reason))

    def _score(self, prompt: Prompt, first: Answer, second: Answer) -> float:
        """Positive if the first is better."""
        text = f"<|source|>{readable(prompt)}<|candidate1|>{first.text}<|candidate2|>{second.text}"
        return self.scorer.score(self.scorer.tokenizer(text)["input_ids"])


def _by_sign(difference: float, reason: str) -> Verdict:
    return Verdict("tie" if difference == 0 else "a" if difference > 0 else "b", reason)


def readable(prompt: Prompt) -> str:
    """A prompt for readers without chat template; messages are labelled with their roles if there are several."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
