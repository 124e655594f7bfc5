"""What every results file says of its run, and where it lies."""

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def write(output: Path | None, name: str, device: str, dtype: str, versions: Mapping[str, str], **found: Any) -> None:
    """Write the command, the device, the versions and what was found into `output`, or into results/NAME.json."""
    processor = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "device": f"{processor}, {torch.get_num_threads()} threads",
        "dtype": dtype,
        "versions": dict(versions),
        **found,
    }
    output = output or RESULTS / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
