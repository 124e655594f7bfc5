"""The ways to compute per-token log-probabilities that `head.py` compares."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qadapter.fused import default_chunk_size, single_head_statistics, token_statistics

# Log-probabilities of the targets under the policy, with gradient, and under the base; (N,) each.
Logps = tuple[Tensor, Tensor | None]
DPO_ROWS = 8  # chosen and rejected rows of a DPO batch, at most


@dataclass
class Problem:
    """What every head is given: hidden states of both streams (N, H), the frozen weight (V, H), targets (N,)."""

    hidden: Tensor
    base_hidden: Tensor
    weight: Tensor
    targets: Tensor
    cotangent: Tensor  # of the policy's log-probabilities, (N,)

    @property
    def chunk_size(self) -> int:
        """Tokens of a chunk of our head."""
        return default_chunk_size(self.weight)


@dataclass
class Head:
    """One contender.

    `forward` gives the loss to run backward from and the log-probabilities to check, None where there are none; those
    of a head that sums them by rows are sums over `rows` equal parts of the tokens.
    """

    forward: Callable[[Problem, Tensor], tuple[Tensor | None, Logps | None]]
    rows: int | None = None
    compiled: bool = False


def problem(tokens: int, hidden: int, vocabulary: int, device: str, dtype: torch.dtype) -> Problem:
    """Random states with logits of standard deviation 4, a language model's entropy of some 4 nats.

    Half of the variance is a direction that all tokens share, as frequent words are frequent everywhere, and targets
    are drawn from the policy: kernels that skip small probabilities depend on both.
    """
    weight = torch.randn(vocabulary, hidden, device=device).div_(math.sqrt(hidden)).to(dtype)
    shared, own = torch.randn(1, hidden, device=device), torch.randn(tokens, hidden, device=device)
    states = (shared + own) * math.sqrt(8.0)
    base_states = states + 0.5 * torch.randn_like(states)
    states, base_states = states.to(dtype), base_states.to(dtype)
    targets = [F.linear(rows, weight).float().softmax(-1).multinomial(1).squeeze(-1) for rows in states.split(256)]
    return Problem(states, base_states, weight, torch.cat(targets), torch.randn(tokens, device=device))


def oracle(given: Problem) -> tuple[Logps, Tensor]:
    """Log-probabilities under both, and the gradient to the policy's states, in float64 from full logits by chunks.

    Not in float32: it would share the rounding of some contenders and show them as exact.
    """
    weight, logps, base_logps, gradients = given.weight.double(), [], [], []
    streams = given.hidden, given.base_hidden, given.targets, given.cotangent
    for hidden, base_hidden, targets, cotangent in zip(*(stream.split(256) for stream in streams), strict=True):
        hidden = hidden.double().requires_grad_()
        chosen = F.linear(hidden, weight).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        gradients.append(torch.autograd.grad(chosen, hidden, cotangent.double())[0])
        logps.append(chosen.detach())
        with torch.no_grad():
            base = F.linear(base_hidden.double(), weight).log_softmax(-1)
            base_logps.append(base.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
    return (torch.cat(logps), torch.cat(base_logps)), torch.cat(gradients)


def matmuls(given: Problem, chunk_size: int) -> tuple[None, None]:
    """What no head can do without: policy logits, base logits, and a row of the weight's size per token."""
    with torch.no_grad():
        for hidden, base_hidden in zip(
            given.hidden.split(chunk_size), given.base_hidden.split(chunk_size), strict=True
        ):
            logits = F.linear(hidden, given.weight)
            F.linear(base_hidden, given.weight)
            logits @ given.weight  # the logits stand in for the probabilities
    return None, None


def ours(given: Problem, hidden: Tensor, compiled: bool) -> tuple[Tensor, Logps]:
    statistics = single_head_statistics(
        hidden.float(), given.base_hidden, given.weight, given.targets, compiled=compiled
    )
    return statistics.logps @ given.cotangent, (statistics.logps, statistics.base_logps)


def full_logits(given: Problem, hidden: Tensor) -> tuple[Tensor, Logps]:
    with torch.no_grad():
        base_logits = F.linear(given.base_hidden, given.weight).float()
    statistics = token_statistics(F.linear(hidden, given.weight).float(), base_logits, given.targets)
    return statistics.logps @ given.cotangent, (statistics.logps, statistics.base_logps)


