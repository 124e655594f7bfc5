"""A folder that vLLM serves with the plugin `qadapter-vllm`: base weights, adapter, tokenizer and what names them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from qadapter.errors import ConfigError
from qadapter.export.merged import name_the_trained_end
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.checkpoint import save
from qadapter.modeling.heads import Head
from qadapter.modeling.mixing import checked_number
from qadapter.modeling.policy_part import NEUTRAL
from qadapter.modeling.quantised import quantisation_of, require_unquantised
from qadapter.new_folders import into_new_folder, write_json

# The families that the plugin has; a test there compares the two lists.
VLLM_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma3ForCausalLM",
)
# The same weights once more, in Mistral's own format, which vLLM would prefer.
MISTRAL_FILES = "consolidated"
BASE_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def export_vllm(
    model: QAdapterForCausalLM, folder: str | os.PathLike[str], tokenizer: Any = None, strength: float | None = None
) -> None:
    """Write a complete folder for `vllm serve`.

    The base's weight files are hard links where the file system allows them (no space, no waiting, and the folder
    stays whole when the original is removed), else copies. The adapter is the usual adapter folder, so that the plugin
    checks the same things as `from_pretrained`.

    Args:
        strength: what the server uses where a request gives none; None takes the model's own.

    Raises:
        ConfigError: a base or an adapter that the plugin cannot serve, or a base whose files are not safetensors; a
            strength that is none; a policy with another setting of its own than strength and weights.
    """
    strength = checked_number(model.strength if strength is None else strength, "strength")
    _require_servable(model)
    architecture = type(model.base).__name__
    if architecture not in VLLM_ARCHITECTURES:
        raise ConfigError(
            f"the vLLM plugin has no {architecture}: it serves {', '.join(VLLM_ARCHITECTURES)}. "
            "Use `qadapter serve`, or `qadapter export --format merged` where that is exact."
        )
    if not Head.of(model.base).shared:
        raise ConfigError(
            f"{architecture}: its head has a bias, a soft cap or an adapter, so that streams cannot be mixed before "
            "it. Use `qadapter serve`."
        )
    if quantisation_of(model.base):  # a base whose files are quantised may be served
        require_unquantised(model.base, "vLLM would load its files as they are")
    source = base_folder(model)

    def write(scratch: Path) -> None:
        save(model, scratch, tokenizer=tokenizer)
        for pattern in BASE_FILES:
            for path in sorted(source.glob(pattern)):
                if not path.name.startswith(MISTRAL_FILES):
                    _link_or_copy(path.resolve(), scratch / path.name)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config |= {"architectures": [f"QAdapter{architecture}"], "qadapter": {"strength": strength}}
        (scratch / "config.json").unlink()  # a link to the base's own file, which must stay as it is
        write_json(scratch / "config.json", config)
        if tokenizer is not None:
            name_the_trained_end(scratch, tokenizer)

    into_new_folder(Path(folder), write)


def _require_servable(model: QAdapterForCausalLM) -> None:
    """Raise ConfigError for what the plugin has no setting of, or would refuse at the start."""
    for name, value in model.unusual().items():
        raise ConfigError(
            f"the model's own {name} = {value!r} cannot be exported for vLLM, which takes strength and weights alone: "
            f"set it to {NEUTRAL[name][0]!r}, use `qadapter serve`, or distil the policy (qadapter.export.distil)."
        )
    for name, config in model.peft_model.peft_config.items():
        if config.use_dora and model.adapter_weights.get(name):  # of weight 0 the plugin reads nothing
            raise ConfigError(
                f"{name!r} is a DoRA adapter, which rescales the base's own output: that is not supported on vLLM. "
                "Serve it with `qadapter serve`, or merge it (`qadapter export --format merged`)."
            )


def base_folder(model: QAdapterForCausalLM) -> Path:
    """Where the base's files are on this machine; fetched from the hub if they are not.

    Raises:
        ConfigError: there is no config.json or no safetensors file.
    """
    source = model.base_source
    if os.path.isdir(source.path):
        folder = Path(source.path)
    else:
        folder = Path(
            snapshot_download(
                source.path,
                revision=source.hub_revision,
                allow_patterns=list(BASE_FILES),
                ignore_patterns=[f"{MISTRAL_FILES}*"],
            )
        )
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder} has no config.json with safetensors beside it: vLLM needs the base's own files.")
    return folder


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
