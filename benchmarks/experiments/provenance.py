"""How this process computes, and what results files say of it: commit, versions, device, command."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.bfloat16 import multiplies_in_float32, multiply_in_float32
from qadapter.devices import cpu_has_bfloat16, default_device
from qadapter.evaluation.environment import environment

RIVALS = ("trl", "scikit-learn", "accelerate")


def set_up(threads: int | None) -> None:
    """So many threads on the CPU; on a GPU float32 products in TF32, which rounds the policy and the base alike.

    On a CPU without bfloat16 products of it are made in float32 (`bfloat16.py`).
    """
    torch.set_num_threads(threads or default_threads())
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")
    if default_device() == "cpu" and not cpu_has_bfloat16():
        multiply_in_float32()


def default_threads() -> int:
    """Threads for this process on the CPU: two busy processes with two threads each wait for each other."""
    return 1 if default_device() == "cpu" else torch.get_num_threads()


def provenance(device: torch.device) -> dict[str, Any]:
    """Commit, versions, device and command."""
    found = environment(device)
    found["versions"] |= {name: version(name) for name in RIVALS}
    command = " ".join(["python -m benchmarks.experiments", *map(portable, sys.argv[1:])])
    found["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    found["bfloat16_products"] = "in float32, rounded" if multiplies_in_float32() else "the device's"
    return found | {"commit": commit(), "command": command}


def portable(argument: str) -> str:
    """The argument, or of an absolute path its last part: results name no folders of a machine."""
    return Path(argument).name if argument.startswith("/") else argument


def commit() -> str | None:
    """The checkout's commit, with a mark if files differ from it; outside one what $QADAPTER_COMMIT says, or None."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../../src", ".")
    return f"{head}{' with changes' if changed else ''}" if head else os.environ.get("QADAPTER_COMMIT")
