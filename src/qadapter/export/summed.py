"""Several adapters as one plain LoRA: their ranks side by side, which is the sum of their updates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.bases import load_base
from qadapter.modeling.lora_files import CONFIG_NAME, WEIGHTS_NAME, write_adapter_config
from qadapter.modeling.streams import StreamLinear
from qadapter.new_folders import set_mode_of_weights

Updates = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def summed_updates(model: QAdapterForCausalLM, factors: Mapping[str, float]) -> Updates:
    """{adapted layer: (A, B)}, whose product B A is the sum of the layer's updates, each times its adapter's factor.

    DoRA's magnitudes have no place in a plain LoRA: of such an adapter there are the ranks, and no update.
    """
    updates = {}
    for name, module in model.base.named_modules():
        used = [part for part in factors if isinstance(module, StreamLinear) and part in module.lora_A]
        if used:
            scales = [0.0 if part in module.lora_variant else module.scaling[part] * factors[part] for part in used]
            scaled = [module.lora_B[part].weight * scale for part, scale in zip(used, scales, strict=True)]
            updates[name] = torch.cat([module.lora_A[part].weight for part in used]), torch.cat(scaled, 1)
    return updates


def summed_config(updates: Updates) -> LoraConfig:
    """The config of a LoRA that holds the updates as they are, at the rank of the largest one."""
    rank = max(len(a) for a, _ in updates.values())
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(updates), task_type="CAUSAL_LM")


@torch.no_grad()
def summed_lora(model: QAdapterForCausalLM, factors: Mapping[str, float]) -> Any:
    """A plain PEFT LoRA on a copy of the base: the sum of the policy's adapters, each times its factor."""
    updates = summed_updates(model, factors)
    summed = get_peft_model(load_base(model.base_source, dtype=model.dtype), summed_config(updates)).to(model.device)
    named = summed.peft_config["default"]  # after the base as adapters remember it, not where it lies on this machine
    named.base_model_name_or_path, named.revision = model.base_source.name, model.base_source.hub_revision
    layers = dict(summed.get_base_model().named_modules())
    for name, (a, b) in updates.items():
        layers[name].lora_A["default"].weight[: len(a)] = a
        layers[name].lora_B["default"].weight[:, : len(a)] = b
    return summed


def write_summed_lora(model: QAdapterForCausalLM, factors: Mapping[str, float], folder: Path) -> None:
    """Fill `folder` with the files of such a LoRA; the base is not loaded again."""
    updates = summed_updates(model, factors)
    config, tensors = summed_config(updates), {}
    for name, (a, b) in updates.items():
        missing = config.r - len(a)
        tensors[f"base_model.model.{name}.lora_A.weight"] = F.pad(a, (0, 0, 0, missing)).contiguous().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = F.pad(b, (0, missing)).contiguous().cpu()
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    write_adapter_config(folder / CONFIG_NAME, config, tensors, model.base_source)
    set_mode_of_weights(folder / CONFIG_NAME)
