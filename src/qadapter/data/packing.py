"""Batches of preference pairs without padding: all of them in one row, each pair's prompt once.

The row is [prompt, chosen, rejected, next prompt, ...]; both answers continue at the position after their prompt.
Everything that works token by token runs on this row. Attention runs on the sequences that the row stands for, prompt
and answer each (`qadapter.modeling.packed`). `PreferenceCollator` makes the padded rows that this equals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qadapter.data.collator import require_columns

SIDES = ("chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class PackedCollator:
    """Packs P tokenised pairs into one row of S tokens.

    The 2P sequences, all chosen then all rejected, have M tokens (prompts counted twice) and N response tokens, the
    longest response C. Gives
        input_ids, position_ids: (1, S) long.
        gather_indices: (M,) long, where in the row each token of the sequences stands.
        restore_indices: (S,) long, where in the sequences each token of the row stands.
        sequence_lengths: 2P ints.
        state_indices, target_ids: (N,) long, each response token and where in the row the state before it stands.
        completion_mask: (2P, C) bool, which of the columns each response has.
    """

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        require_columns(pairs)
        sequences, responses = _places(pairs)
        ids = [token for pair in pairs for part in ("prompt_ids", *SIDES) for token in pair[part]]
        gather = torch.tensor([place for sequence in sequences for place in sequence])  # (M,)
        restore = torch.empty(len(ids), dtype=torch.long)
        restore[gather] = torch.arange(len(gather))  # a prompt is read off either of its sequences: they agree there
        positions = torch.empty(len(ids), dtype=torch.long)
        positions[gather] = torch.tensor([position for sequence in sequences for position in range(len(sequence))])
        lengths = torch.tensor([len(response) for response in responses])
        states = [
            place
            for sequence, response in zip(sequences, responses, strict=True)
            for place in sequence[len(sequence) - len(response) - 1 : -1]
        ]
        return {
            "input_ids": torch.tensor(ids).unsqueeze(0),
            "position_ids": positions.unsqueeze(0),
            "gather_indices": gather,
            "restore_indices": restore,
            "sequence_lengths": [len(sequence) for sequence in sequences],
            "state_indices": torch.tensor(states),
            "target_ids": torch.tensor([ids[place] for response in responses for place in response]),
            "completion_mask": torch.arange(int(lengths.max())) < lengths.unsqueeze(-1),
        }


def _places(pairs: Sequence[Mapping[str, Any]]) -> tuple[list[list[int]], list[range]]:
    """Where in the row the tokens of each sequence, and of its response alone, stand: chosen, then rejected."""
    sequences: dict[str, list[list[int]]] = {side: [] for side in SIDES}
    responses: dict[str, list[range]] = {side: [] for side in SIDES}
    end = 0
    for pair in pairs:
        prompt = range(end, end + len(pair["prompt_ids"]))
        end = prompt.stop
        for side in SIDES:
            response = range(end, end + len(pair[side]))
            end = response.stop
            sequences[side].append([*prompt, *response])
            responses[side].append(response)
    chosen, rejected = SIDES
    return sequences[chosen] + sequences[rejected], responses[chosen] + responses[rejected]
