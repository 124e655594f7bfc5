"""Attention over packed rows: common beginnings stand once, attended as if each sequence had a row of its own.

The layers work on the row that `PackedSequences` makes; only attention must know that it stands for several sequences.
It gathers their queries, keys and values, runs each sequence alone, causal and without padding, and puts results back
in the row's order. It is one more of transformers' attention implementations. SDPA, sequence by sequence, is the slow
twin; on a GPU, in half precision, one kernel for sequences of any lengths runs them all (`varlen`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qadapter.data.packing import PackedSequences
from qadapter.modeling import varlen
from qadapter.modeling.trial_runs import UNFIT, can_run

PACKED_ATTENTION = "qadapter_packed"
# Kinds of layers whose tokens meet in attention only.
ATTENTION_LAYERS = ("full_attention", "sliding_attention")


class PackedRow(NamedTuple):
    """What attention must know of a packed row (see `PackedSequences`)."""

    gather: Tensor
    restore: Tensor
    repeated: Tensor
    boundaries: Tensor
    lengths: list[int]
    longest: int
    wide: bool


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: PackedRow | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention output (1, S, heads, D) of a packed row; without `packed` that of SDPA.

    With it, the last dimension of `attention_mask` is the window of the layer, 0 for none: what transformers hands
    each kind of layer as its mask is the one way to tell them apart that works for all architectures.
    """
    if packed is None or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = attention_mask.shape[-1]
    if varlen.fits(query, value, kwargs):
        rows = (states.transpose(1, 2).squeeze(0) for states in (query, key, value))  # (S, heads, D)
        q, k, v = (varlen.gather(states, packed.gather, packed.restore, packed.repeated) for states in rows)
        output = varlen.causal_attention(q, k, v, packed.boundaries, packed.longest, window, kwargs.get("scaling"))
        return varlen.restore(output, packed.restore).unsqueeze(0), None
    dtype = query.dtype
    if packed.wide:
        query, key, value = query.float(), key.float(), value.float()
    streams = [states.index_select(2, packed.gather).split(packed.lengths, dim=2) for states in (query, key, value)]
    outputs = [
        sdpa_attention_forward(module, *sequence, window_mask(sequence[0], window), **kwargs)[0]
        for sequence in zip(*streams, strict=True)
    ]
    return torch.cat(outputs, dim=1).index_select(1, packed.restore).to(dtype), None


def window_mask(query: Tensor, window: int) -> Tensor | None:
    """The mask (T, T) of a sequence longer than the window; None where plain causal attention is the same."""
    length = query.shape[2]
    if window == 0 or length <= window:
        return None
    places = torch.arange(length, device=query.device)
    distance = places.unsqueeze(-1) - places
    return (distance >= 0) & (distance < window)


def layer_windows(model: PreTrainedModel) -> Tensor | dict[str, Tensor]:
    """The decoder's `attention_mask` argument for packed rows: empty tensors whose last dimension is the window."""
    config: Any = model.config.get_text_config(decoder=True)
    windows = {"full_attention": 0, "sliding_attention": getattr(config, "sliding_window", None) or 0}
    kinds = getattr(config, "layer_types", None)
    masks = {kind: torch.empty(0, 1, 1, window, device=model.device) for kind, window in windows.items()}
    if not kinds:
        return masks["sliding_attention"]
    return {kind: masks[kind] for kind in dict.fromkeys(kinds)}


def packed_batch(model: PreTrainedModel, sequences: PackedSequences, training: bool = False) -> dict[str, Any]:
    """The decoder's arguments for a packed row, on the model's device.

    Args:
        training: on a CPU, attention of a model in bfloat16 is computed in float32, whose backward pass takes half the
            time there. The same for all streams, with gradients or without: their difference is what counts.
    """
    device, lengths = model.device, sequences.sequence_lengths
    row = PackedRow(
        gather=sequences.gather_indices.to(device),
        restore=sequences.restore_indices.to(device),
        repeated=sequences.repeated_indices.to(device),
        boundaries=sequences.boundaries.to(device),
        lengths=lengths,
        longest=max(lengths),
        wide=training and device.type == "cpu" and model.dtype == torch.bfloat16,
    )
    return {
        "input_ids": sequences.input_ids.to(device),
        "position_ids": sequences.position_ids.to(device),
        "attention_mask": layer_windows(model),
        "packed": row,
    }


def enable_packing(model: PreTrainedModel) -> bool:
    """Switch the model from SDPA to attention that can run packed rows; whether it can.

    It cannot where attention is of another implementation, where positions come from the mask (ALiBi), or where layers
    mix tokens otherwise than by attention; nothing is changed then.
    """
    config: Any = model.config.get_text_config(decoder=True)
    if config._attn_implementation == PACKED_ATTENTION:
        return True
    kinds = getattr(config, "layer_types", None) or ()
    if config._attn_implementation != "sdpa" or any(kind not in ATTENTION_LAYERS for kind in kinds):
        return False
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    model.set_attn_implementation(PACKED_ATTENTION)
    if _packs(model):
        return True
    model.set_attn_implementation("sdpa")
    return False


@contextmanager
def _narrow_window(config: Any) -> Iterator[None]:
    """The sliding window, where there is one, is of two tokens meanwhile."""
    window = getattr(config, "sliding_window", None)
    if window:
        config.sliding_window = 2
    try:
        yield
    finally:
        if window:
            config.sliding_window = window


@torch.no_grad()
def _packs(model: PreTrainedModel) -> bool:
    """Whether packed answers of two tokens get the hidden states of rows of their own; True if not loaded yet.

    Also with a window that is shorter than they are, as not all that have one in their config attend by it (Moshi).
    """
    if not can_run(model):
        return True
    alone, decoder = torch.tensor([[1, 2, 0], [1, 0, 1]]), model.get_decoder()
    sequences = PackedSequences.of(alone.tolist())
    with _narrow_window(model.config.get_text_config(decoder=True)):
        try:
            ours = decoder(**packed_batch(model, sequences), use_cache=False).last_hidden_state[0]
        except UNFIT:
            return False
        rows = decoder(input_ids=alone.to(model.device), use_cache=False).last_hidden_state.flatten(0, 1)
    expected = rows[sequences.restore_indices.to(model.device)].float()
    error = (ours.float() - expected).abs().mean() / expected.abs().mean()
    return bool(error < (1e-4 if model.dtype in (torch.float32, torch.float64) else 2e-2))
