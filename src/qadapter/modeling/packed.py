"""Attention masks for packed pairs: which token may look at which, and whether a model can be told so."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# The interfaces that take a mask of any shape.
MASKED_ATTENTION = ("sdpa", "eager")
MASKED_LAYERS = ("full_attention", "sliding_attention")


def attended(segment_ids: Tensor, position_ids: Tensor, window: int | None = None) -> Tensor:
    """Whether token i of a row may attend to token j, (R, 1, T, T): never beyond its own pair and answer.

    A segment is 3 · pair + 0 for a prompt, 1 or 2 for its answers, -1 for padding, which attends to padding only (a
    token that attends to nothing would be NaN). Positions count within prompt + answer, so that `window` reaches as
    far back as it would in a row of their own.
    """
    pair, part = segment_ids.div(3, rounding_mode="floor"), segment_ids % 3
    same_pair = pair.unsqueeze(-1) == pair.unsqueeze(-2)
    own_text = (part.unsqueeze(-2) == 0) | (part.unsqueeze(-2) == part.unsqueeze(-1))
    distance = position_ids.unsqueeze(-1) - position_ids.unsqueeze(-2)
    allowed = same_pair & own_text & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    return allowed.unsqueeze(1)


def packed_masks(model: PreTrainedModel, segment_ids: Tensor, position_ids: Tensor) -> Tensor | dict[str, Tensor]:
    """The `attention_mask` argument of the model's decoder: a mask, or one for each kind of its layers."""
    config: Any = model.config.get_text_config(decoder=True)

    def mask(window: int | None) -> Tensor:
        allowed = attended(segment_ids, position_ids, window)
        if config._attn_implementation != "eager":
            return allowed
        lowest = torch.finfo(model.dtype).min
        return torch.zeros_like(allowed, dtype=model.dtype).masked_fill(~allowed, lowest)

    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return mask(window)
    return {kind: mask(window if kind == "sliding_attention" else None) for kind in dict.fromkeys(kinds)}


@torch.no_grad()
def can_pack(model: PreTrainedModel) -> bool:
    """Whether the model gives packed answers what it gives them in rows of their own.

    Tried on three tokens: a prompt of one and two answers of one. No where positions come from the mask (ALiBi) or
    where layers mix tokens otherwise than by attention.
    """
    config: Any = model.config.get_text_config(decoder=True)
    if config._attn_implementation not in MASKED_ATTENTION:
        return False
    if any(kind not in MASKED_LAYERS for kind in getattr(config, "layer_types", None) or ()):
        return False
    parameter = next(model.parameters())
    if parameter.device.type == "meta" or parameter.numel() == 0:  # sharded: no weights to try it with
        return True
    decoder, device = model.get_decoder(), parameter.device
    prompt, chosen, rejected = 1, 2, 0
    segments, positions = torch.tensor([[0, 1, 2]], device=device), torch.tensor([[0, 1, 1]], device=device)
    alone = torch.tensor([[prompt, chosen], [prompt, rejected]], device=device)
    packed = torch.tensor([[prompt, chosen, rejected]], device=device)
    try:
        masks = packed_masks(model, segments, positions)
        ours = decoder(input_ids=packed, attention_mask=masks, position_ids=positions, use_cache=False)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        return False
    rows = decoder(input_ids=alone, use_cache=False).last_hidden_state
    expected = torch.stack([rows[0, 0], rows[0, 1], rows[1, 1]]).float()
    error = (ours.last_hidden_state[0].float() - expected).abs().mean() / expected.abs().mean()
    return bool(error < (1e-4 if model.dtype in (torch.float32, torch.float64) else 2e-2))
