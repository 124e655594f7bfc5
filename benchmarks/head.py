"""Cost of training's head: ours beside the matmuls it needs, full logits, TRL's, Liger's and cut-cross-entropy's.

    python benchmarks/head.py                                     # SmolLM2-135M's head on the CPU, float32
    python benchmarks/head.py --device cuda --vocabulary 128256 --hidden 4096 --tokens 3584    # Llama 8B's, bfloat16

The work is the log-probability of each response token under the policy, with gradient to the policy's hidden states,
and under the base, without; the head's weight is frozen. Ours also gives log-sum-exps, KL and entropy, TRL's entropy,
mean logits and accuracy, the others nothing else. The contenders take turns within each round; figures are medians
over rounds, ratios are to the bare matmuls of the same round. Errors are to full logits in float64 of the same
inputs. A contender that cannot run here is left out, and the reason recorded.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from allocations import PeakAllocations
from head_contenders import Head, Logps, Problem, heads, oracle, problem
from results_file import installed, write
from torch import Tensor

REFERENCE = "bare matmuls"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")

# Seconds forward and backward, log-probabilities, gradient to the policy's hidden states.
Run = tuple[float, float, Logps | None, Tensor | None]


def run(head: Head, given: Problem) -> Run:
    """One forward and backward pass."""
    hidden = given.hidden.detach().requires_grad_()
    synchronise(hidden)
    start = time.perf_counter()
    loss, logps = head.forward(given, hidden)
    synchronise(hidden)
    middle = time.perf_counter()
    if loss is not None:
        loss.backward()
        synchronise(hidden)
    return middle - start, time.perf_counter() - middle, logps, hidden.grad


def synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def errors(head: Head, outcome: Run, expected: tuple[Logps, Tensor]) -> dict[str, float]:
    """Largest differences of log-probabilities, or of their sums by rows, and the gradient's relative distance."""
    (_, _, logps, gradient), (expected_logps, expected_gradient) = outcome, expected
    if logps is None:
        return {}
    found = {}
    for name, values, exact in zip(("logp_error", "base_logp_error"), logps, expected_logps, strict=True):
        if values is not None:
            exact = exact if head.rows is None else exact.unflatten(0, (head.rows, -1)).sum(-1)
            found[name] = float((values.detach() - exact).abs().max())
    if head.rows is None and gradient is not None:
        found["gradient_error"] = float((gradient.double() - expected_gradient).norm() / expected_gradient.norm())
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def peak_bytes(head: Head, given: Problem) -> int | None:
    """What a pass allocates at its peak; None where compiled code on a CPU hides it."""
    gc.collect()
    if given.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(head, given)
        return torch.cuda.max_memory_allocated() - before
    if head.compiled:
        return None
    with PeakAllocations() as allocations:
        run(head, given)
    return allocations.peak


def prepare(
    makers: dict[str, Callable[[], Head]], given: Problem, expected: tuple[Logps, Tensor]
) -> tuple[dict[str, Head], dict[str, dict[str, Any]]]:
    """The heads that run here, warmed up, and of each its errors and memory, or why it is left out."""
    ready: dict[str, Head] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            head = make()
            figures[name] = errors(head, run(head, given), expected)
            run(head, given)
            peak = peak_bytes(head, given)
        except Exception as error:  # whatever a library raises, the others are still measured
            reason = next(iter(str(error).splitlines()), "")
            figures[name] = {"left_out": f"{type(error).__name__}: {reason}"}
            print(f"{name}: left out: {figures[name]['left_out']}", file=sys.stderr)
            continue
        figures[name]["peak_mib"] = None if peak is None else round(peak / 2**20, 1)
        ready[name] = head
        print(f"{name}: ready after {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return ready, figures


def measure(ready: dict[str, Head], given: Problem, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each head, forward and backward, and median ratio to the bare matmuls."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, head in ready.items():
            times[name].append(run(head, given)[:2])
    return {
        name: {
            "forward_milliseconds": round(1000 * statistics.median(forward for forward, _ in values), 3),
            "backward_milliseconds": round(1000 * statistics.median(backward for _, backward in values), 3),
            "milliseconds": round(1000 * statistics.median(map(sum, values)), 3),
            "ratio": round(
                statistics.median(sum(ours) / sum(bare) for ours, bare in zip(values, times[REFERENCE], strict=True)), 3
            ),
        }
        for name, values in times.items()
    }


def table(figures: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'':<40}{'forward':>9}{'backward':>9}{'ms':>9}{'ratio':>7}{'MiB':>9}{'error':>10}{'of grad':>9}"]
    for name, row in figures.items():
        if "left_out" in row:
            lines.append(f"{name:<40} left out: {row['left_out']}")
            continue
        times = "".join(f"{row[f'{part}milliseconds']:>9.2f}" for part in ("forward_", "backward_", ""))
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
        found = "".join(
            f"{format(row[part], '.1e') if part in row else '-':>{width}}"
            for part, width in (("logp_error", 10), ("gradient_error", 9))
        )
        lines.append(f"{name:<40}{times}{row['ratio']:>7.2f}{peak:>9}{found}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=[], help="contenders by name, beside the bare matmuls")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    torch.manual_seed(0)
    given = problem(options.tokens, options.hidden, options.vocabulary, options.device, getattr(torch, dtype))
    chosen = {
        name: make for name, make in heads(given).items() if not options.only or name in (REFERENCE, *options.only)
    }
    ready, figures = prepare(chosen, given, oracle(given))
    for name, values in measure(ready, given, options.rounds).items():
        figures[name] = values | figures[name]
    print(table(figures))
    write(
        options.output,
        f"head_{options.device}",
        options.device,
        dtype,
        installed(*PACKAGES),
        vocabulary=options.vocabulary,
        hidden=options.hidden,
        tokens=options.tokens,
        chunk_size=given.chunk_size,
        rounds=options.rounds,
        figures=figures,
    )


if __name__ == "__main__":
    main()
