"""Per-token statistics of the policy straight from hidden states, without the (tokens, vocabulary) logits.

Training needs, for each response token, only its policy logit and two log-sum-exps over the vocabulary. The
gradient of LSE(W·h) with respect to h is E_softmax[W], a vector per token; it is formed chunk by chunk in the
forward pass, while the chunk's logits exist, so that the full logits never do (method.md, identity 5). The idea of
forming the gradient in the forward pass is the one of Liger and of apple/ml-cross-entropy.

`token_statistics` (full logits, plain autograd) is the slow twin of both fast paths and their oracle in the tests.
Sizes: N response tokens, H hidden size, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from qadapter.functional import MixCoefficients, mix_streams

# Elements of one chunk's float32 logits, whatever the vocabulary: 16 MiB on a CPU, whose caches are small; 256 MiB on
# an accelerator, where a chunk must be large enough that reading the head's weights is not what takes the time.
CHUNK_ELEMENTS = {"cpu": 2**22}
ACCELERATOR_CHUNK_ELEMENTS = 2**26
# Rows of an accelerator's matmul tile: a chunk is a multiple of it.
TILE = 128


# (logits, base_logits, targets, scale, with_kl) -> statistics, probabilities, the KL's derivatives by the logits.
Reduce = Callable[[Tensor, Tensor, Tensor, float, bool], tuple["TokenStatistics", Tensor, Tensor | None]]


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
        chunk_size: tokens at a time; None chooses by the device (`default_chunk_size`).
        compiled: run what follows the matmuls as `compiled_reduce_chunk`.
        kl_gradient: let `kl` carry a gradient too, for one more matmul a chunk.
    """
    chunk_size = chunk_size or default_chunk_size(weight.shape[0], weight.device)
    reduce = compiled_reduce_chunk() if compiled else reduce_chunk
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
        for start in range(0, mixed.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            logits = F.linear(mixed[rows].to(weight.dtype), weight)  # (n, V)
            base_logits = F.linear(base_hidden[rows].to(weight.dtype), weight)
            statistics, probabilities, kl_slopes = reduce(logits, base_logits, targets[rows], scale, with_kl)
            for column, values in zip(columns, statistics, strict=True):
                column[rows] = values
            if expected is not None:
                expected[rows] = probabilities @ weight * scale  # E_softmax[W], (n, H)
            if kl_directions is not None:
                kl_directions[rows] = kl_slopes @ weight * scale
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
) -> tuple[TokenStatistics, Tensor, Tensor | None]:
    """`token_statistics` of the scaled logits (n, V), and the policy's probabilities p in the logits' own dtype.

    `with_kl` asks for the derivatives of KL(p ‖ b) by the logits too, p · (log p − log b − KL), likewise (n, V).
    Exponentiates each logit once, in three buffers of the chunk's size, and overwrites what it is given.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    narrow, index = logits.dtype, targets.unsqueeze(-1)
    logits, base_logits = logits.to(wide), base_logits.to(wide)
    if scale != 1.0:
        logits, base_logits = logits.mul_(scale), base_logits.mul_(scale)
    chosen, base_chosen = (z.gather(-1, index).squeeze(-1) for z in (logits, base_logits))
    base_top = base_logits.amax(-1, keepdim=True)
    exponentials = (base_logits - base_top).exp_()
    base_lse = exponentials.sum(-1).log_().add_(base_top.squeeze(-1))
    top = logits.amax(-1, keepdim=True)
    probabilities = torch.sub(logits, top, out=exponentials).exp_()
    total = probabilities.sum(-1, keepdim=True)
    probabilities.div_(total)
    lse = (total.log_() + top).squeeze(-1)
    policy_mean = logits.mul_(probabilities).sum(-1)
    base_mean = base_logits.mul_(probabilities).sum(-1)
    kl = policy_mean - lse - base_mean + base_lse
    statistics = TokenStatistics(chosen, lse, base_chosen, base_lse, kl, lse - policy_mean)
    slopes = None
    if with_kl:  # the two logits have been multiplied by p above
        difference = (policy_mean - base_mean).unsqueeze(-1)
        slopes = logits.sub_(base_logits).sub_(base_logits.copy_(probabilities).mul_(difference)).to(narrow)
    return statistics, probabilities.to(narrow), slopes


@functools.cache
def compiled_reduce_chunk() -> Reduce:
    """`reduce_chunk` in a few kernels that read the logits as they are, for an accelerator."""
    return torch.compile(reduce_chunk)


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


def default_chunk_size(vocabulary: int, device: torch.device) -> int:
    """Tokens whose float32 logits fill a chunk on that kind of device, at least one; whole tiles on an accelerator."""
    rows = max(1, CHUNK_ELEMENTS.get(device.type, ACCELERATOR_CHUNK_ELEMENTS) // vocabulary)
    return rows if device.type == "cpu" or rows < TILE else rows - rows % TILE
