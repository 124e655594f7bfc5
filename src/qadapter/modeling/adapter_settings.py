"""What an adapter may be called, and the layers it is for."""

import warnings

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from qadapter.errors import ConfigError


def check_adapter_names(names: list[str]) -> None:
    """Raise ConfigError unless there are adapters whose names can be told from PEFT's and PyTorch's own names."""
    if not names:
        raise ConfigError("no adapter was given: a policy needs at least one.")
    for name in names:
        # PEFT keeps each adapter's matrices in a ModuleDict, under its name.
        if hasattr(torch.nn.ModuleDict, name) or name == "training":
            raise ConfigError(f"adapter name {name!r} is an attribute of PyTorch's modules: choose another.")
        if name in "lora_" or "lora_" in name or "." in name:
            raise ConfigError(f"adapter name {name!r} cannot be told from PEFT's parameter names: choose another.")
        if "+" in name:
            raise ConfigError(f"adapter name {name!r}: a + stands for several adapters, choose another.")


def warn_of_missing_targets(peft_config: LoraConfig, base: PreTrainedModel) -> None:
    """Warn of names in target_modules that the base does not have: PEFT says so only where all of them are missing."""
    if not isinstance(targets := getattr(peft_config, "target_modules", None), list | set):
        return  # a regular expression, or a word for many layers
    paths = [f".{path}" for path, _ in base.named_modules()]
    missing = sorted(name for name in targets if not any(path.endswith(f".{name}") for path in paths))
    if 0 < len(missing) < len(targets):
        warnings.warn(
            f"target_modules: no layer of {type(base).__name__} is called {', '.join(map(repr, missing))}; "
            "only the others are adapted.",
            stacklevel=3,
        )


def default_peft_config() -> LoraConfig:
    """LoRA of rank 8 on every linear layer but the head."""
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
