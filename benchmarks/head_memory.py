"""Peak extra memory of the training head: fused against full logits, for a vocabulary of 128k.

    python benchmarks/head_memory.py [--vocabulary 128256] [--hidden 256] [--tokens 256 512 1024 2048]

Each case runs in a process of its own; the figure is the rise of its peak resident memory during one forward and
backward pass. The fused head's must not grow with tokens x vocabulary.
"""

import argparse
import multiprocessing
import time
from pathlib import Path

import torch
from results_file import installed, write

from qadapter.fused import single_head_statistics, token_statistics


def peak_bytes() -> int:
    """Peak resident memory of this process so far (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: this benchmark needs Linux.")


def measure(kind: str, tokens: int, hidden: int, vocabulary: int, queue: multiprocessing.Queue) -> None:
    """Put (extra peak bytes, seconds) of one forward and backward pass on the queue."""
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, hidden).div_(hidden**0.5)  # in place: a copy would hide as much of what comes
    h_theta, h_base = torch.randn(2, tokens, hidden)
    h_theta.requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    before, start = peak_bytes(), time.perf_counter()
    if kind == "fused":
        statistics = single_head_statistics(h_theta, h_base, weight, targets)
    else:
        statistics = token_statistics(h_theta @ weight.T, h_base @ weight.T, targets)
    (statistics.logits - statistics.lse).sum().backward()
    queue.put((peak_bytes() - before, time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    print(f"{'tokens':>7} {'full logits':>14} {'fused':>10}   (MiB extra, and seconds)")
    for tokens in options.tokens:
        row = {"tokens": tokens}
        for kind in ("full", "fused"):
            queue = context.Queue()
            process = context.Process(target=measure, args=(kind, tokens, options.hidden, options.vocabulary, queue))
            process.start()
            row[f"{kind}_bytes"], row[f"{kind}_seconds"] = queue.get()
            process.join()
        rows.append(row)
        full, fused = row["full_bytes"] / 2**20, row["fused_bytes"] / 2**20
        print(f"{tokens:>7} {full:>8.0f} {row['full_seconds']:>5.1f} {fused:>8.0f} {row['fused_seconds']:>5.1f}")
    write(options.output, "head_memory", "cpu", "float32", installed("torch"), vocabulary=options.vocabulary,
          hidden=options.hidden, rows=rows)  # fmt: skip


if __name__ == "__main__":
    main()
