"""Where a model runs, and in which precision."""

from functools import cache
from pathlib import Path

import torch

CPU_FLAGS = Path("/proc/cpuinfo")


def default_device() -> str:
    """The accelerator of this machine, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none (Apple's GPUs, some of Intel's)."""
    return _widest_float(device.type)


@cache
def _widest_float(kind: str) -> torch.dtype:
    try:
        torch.zeros((), device=kind).double()
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself; False where Linux does not say so."""
    return CPU_FLAGS.exists() and "avx512_bf16" in CPU_FLAGS.read_text(encoding="utf-8")


def cpu_dtype() -> torch.dtype:
    """The faster dtype of this CPU: bfloat16 where it has instructions for it, else float32.

    Known by the instructions, not by the clock: beside other work a clock answers now so, now otherwise.
    """
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def pick_dtype(name: str) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return getattr(torch, name)
