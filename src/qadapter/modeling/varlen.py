"""Attention of sequences of any lengths, one after the other in one tensor, by one FlashAttention kernel on a GPU.

Sizes: M tokens of all sequences, S tokens of the packed row (see `qadapter.data.packing`), D head size.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from qadapter.modeling.streams import HALF_PRECISION

varlen_attn: Any = None
with suppress(ImportError):  # torch before 2.10
    from torch.nn.attention.varlen import varlen_attn
PARAMETERS: Mapping[str, Any] = inspect.signature(varlen_attn).parameters if varlen_attn is not None else {}
AVAILABLE = "window_size" in PARAMETERS and "scale" in PARAMETERS

# The kernel's limits, and the arguments of an architecture's attention that it does not know.
LARGEST_HEAD, HEAD_STEP = 256, 8
UNKNOWN_ARGUMENTS = ("softcap", "s_aux", "position_bias")


def fits(query: Tensor, value: Tensor, arguments: Mapping[str, Any]) -> bool:
    """Whether the kernel can run this attention; `arguments` are what the layer gives besides."""
    return (
        AVAILABLE
        and query.is_cuda
        and query.dtype in HALF_PRECISION
        and query.shape[-1] == value.shape[-1] <= LARGEST_HEAD
        and query.shape[-1] % HEAD_STEP == 0
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


def transparent(name: str) -> Callable[[Callable[..., Tensor]], torch.library.CustomOpDef]:
    """Make a function an operation of its own which the compiler sees through, to the operations it is made of.

    Not an autograd Function: where a compiled layer is checkpointed, torch up to 2.11 keeps what the inside of one
    makes instead of recomputing it (pytorch/pytorch#177396). This is what `torch.library.triton_op` does, which asks
    for Triton.
    """

    def made(function: Callable[..., Tensor]) -> torch.library.CustomOpDef:
        def seen_through(mode: Any, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
            with mode:
                return function(*args, **(kwargs or {}))

        operation = torch.library.custom_op(name, function, mutates_args=())
        operation.register_fake(function)
        operation.register_torch_dispatch(FunctionalTensorMode, seen_through)
        return operation

    return made


@transparent("qadapter::gather_tokens")
def gather(states: Tensor, indices: Tensor, restore: Tensor, repeated: Tensor) -> Tensor:
    """`states[indices]`, (S, ...) -> (M, ...); its gradient scatters only the few tokens that are repeated."""
    return states.index_select(0, indices)


@transparent("qadapter::restore_tokens")
def restore(states: Tensor, indices: Tensor) -> Tensor:
    """`states[indices]`, (M, ...) -> (S, ...), where no index comes twice: its gradient is copied, not summed."""
    return states.index_select(0, indices)


def _keep_gather(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    indices, restore_indices, repeated = ctx.saved_tensors
    total = grad.index_select(0, restore_indices)
    total.index_add_(0, indices.index_select(0, repeated), grad.index_select(0, repeated))
    return total, None, None, None


def _keep_restore(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    states, indices = inputs
    ctx.save_for_backward(indices)
    ctx.tokens = states.shape[0]


def _restore_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    return grad.new_zeros(ctx.tokens, *grad.shape[1:]).index_copy(0, indices, grad), None


gather.register_autograd(_gather_backward, setup_context=_keep_gather)
restore.register_autograd(_restore_backward, setup_context=_keep_restore)
