"""Likelihoods of lm-eval's requests under many columns at once: a pass over each stream serves them all (drift.py)."""

from collections.abc import Sequence
from typing import Any

from qadapter.evaluation.columns import BASE, Column
from qadapter.evaluation.drift import Passage, TextDrift, measure_passages
from qadapter.evaluation.progress import Advance
from qadapter.modeling import QAdapterForCausalLM

# lm-eval's: (the texts, the context's ids, the continuation's ids).
Request = tuple[Any, list[int], list[int]]
Ids = tuple[int, ...]
# Log-probability of a continuation, and whether it is what greedy decoding writes.
Likelihood = tuple[float, bool]
# Passages measured at a time, which bounds the memory for their tokens.
SLICE = 256


class SharedLikelihoods:
    """Likelihoods of the base and of every column, each request measured once.

    Continuations that differ in their last token only (answers A to D, say) share what is read, as in lm-eval.
    """

    def __init__(self, model: QAdapterForCausalLM, columns: Sequence[Column]) -> None:
        self.model = model
        self.columns = [column for column in columns if column.name != BASE]
        self.known: dict[tuple[Ids, Ids], dict[str, Likelihood]] = {}

    def of(self, column: str, requests: Sequence[Request], max_length: int, advance: Advance) -> list[Likelihood]:
        """The likelihood of each request under a column, by name.

        Args:
            max_length: tokens that the model reads at most; longer contexts lose their beginning.
            advance: called with the number of requests done since the last call.
        """
        keys = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        wanted = dict.fromkeys(key for key in keys if key not in self.known)
        advance(len(keys) - len(wanted))
        groups: dict[Ids, list[tuple[Ids, Ids]]] = {}
        for context, continuation in wanted:
            groups.setdefault((context + continuation)[-(max_length + 1) : -1], []).append((context, continuation))
        ordered = sorted(groups, key=len, reverse=True)
        for start in range(0, len(ordered), SLICE):
            read = ordered[start : start + SLICE]
            passages = [_passage(ids, [continuation for _, continuation in groups[ids]]) for ids in read]
            for ids, drift in zip(read, measure_passages(self.model, passages, self.columns), strict=True):
                self._keep(groups[ids], drift)
                advance(len(groups[ids]))
        return [self.known[key][column] for key in keys]

    def _keep(self, keys: Sequence[tuple[Ids, Ids]], drift: TextDrift) -> None:
        measured = {name: (own.logps, own.greedy) for name, own in drift.columns.items()}
        measured[BASE] = drift.base.logps, drift.base.greedy
        start = 0
        for key in keys:
            tokens = slice(start, start + len(key[1]))
            start = tokens.stop
            self.known[key] = {
                name: (float(logps[tokens].double().sum()), bool(greedy[tokens].all()))
                for name, (logps, greedy) in measured.items()
            }


def _passage(ids: Ids, continuations: Sequence[Ids]) -> Passage:
    places = [place for tokens in continuations for place in range(len(ids) - len(tokens), len(ids))]
    steps = [step for tokens in continuations for step in range(len(tokens))]
    return Passage(ids, places, [token for tokens in continuations for token in tokens], steps)
