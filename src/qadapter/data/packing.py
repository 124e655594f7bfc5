"""Batches of preference pairs without padding to speak of: a pair's prompt stands once, and several pairs share a row.

A row is [prompt, chosen, rejected, next prompt, ...]. Both answers continue at the position after their prompt, and a
token attends to its own pair's prompt and its own answer only, so every token sees what it would see in a row of its
own (`qadapter.modeling.packed` makes the mask). `PreferenceCollator` makes the padded rows that this equals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qadapter.data.collator import require_columns

PADDING = -1
SIDES = ("chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class PackedCollator:
    """Packs P tokenised pairs into as many rows as make the cheapest batch.

    Gives, for R rows of T tokens, N response tokens in all and C in the longest response:
        input_ids, position_ids, segment_ids: (R, T) long; a segment is 3 · (pair's number) + 0 prompt, 1 chosen,
            2 rejected; -1 is padding.
        state_indices, target_ids: (N,) long, each response token and the place of the state before it among R·T; the
            rows' order is that of `PreferenceCollator`: all chosen responses, then all rejected ones.
        completion_mask: (2P, C) bool, which of the columns each response has.

    Args:
        pad_token_id: fills the rows' ends.
        attention_cost: row length at which attention costs as much as the layers' matrices do; about six times the
            hidden size. Long rows waste less padding, short ones less attention.
    """

    pad_token_id: int
    attention_cost: int = 4096

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        require_columns(pairs)
        rows = cheapest_rows([sum(len(ids) for ids in _parts(pair)) for pair in pairs], self.attention_cost)
        width = max(sum(len(ids) for index in row for ids in _parts(pairs[index])) for row in rows)
        shape = (len(rows), width)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "position_ids": torch.zeros(shape, dtype=torch.long),
            "segment_ids": torch.full(shape, PADDING),
        }
        states: dict[tuple[int, int], torch.Tensor] = {}
        for row_number, row in enumerate(rows):
            end = 0
            for index in row:
                prompt = len(pairs[index]["prompt_ids"])
                last_of_prompt = row_number * width + end + prompt - 1
                for part, ids in enumerate(_parts(pairs[index])):
                    place = (row_number, slice(end, end + len(ids)))
                    first_position = prompt if part else 0
                    batch["input_ids"][place] = torch.tensor(ids)
                    batch["position_ids"][place] = torch.arange(first_position, first_position + len(ids))
                    batch["segment_ids"][place] = 3 * index + part
                    if part:
                        states[part, index] = torch.arange(-1, len(ids) - 1) + row_number * width + end
                        states[part, index][0] = last_of_prompt
                    end += len(ids)
        responses = [pair[side] for side in SIDES for pair in pairs]
        lengths = torch.tensor([len(ids) for ids in responses])
        return batch | {
            "state_indices": torch.cat([states[part, index] for part in (1, 2) for index in range(len(pairs))]),
            "target_ids": torch.cat([torch.tensor(ids) for ids in responses]),
            "completion_mask": torch.arange(int(lengths.max())) < lengths.unsqueeze(-1),
        }


def _parts(pair: Mapping[str, Any]) -> tuple[Sequence[int], ...]:
    return pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]


def cheapest_rows(lengths: Sequence[int], attention_cost: int) -> list[list[int]]:
    """The pairs' indices row by row: for each number of rows balanced as well as may be, the cheapest of them.

    A batch of R rows of T tokens costs R·T·(1 + T / attention_cost).
    """
    best: tuple[float, list[list[int]]] | None = None
    for count in range(1, len(lengths) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            shortest = loads.index(min(loads))
            rows[shortest].append(index)
            loads[shortest] += lengths[index]
        width = max(loads)
        cost = count * width * (1 + width / attention_cost)
        if best is None or cost < best[0]:
            best = (cost, rows)
    assert best is not None
    return best[1]
