"""Per-token statistics of the policy straight from hidden states, without the (tokens, vocabulary) logits.

Training needs, for each response token, only its policy logit and two log-sum-exps over the vocabulary. The
gradient of LSE(W·h) with respect to h is E_softmax[W], a vector per token; it is formed chunk by chunk in the
forward pass, while the chunk's logits exist, so that the full logits never do (method.md, identity 5). The idea of
forming the gradient in the forward pass is the one of Liger and of apple/ml-cross-entropy.

`token_statistics` (full logits, plain autograd) is the slow twin of both fast paths and their oracle in the tests.
Sizes: N response tokens, H hidden size, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from qadapter.functional import MixCoefficients, mix_streams

# One chunk's logits, whatever the vocabulary: large enough that an accelerator's time does not go into reading the
# head's weights, nor a CPU's into packing them anew for each matmul.
CPU_CHUNK_BYTES = 2**25
# Of two heads, whose chunks have some six wide copies each way: larger ones take more memory and no less time.
CPU_TWO_HEAD_ELEMENTS = 2**22
ACCELERATOR_CHUNK_ELEMENTS = 2**26
# Rows of an accelerator's matmul tile: a chunk is a multiple of it.
TILE = 128
# Logits that are widened to float32 at a time: of a whole chunk in half precision, the wide copies would take six times
# the memory of what the matmuls need. On a CPU so few that they stay in its cache.
CPU_WIDENED_ELEMENTS = 2**19
ACCELERATOR_WIDENED_ELEMENTS = 2**24


# (logits, base_logits, targets, scale, with_kl) -> statistics; see `reduce_rows` for what becomes of the logits.
Reduce = Callable[[Tensor, Tensor, Tensor, float, bool], "TokenStatistics"]


class TokenStatistics(NamedTuple):
    """What the loss and its metrics need of each response token; all (N,), in float32 or wider.

    `logits` and `lse` carry gradients to the adapter, `kl` does where that was asked for; the others do not.
    """

    logits: Tensor  # unnormalised policy logit of the token
    lse: Tensor  # log-sum-exp of the policy logits over the vocabulary
    base_logits: Tensor
    base_lse: Tensor
    kl: Tensor  # KL(policy ‖ base) of the token's distribution, in nats
    entropy: Tensor  # of the policy

    @property
    def logps(self) -> Tensor:
        """Log-probability of the token under the policy."""
        return self.logits - self.lse

    @property
    def base_logps(self) -> Tensor:
        """Log-probability of the token under the base model."""
        return self.base_logits - self.base_lse


def token_statistics(policy_logits: Tensor, base_logits: Tensor, targets: Tensor) -> TokenStatistics:
    """Statistics of `targets` (N,) from full logits (N, V): the definition, and the oracle of the fused paths."""
    lse, base_lse = policy_logits.logsumexp(-1), base_logits.logsumexp(-1)
    index = targets.unsqueeze(-1)
    probabilities = (policy_logits - lse.unsqueeze(-1)).exp()
    policy_mean = (probabilities * policy_logits).sum(-1)
    base_mean = (probabilities * base_logits.detach()).sum(-1)
    kl = policy_mean - lse - base_mean + base_lse.detach()
    return TokenStatistics(
        logits=policy_logits.gather(-1, index).squeeze(-1),
        lse=lse,
        base_logits=base_logits.gather(-1, index).squeeze(-1).detach(),
        base_lse=base_lse.detach(),
        kl=kl,
        entropy=(lse - policy_mean).detach(),
    )


def single_head_statistics(
    mixed: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    chunk_size: int | None = None,
    compiled: bool = False,
    kl_gradient: bool = False,
) -> TokenStatistics:
    """Equals `token_statistics(scale · mixed @ Wᵀ, scale · base_hidden @ Wᵀ, targets)`, chunk by chunk.

    Args:
        mixed: c_θ h_θ + c_b h_b, (N, H), float32; carries the gradient.
        base_hidden: h_b, (N, H).
        weight: the head W shared by both streams, (V, H), frozen: it gets no gradient.
        targets: token ids, (N,).
        scale: factor on the logits (Cohere, Granite).
        chunk_size: tokens at a time; None chooses by the device (`even_chunk_size`).
        compiled: run what follows the matmuls as `compiled_reduce_rows`.
        kl_gradient: let `kl` carry a gradient too, for one more matmul a chunk.
    """
    chunk_size = chunk_size or even_chunk_size(mixed.shape[0], weight)
    reduce = compiled_reduce_rows() if compiled else reduce_chunk
    columns = _SingleHead.apply(mixed, base_hidden.detach(), weight, targets, float(scale), chunk_size, reduce,
                                kl_gradient)  # fmt: skip
    return TokenStatistics(*columns)


class _SingleHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed, base_hidden, weight, targets, scale, chunk_size, reduce, kl_gradient):  # type: ignore[override]
        wide = torch.promote_types(weight.dtype, torch.float32)
        columns = [mixed.new_empty(mixed.shape[0], dtype=wide) for _ in TokenStatistics._fields]
        expected = mixed.new_empty(mixed.shape, dtype=wide) if ctx.needs_input_grad[0] else None
        with_kl = kl_gradient and ctx.needs_input_grad[0]
        kl_directions = mixed.new_empty(mixed.shape, dtype=wide) if with_kl else None
        # Autocast narrows no product that is written into a given tensor (out=), so it is done here. The chunks share
        # theirs: a CPU takes longer to get pages for a large tensor than to fill them.
        kind = weight.device.type
        head = weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight
        buffers = head.new_empty(2, min(chunk_size, mixed.shape[0]), weight.shape[0])
        for rows in slices(mixed.shape[0], chunk_size):
            logits, base_logits = (
                torch.mm(hidden[rows].to(head.dtype), head.T, out=buffer[: rows.stop - rows.start])  # (n, V)
                for hidden, buffer in zip((mixed, base_hidden), buffers, strict=True)
            )
            statistics = reduce(logits, base_logits, targets[rows], scale, with_kl)
            for column, values in zip(columns, statistics, strict=True):
                column[rows] = values
            # The logits hold probabilities now, and those of the base the slopes of the KL (`reduce_rows`).
            if expected is not None:
                expected[rows] = logits @ head * scale  # E_softmax[W], (n, H)
            if kl_directions is not None:
                kl_directions[rows] = base_logits @ head * scale
        ctx.save_for_backward(expected, kl_directions, weight, targets)
        ctx.scale, ctx.dtype = scale, mixed.dtype
        carrying = ("logits", "lse", "kl") if with_kl else ("logits", "lse")
        fields = zip(TokenStatistics._fields, columns, strict=True)
        ctx.mark_non_differentiable(*(column for name, column in fields if name not in carrying))
        return tuple(columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):  # type: ignore[override]
        expected, kl_directions, weight, targets = ctx.saved_tensors
        by = TokenStatistics(*grads)
        grad = by.logits.unsqueeze(-1) * ctx.scale * weight[targets] + by.lse.unsqueeze(-1) * expected
        if kl_directions is not None:
            grad += by.kl.unsqueeze(-1) * kl_directions
        return grad.to(ctx.dtype), None, None, None, None, None, None, None


def reduce_chunk(
    logits: Tensor, base_logits: Tensor, targets: Tensor, scale: float, with_kl: bool = False
) -> TokenStatistics:
    """`reduce_rows` of the logits (n, V), so many rows at a time that their wide copies stay small."""
    elements = CPU_WIDENED_ELEMENTS if logits.device.type == "cpu" else ACCELERATOR_WIDENED_ELEMENTS
    size = min(max(1, elements // logits.shape[-1]), logits.shape[0])
    wide = torch.promote_types(logits.dtype, torch.float32)
    space = logits.new_empty(1 if logits.dtype == wide else 3, size, logits.shape[-1], dtype=wide)
    blocks = [
        reduce_rows(logits[rows], base_logits[rows], targets[rows], scale, with_kl, space[:, : rows.stop - rows.start])
        for rows in slices(logits.shape[0], size)
    ]
    return TokenStatistics(*map(torch.cat, zip(*blocks, strict=True)))


def reduce_rows(
    logits: Tensor,
    base_logits: Tensor,
    targets: Tensor,
    scale: float,
    with_kl: bool = False,
    space: Tensor | None = None,
) -> TokenStatistics:
    """`token_statistics` of the scaled logits (n, V), which it overwrites, so that the caller holds nothing more.

    It leaves the policy's probabilities p in `logits` and, `with_kl`, the derivatives of KL(p ‖ b) by the logits,
    p · (log p − log b − KL), in `base_logits`. Exponentiates each logit once.

    Args:
        space: wide matrices to work in, (1, n, V), or (3, n, V) where the logits are narrow; None makes them.
    """
    index = targets.unsqueeze(-1)
    if space is None:
        wide = torch.promote_types(logits.dtype, torch.float32)
        z, base_z = logits.to(wide), base_logits.to(wide)  # the logits themselves where they are wide
        exponentials = torch.empty_like(z)
    elif len(space) == 1:
        z, base_z, exponentials = logits, base_logits, space[0]
    else:
        z, base_z, exponentials = space[0].copy_(logits), space[1].copy_(base_logits), space[2]
    if scale != 1.0:
        z, base_z = z.mul_(scale), base_z.mul_(scale)
    chosen, base_chosen = (values.gather(-1, index).squeeze(-1) for values in (z, base_z))
    base_top = base_z.amax(-1, keepdim=True)
    exponentials = torch.sub(base_z, base_top, out=exponentials).exp_()
    base_lse = exponentials.sum(-1).log_().add_(base_top.squeeze(-1))
    top = z.amax(-1, keepdim=True)
    exponentials = torch.sub(z, top, out=exponentials).exp_()
    total = exponentials.sum(-1, keepdim=True)
    lse = (total.log() + top).squeeze(-1)
    policy_mean = z.mul_(exponentials).sum(-1, keepdim=True).div_(total)
    base_mean = base_z.mul_(exponentials).sum(-1, keepdim=True).div_(total)
    difference = policy_mean - base_mean
    if with_kl:
        slopes = torch.sub(z, base_z, out=base_z).addcmul_(exponentials, difference, value=-1).div_(total)
        base_logits.copy_(slopes)
    logits.copy_(torch.div(exponentials, total, out=z))
    kl = difference.squeeze(-1) - lse + base_lse
    return TokenStatistics(chosen, lse, base_chosen, base_lse, kl, lse - policy_mean.squeeze(-1))


@functools.cache
def compiled_reduce_rows() -> Reduce:
    """`reduce_rows` in a few kernels that read the logits as they are, for an accelerator."""
    return torch.compile(reduce_rows)


def slices(length: int, size: int) -> Iterator[slice]:
    """Slices of `size`, the last one perhaps shorter, that make up `length`."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def two_head_statistics(
    adapter_hidden: Tensor,
    base_hidden: Tensor,
    adapter_head: Callable[[Tensor], Tensor],
    base_head: Callable[[Tensor], Tensor],
    coefficients: MixCoefficients,
    targets: Tensor,
    chunk_size: int,
) -> TokenStatistics:
    """Statistics where one head matmul is not enough: head bias, soft-capped logits, or an adapter on the head.

    Both heads map (n, H) to logits (n, V). Chunks are recomputed in the backward pass, so memory is bounded as in
    the single-head path while gradients also reach an adapter on the head.
    """

    def of_chunk(adapter_rows: Tensor, base_rows: Tensor, target_rows: Tensor) -> TokenStatistics:
        with torch.no_grad():
            base_logits = base_head(base_rows)
        policy_logits = mix_streams([adapter_head(adapter_rows), base_logits], coefficients)
        return token_statistics(policy_logits, base_logits.to(policy_logits.dtype), target_rows)

    chunks = zip(
        adapter_hidden.split(chunk_size),
        base_hidden.split(chunk_size),
        targets.split(chunk_size),
        strict=True,
    )
    parts = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    return TokenStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def even_chunk_size(tokens: int, weight: Tensor) -> int:
    """The default, or on a CPU, where small chunks take more time a token, as much less as makes all chunks alike."""
    size = default_chunk_size(weight)
    chunks = -(-tokens // size)
    return -(-tokens // chunks) if weight.device.type == "cpu" and chunks else size


def default_chunk_size(weight: Tensor) -> int:
    """Tokens whose logits fill a chunk on the device of the weight (V, H), at least 1; whole tiles on accelerators."""
    cpu = weight.device.type == "cpu"
    elements = CPU_CHUNK_BYTES // weight.dtype.itemsize if cpu else ACCELERATOR_CHUNK_ELEMENTS
    rows = max(1, elements // weight.shape[0])
    return rows if cpu or rows < TILE else rows - rows % TILE


def two_head_chunk_size(weight: Tensor) -> int:
    """The default of `two_head_statistics`: fewer tokens on a CPU, as many on an accelerator."""
    size = default_chunk_size(weight)
    return min(size, max(1, CPU_TWO_HEAD_ELEMENTS // weight.shape[0])) if weight.device.type == "cpu" else size
