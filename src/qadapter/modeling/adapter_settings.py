"""What an adapter may be called, and the layers it is for."""

import copy
import logging
import re
import warnings

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qadapter.errors import ConfigError

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"  # every linear layer of the decoder that an adapter can be on
# Classes whose linear layers choose among experts or tokens, see a part of the tokens only, or are read for their
# weights without being called (Gemma 3n's AltUp).
NOT_ADAPTED = re.compile(r"Router|TopK|MoE\w*Gate$|Experts|Indexer|AltUp")
# Of Mamba, which has these parameters, the layers whose weights kernels (of Jamba its forward, too) read.
STATE_SPACE = {"A_log", "D"}
READ_BY_KERNELS = {"x_proj", "dt_proj", "out_proj"}


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


def with_named_targets(peft_config: LoraConfig, base: PreTrainedModel) -> LoraConfig:
    """The config with the layers of `base` that "all-linear" stands for; itself where it names others."""
    if getattr(peft_config, "target_modules", None) != ALL_LINEAR or not isinstance(base, PreTrainedModel):
        return peft_config
    peft_config = copy.copy(peft_config)
    peft_config.target_modules = set(linear_targets(base))
    return peft_config


def linear_targets(base: PreTrainedModel) -> list[str]:
    """The names of the linear layers of the decoder that an adapter is on by default; what is left out is logged.

    PEFT's own choice takes the layers for images and sounds in as well, which no text trains, and fails on a mixture of
    experts, whose fused weights it counts as layers by the names that they once had.
    """
    inside, head, known_to_peft = set(base.get_decoder().modules()), base.get_output_embeddings(), _layer_names(base)
    targets, apart, left_out = [], set[nn.Module](), set()
    for name, module in base.named_modules():
        if module not in inside or module in apart or module is head:
            continue
        path, _, own_name = name.rpartition(".")
        owner = base.get_submodule(path)
        if NOT_ADAPTED.search(type(module).__name__) or own_name == "experts":
            apart.update(module.modules())
            left_out.add(f"{type(owner).__name__}.{own_name}")
        elif isinstance(module, nn.Linear | Conv1D):
            parameters = {parameter for parameter, _ in owner.named_parameters(recurse=False)}
            unseen = own_name in READ_BY_KERNELS and parameters >= STATE_SPACE
            if unseen or own_name not in known_to_peft or not is_linear_map(module):
                left_out.add(f"{type(owner).__name__}.{own_name}")
            else:
                targets.append(name)
    if left_out:
        logger.info("all-linear: of %s these are left out: %s.", type(base).__name__, ", ".join(sorted(left_out)))
    return targets


def _layer_names(base: PreTrainedModel) -> set[str]:
    """The last parts of the names of linear layers, less those that PEFT takes for fused experts in this base."""
    config = LoraConfig(target_modules=ALL_LINEAR)
    convert_peft_config_for_transformers(config, base, None)
    if isinstance(config.target_modules, str):  # nothing is fused
        return {name.rpartition(".")[2] for name, _ in base.named_modules()}
    return set(config.target_modules or ())


@torch.no_grad()
def is_linear_map(layer: nn.Module) -> bool:
    """Whether a linear layer gives one tensor of its features, to which an update can be added: a router need not.

    A class with a forward of its own is tried out, unless its weights are quantised, sharded or not loaded yet.
    """
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward) or not isinstance(layer, nn.Linear):
        return True
    weight = layer.weight
    if type(weight) is not nn.Parameter or weight.is_meta or weight.numel() == 0 or weight.dtype.itemsize < 2:
        return True
    try:
        output = layer(weight.new_zeros(1, layer.in_features))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return isinstance(output, Tensor) and output.shape == (1, layer.out_features)


def default_peft_config() -> LoraConfig:
    """LoRA of rank 8 on every linear layer of the decoder (`linear_targets`)."""
    return LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEAR, task_type="CAUSAL_LM")
