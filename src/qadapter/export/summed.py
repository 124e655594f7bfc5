"""Several adapters as one plain LoRA: their ranks side by side, which is the sum of their updates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.bases import load_base
from qadapter.modeling.streams import StreamLinear
from qadapter.new_folders import set_mode_of_weights


@torch.no_grad()
def summed_lora(model: QAdapterForCausalLM, factors: Mapping[str, float]) -> Any:
    """A plain PEFT LoRA on a copy of the base: the sum of the policy's adapters, each times its factor.

    DoRA's magnitudes have no place in a plain LoRA: such adapters are left out.
    """
    modules = {name: module for name, module in model.base.named_modules() if isinstance(module, StreamLinear)}
    rank = sum(max(module.r.get(name, 0) for module in modules.values()) for name in model.adapters)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(modules), task_type="CAUSAL_LM")
    summed = get_peft_model(load_base(model.base_source, dtype=model.dtype), config).to(model.device)
    named = summed.peft_config["default"]  # after the base as adapters remember it, not where it lies on this machine
    named.base_model_name_or_path, named.revision = model.base_source.name, model.base_source.hub_revision
    layers = dict(summed.get_base_model().named_modules())
    for name, module in modules.items():
        row, target = 0, layers[name]
        for adapter, lora_a in module.lora_A.items():
            if adapter not in module.lora_variant:
                part = slice(row, row + module.r[adapter])
                scale = module.scaling[adapter] * factors.get(adapter, 0.0)
                target.lora_A["default"].weight[part] = lora_a.weight
                target.lora_B["default"].weight[:, part] = module.lora_B[adapter].weight * scale
                row = part.stop
    return summed


def write_plain_lora(lora: Any, folder: Path) -> None:
    """Fill `folder` with a LoRA's weights and config, as PEFT does."""
    lora.save_pretrained(folder, save_embedding_layers=False)
    set_mode_of_weights(folder / "adapter_config.json")
