"""A batch in parts that each fit in memory: the size of a step is in pairs, that of what runs at once in tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qadapter.data.packing import SIDES
from qadapter.errors import ConfigError


@dataclass(frozen=True)
class MicroBatchCollator:
    """Splits a batch into {"micro_batches": parts of at most `tokens` tokens}, pairs of similar length together.

    Each part is what `collator` makes of its pairs, and has their `share` of the batch, of which the sum is 1, and
    their `places` in it. A pair that is larger alone is a part of its own.

    Args:
        packed: whether `collator` packs (see `tokens_of`).
    """

    collator: Any
    tokens: int
    packed: bool

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"micro_batch_tokens = {self.tokens}: must be at least 1.")

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "micro_batches": [
                self.collator([pairs[index] for index in part]) | {"share": len(part) / len(pairs), "places": part}
                for part in self.parts(pairs)
            ]
        }

    def parts(self, pairs: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Indices of the pairs of each part, the longest first."""
        parts: list[list[int]] = []
        for index in sorted(range(len(pairs)), key=lambda index: -_longest(pairs[index])):
            grown = [*parts[-1], index] if parts else []
            if grown and tokens_of([pairs[i] for i in grown], self.packed) <= self.tokens:
                parts[-1] = grown
            else:
                parts.append([index])
        return parts


def tokens_of(pairs: Sequence[Mapping[str, Any]], packed: bool) -> int:
    """Tokens that the pairs take together: without padding and with each prompt once if packed, else in padded rows."""
    if packed:
        return sum(len(pair["prompt_ids"]) + sum(len(pair[side]) for side in SIDES) for pair in pairs)
    return 2 * len(pairs) * max(_longest(pair) for pair in pairs)


def _longest(pair: Mapping[str, Any]) -> int:
    return len(pair["prompt_ids"]) + max(len(pair[side]) for side in SIDES)
