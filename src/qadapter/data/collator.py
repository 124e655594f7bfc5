"""Batches of preference pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from qadapter.data.retained import retained_of
from qadapter.data.rows import TOKEN_COLUMNS
from qadapter.errors import ConfigError, DataError


@dataclass(frozen=True)
class PreferenceCollator:
    """Pads P tokenised pairs to a batch of B = 2P rows: rows [0, P) chosen, [P, 2P) rejected, in one order.

    Gives {"input_ids": (B, T) long, "attention_mask": (B, T) long, "completion_mask": (B, T) bool};
    completion_mask marks the answer's own tokens, its end-of-turn token included. Where some of the pairs are texts
    (`qadapter.data.retained`), "retained" says which.
    """

    pad_token_id: int
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pad_token_id, int):
            raise ConfigError(f"pad_token_id is {self.pad_token_id!r}; set tokenizer.pad_token (the eos_token will do)")
        if self.padding_side not in ("right", "left"):
            raise ConfigError(f"padding_side is {self.padding_side!r}; it has to be 'right' or 'left'")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ConfigError(f"pad_to_multiple_of is {self.pad_to_multiple_of}; it has to be at least 1, or None")

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        require_columns(pairs)
        sides = [(pair["prompt_ids"], pair[side]) for side in TOKEN_COLUMNS[1:] for pair in pairs]
        width = self.width(max(len(prompt) + len(answer) for prompt, answer in sides))
        input_ids = torch.full((len(sides), width), self.pad_token_id)  # (B, T)
        attention_mask = torch.zeros_like(input_ids)
        completion_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(sides):
            length = len(prompt) + len(answer)
            start = 0 if self.padding_side == "right" else width - length
            input_ids[row, start : start + length] = torch.tensor([*prompt, *answer])
            attention_mask[row, start : start + length] = 1
            completion_mask[row, start + len(prompt) : start + length] = True
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}
        return batch | retained_of(pairs)

    def width(self, longest: int) -> int:
        """The longest row, rounded up to a multiple."""
        step = self.pad_to_multiple_of or 1
        return -(-longest // step) * step


def require_columns(pairs: Sequence[Mapping[str, Any]]) -> None:
    if not pairs:
        raise DataError("a batch needs at least one pair, got none")
    missing = [column for column in TOKEN_COLUMNS if column not in pairs[0]]
    if missing:
        found = ", ".join(pairs[0])
        raise DataError(f"the rows lack {', '.join(missing)} (found {found}); run tokenise_preferences on the dataset")