def by(logps_of: Callable[[Tensor], Tensor]) -> Callable[[Problem, Tensor], tuple[Tensor, Logps]]:
    """A head from a function of hidden states that is called on the policy's, and without gradient on the base's."""

    def forward(given: Problem, hidden: Tensor) -> tuple[Tensor, Logps]:
        logps = logps_of(hidden)
        with torch.no_grad():
            base_logps = logps_of(given.base_hidden)
        return logps @ given.cotangent, (logps, base_logps)

    return forward


def trl_head(given: Problem) -> Head:
    """What DPOTrainer calls (`add_fused_lm_head`): tiles of the vocabulary, Triton on a GPU, none of Liger's code."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")  # as DPOTrainer asks for
    arguments = given.weight, None, given.targets, 1.0, CHUNK, None, 1.0, outputs
    return Head(by(lambda hidden: ChunkedLogProbFunction.apply(hidden, *arguments)[0]))


def liger_cross_entropy(given: Problem, budget: int) -> Head:
    """Liger's fused linear cross-entropy; reduction "none", since the tokens of a pair are weighted unequally.

    Args:
        budget: its logits may take so many times the memory of the hidden states.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as cross_entropy

    if not given.weight.is_cuda:
        raise RuntimeError("its Triton kernel needs a GPU")
    arguments = {"reduction": "none", "chunk_mem_const": budget}
    return Head(by(lambda hidden: -cross_entropy(hidden, given.weight, given.targets, **arguments)))


def liger_dpo(given: Problem) -> Head:
    """Liger's fused DPO loss, a pair at a time: its gradient is the loss's own and is not compared."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    rows = next((rows for rows in range(DPO_ROWS, 2, -2) if len(given.targets) % rows == 0), 2)
    loss_of = LigerFusedLinearDPOLoss(beta=0.01)
    base_hidden, targets = (stream.unflatten(0, (rows, -1)) for stream in (given.base_hidden, given.targets))

    def forward(given: Problem, hidden: Tensor) -> tuple[Tensor, Logps]:
        states = hidden.unflatten(0, (rows, -1))
        loss, (chosen, rejected, *_) = loss_of(
            given.weight, states, targets, ref_input=base_hidden, ref_weight=given.weight
        )
        return loss, (torch.cat([chosen, rejected]), None)

    return Head(forward, rows, compiled=True)


def cut_cross_entropy(given: Problem, **arguments: object) -> Head:
    """Apple's cut-cross-entropy, which skips blocks of small probabilities in the gradient unless told not to."""
    from cut_cross_entropy import linear_cross_entropy

    if arguments and not given.weight.is_cuda:
        raise RuntimeError("only its kernel for GPUs skips anything")
    impl = "cce" if given.weight.is_cuda else "torch_compile"
    arguments |= {"reduction": "none", "impl": impl}
    forward = by(lambda hidden: -linear_cross_entropy(hidden, given.weight, given.targets, **arguments))
    return Head(forward, compiled=impl == "torch_compile")


def heads(given: Problem) -> dict[str, Callable[[], Head]]:
    """Each made when it is first needed, which may raise; the bare matmuls first."""
    vocabulary, hidden = given.weight.shape
    tokens = len(given.targets)
    budget = math.ceil(given.chunk_size * vocabulary / (tokens * hidden))
    return {
        "bare matmuls": lambda: Head(lambda given, _: matmuls(given, given.chunk_size)),
        "bare matmuls, one chunk": lambda: Head(lambda given, _: matmuls(given, tokens)),
        "ours": lambda: Head(lambda given, hidden: ours(given, hidden, compiled=False)),
        "ours, compiled": lambda: Head(lambda given, hidden: ours(given, hidden, compiled=True), compiled=True),
        "full logits": lambda: Head(full_logits),
        "TRL DPO": lambda: trl_head(given),
        "cut-cross-entropy": lambda: cut_cross_entropy(given),
        "cut-cross-entropy, nothing skipped": lambda: cut_cross_entropy(given, filter_eps=None),
        "Liger cross-entropy": lambda: liger_cross_entropy(given, 1),
        "Liger cross-entropy, chunks like ours": lambda: liger_cross_entropy(given, budget),
        "Liger DPO": lambda: liger_dpo(given),
    }
