"""What every results file says of its run, and where it lies."""

import importlib.metadata
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qadapter.evaluation.environment import environment

RESULTS = Path(__file__).parent / "results"


def command() -> str:
    """How this script was started, without the place of the checkout."""
    spec = sys.modules["__main__"].__spec__  # of `python -m`, which puts a whole path into argv
    script = Path(sys.argv[0]).resolve()
    shown = str(script.relative_to(RESULTS.parents[1])) if script.is_relative_to(RESULTS.parents[1]) else script.name
    return shlex.join(["python", *(["-m", spec.name] if spec else [shown]), *sys.argv[1:]])


def installed(*packages: str) -> dict[str, str | None]:
    """Versions by package; None where it is missing."""
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def write(
    output: Path | None, name: str, device: str, dtype: str, versions: Mapping[str, str | None], **found: Any
) -> Path:
    """Write command, device, versions and what was found into `output`, or into results/NAME.json; the path of it."""
    processor = environment(torch.device(device))["device"]
    if device == "cpu":
        processor += f" ({torch.backends.cpu.get_cpu_capability()})"
    report = {
        "command": command(),
        "device": f"{processor}, {torch.get_num_threads()} threads",
        "dtype": dtype,
        "versions": dict(versions),
        **found,
    }
    output = output or RESULTS / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    return output
