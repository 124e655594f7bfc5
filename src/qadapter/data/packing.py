"""Batches without padding: all sequences in one row, and what several of them begin with in it only once.

Both answers of a pair share the prompt, and all prompts share what the chat template puts first. Everything that works
token by token runs on the row; attention runs on the sequences that the row stands for (`qadapter.modeling.packed`).
`PreferenceCollator` makes the padded rows that this equals.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qadapter.data.collator import require_columns
from qadapter.data.retained import retained_of
from qadapter.data.rows import TOKEN_COLUMNS

SIDES = TOKEN_COLUMNS[1:]


class PackedSequences(NamedTuple):
    """Sequences of M tokens together in a row of S tokens."""

    input_ids: Tensor  # (1, S)
    position_ids: Tensor  # (1, S)
    gather_indices: Tensor  # (M,), where in the row each token of the sequences stands, one sequence after the other
    restore_indices: Tensor  # (S,), where in the sequences each token of the row stands
    repeated_indices: Tensor  # (M - S,), tokens of the sequences that `restore_indices` leaves out: copies
    boundaries: Tensor  # (sequences + 1,) int32, where in the M tokens each sequence begins, and the last one's end
    sequence_lengths: list[int]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> "PackedSequences":
        """Each sequence shares its beginning with the earlier one that agrees with it the longest."""
        row: list[int] = []
        places: list[list[int]] = []
        for number, ids in enumerate(sequences):
            shared, leader = max(((_agreement(ids, sequences[i]), i) for i in range(number)), default=(0, 0))
            start = len(row) - shared
            row.extend(ids[shared:])
            places.append([*(places[leader][:shared] if shared else ()), *range(start + shared, start + len(ids))])
        gather = torch.tensor([place for sequence in places for place in sequence])
        restore, positions = torch.empty(2, len(row), dtype=torch.long)
        everywhere = torch.arange(len(gather))
        restore[gather] = everywhere  # what is shared is read off any of its sequences: they agree
        repeated = everywhere[restore[gather] != everywhere]
        positions[gather] = torch.tensor([position for sequence in places for position in range(len(sequence))])
        lengths = [len(sequence) for sequence in sequences]
        boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return cls(torch.tensor([row]), positions.unsqueeze(0), gather, restore, repeated, boundaries, lengths)


def _agreement(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two sequences have in common at the beginning."""
    for place, (token, other) in enumerate(zip(ids, others, strict=False)):
        if token != other:
            return place
    return min(len(ids), len(others))


@dataclass(frozen=True)
class PackedCollator:
    """Packs P tokenised pairs into one row.

    The sequences are all prompts with their chosen answers, then all with their rejected ones. With N response tokens,
    the longest response C, gives the fields of `PackedSequences` and
        state_indices, target_ids: (N,) long, each response token and where in the row the state before it stands.
        completion_mask: (2P, C) bool, which of the columns each response has.
        retained: which of the P are texts (`qadapter.data.retained`); only where some are.
    """

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        require_columns(pairs)
        sides = [(pair["prompt_ids"], pair[side]) for side in SIDES for pair in pairs]
        packed = PackedSequences.of([[*prompt, *answer] for prompt, answer in sides])
        places = packed.gather_indices.split(packed.sequence_lengths)
        lengths = torch.tensor([len(answer) for _, answer in sides])
        return packed._asdict() | {
            "state_indices": torch.cat([s[len(p) - 1 : -1] for s, (p, _) in zip(places, sides, strict=True)]),
            "target_ids": torch.tensor([token for _, answer in sides for token in answer], dtype=torch.long),
            "completion_mask": torch.arange(int(lengths.max())) < lengths.unsqueeze(-1),
            **retained_of(pairs),
        }
