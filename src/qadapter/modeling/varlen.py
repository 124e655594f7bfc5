"""Attention of sequences of any lengths, one after the other in one tensor, by one FlashAttention kernel on a GPU.

Sizes: M tokens of all sequences, S tokens of the packed row (see `qadapter.data.packing`), D head size.
"""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qadapter.modeling.streams import HALF_PRECISION

varlen_attn: Any = None
with suppress(ImportError):  # torch before 2.10
    from torch.nn.attention.varlen import varlen_attn
PARAMETERS: Mapping[str, Any] = inspect.signature(varlen_attn).parameters if varlen_attn is not None else {}
AVAILABLE = "window_size" in PARAMETERS and "scale" in PARAMETERS

# The kernel's limits, and the arguments of an architecture's attention that it does not know.
LARGEST_HEAD = 256
UNKNOWN_ARGUMENTS = ("softcap", "s_aux", "position_bias")


def fits(query: Tensor, value: Tensor, arguments: Mapping[str, Any]) -> bool:
    """Whether the kernel can run this attention; `arguments` are what the layer gives besides."""
    return (
        AVAILABLE
        and query.is_cuda
        and query.dtype in HALF_PRECISION
        and query.shape[-1] == value.shape[-1] <= LARGEST_HEAD
        and not arguments.get("dropout")
        and all(arguments.get(name) is None for name in UNKNOWN_ARGUMENTS)
    )


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, window: int, scale: float | None
) -> Tensor:
    """Each sequence's causal attention, (M, heads, D).

    Args:
        query, key, value: (M, heads, D); keys and values may have fewer heads.
        boundaries: where each sequence begins and the last one ends, int32.
        longest: tokens of the longest sequence.
        window: tokens that a token sees, itself included; 0 for all before it.
        scale: factor on the products; None for 1/sqrt(D).
    """
    grouped = {"enable_gqa": True} if "enable_gqa" in PARAMETERS else {}
    sizes = (window - 1 if window else -1, 0)
    return varlen_attn(
        query, key, value, boundaries, boundaries, longest, longest, scale=scale, window_size=sizes, **grouped
    )  # fmt: skip


def gather(states: Tensor, indices: Tensor, restore: Tensor, repeated: Tensor) -> Tensor:
    """`states[indices]`, (S, ...) -> (M, ...); its gradient scatters only the few tokens that are repeated."""
    return _Gather.apply(states, indices, restore, repeated)


def restore(states: Tensor, indices: Tensor) -> Tensor:
    """`states[indices]`, (M, ...) -> (S, ...), where no index comes twice: its gradient is copied, not summed."""
    return _Restore.apply(states, indices)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states, indices, restore_indices, repeated):  # type: ignore[override]
        ctx.save_for_backward(indices, restore_indices, repeated)
        return states.index_select(0, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[override]
        indices, restore_indices, repeated = ctx.saved_tensors
        total = grad.index_select(0, restore_indices)
        total.index_add_(0, indices.index_select(0, repeated), grad.index_select(0, repeated))
        return total, None, None, None


class _Restore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states, indices):  # type: ignore[override]
        ctx.save_for_backward(indices)
        ctx.tokens = states.shape[0]
        return states.index_select(0, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[override]
        (indices,) = ctx.saved_tensors
        return grad.new_zeros(ctx.tokens, *grad.shape[1:]).index_copy(0, indices, grad), None
