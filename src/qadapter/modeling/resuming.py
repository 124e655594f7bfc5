"""A checkpoint's adapters into the model that goes on training."""

import os
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from qadapter.errors import AdapterFormatError
from qadapter.modeling.fingerprints import weight_fingerprint
from qadapter.modeling.loading import load_tensors
from qadapter.modeling.lora_files import read_adapter
from qadapter.modeling.manifest import read_manifest
from qadapter.modeling.policy import QAdapterForCausalLM
from qadapter.modeling.quantised import described, quantisation_of


def load_adapter_weights(model: QAdapterForCausalLM, folder: str | os.PathLike[str]) -> None:
    """Load the adapters of a checkpoint into a model of the same base and settings, as resuming does.

    Raises:
        AdapterFormatError: the checkpoint is of another base or of other settings.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    quantisation = quantisation_of(model.base)
    if quantisation != manifest.base["quantization"]:
        raise AdapterFormatError(
            f"{root}: this checkpoint's base was {described(manifest.base['quantization'])}, not "
            f"{described(quantisation)}. Resume with the same --load-in-4bit or --load-in-8bit, or without them."
        )
    if weight_fingerprint(model.base, linear=quantisation is None) != manifest.base["fingerprint"]:
        raise AdapterFormatError(
            f"{root}: this checkpoint belongs to another base model ({manifest.base['name']!r}), not to "
            f"{model.base_source.name!r}. Resume with the same --model, or choose a new output folder."
        )
    settings = {name: config.to_dict() for name, config in model.configs.items()}
    if settings != manifest.configs:
        raise AdapterFormatError(
            f"{root}: this checkpoint was trained with other settings ({manifest.configs} instead of {settings}). "
            "Resume with the same settings, or choose a new output folder."
        )
    for name in manifest.configs:
        stored, tensors = read_adapter(root, name)
        own: Any = model.peft_model.peft_config[name]  # a LoRA's, which PEFT types as any adapter's
        _check_scale(own, stored, root)
        load_tensors(model, name, tensors, root)


def _check_scale(own: LoraConfig, stored: LoraConfig, root: Path) -> None:
    """Refuse a checkpoint whose tensors would count for more or less here: its scale is not among them."""
    pairs = [("use_rslora", stored.use_rslora, own.use_rslora, "")]
    for module in sorted(stored.target_modules or ()):
        place = f" at {module}" if own.alpha_pattern or stored.alpha_pattern else ""
        pairs.append(("lora_alpha", _alpha(stored, module), _alpha(own, module), place))
    for setting, then, now, place in pairs:
        if then != now:
            raise AdapterFormatError(
                f"{root}: this checkpoint was trained with {setting} = {then} instead of {now}{place}. "
                "Resume with the same settings, or choose a new output folder."
            )


def _alpha(config: LoraConfig, module: str) -> float:
    return config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
