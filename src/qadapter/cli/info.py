"""`qadapter info`: what an adapter folder holds, without loading a model."""

import json
from pathlib import Path

from qadapter.cli import command_parser


def run(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    parser = command_parser("info", "Say what an adapter folder holds, after checking its files.")
    parser.add_argument("adapter", help="adapter folder or hub id")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-verify", action="store_true", help="only warn of weights that are not those saved")
    options = parser.parse_args(arguments)

    from qadapter.cli.policies import quiet_libraries
    from qadapter.modeling.hub import local_folder

    with quiet_libraries():
        facts = describe(local_folder(options.adapter), not options.no_verify)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            print(f"{name:>14}  {_plain(value)}")
    return 0


def describe(folder: Path, verify: bool = True) -> dict:
    """Facts of an adapter folder, read from its files, whose weights must be those that were saved if `verify`."""
    from qadapter.modeling.loading import read_folder
    from qadapter.modeling.lora_files import WEIGHTS_NAME
    from qadapter.modeling.quantised import described

    stored = read_folder(folder, verify)
    manifest = next(iter(stored.values())).manifest
    adapters = {
        name: {
            **manifest.configs[name],
            "weight": manifest.weights[name],
            "rank": adapter.peft_config.r,
            "modules": len(adapter.peft_config.target_modules or ()),
            "parameters": sum(tensor.numel() for tensor in adapter.tensors.values()),
            "bytes": (folder / "adapters" / name / WEIGHTS_NAME).stat().st_size,
        }
        for name, adapter in stored.items()
    }
    return {
        "format_version": manifest.format_version,
        "base": manifest.base["name"],
        "revision": manifest.base["revision"],
        "architecture": manifest.base["architecture"],
        "quantization": described(manifest.base["quantization"]),
        "tokenizer": "recorded" if manifest.tokenizer else "not recorded",
        "adapters": adapters,
    }


def _plain(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    lines = [f"{name}: " + ", ".join(f"{k} {v}" for k, v in entry.items()) for name, entry in value.items()]
    return ("\n" + " " * 16).join(lines)
