"""Exact exports: at strength 1, the residual form with α₀ = α̃ is a plain LoRA, and merging it is exact."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qadapter.errors import ConfigError
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.checkpoint import write_adapter
from qadapter.modeling.streams import StreamLinear

CHECKED_TOKENS = 64


def require_exact(model: QAdapterForCausalLM) -> str:
    """The only adapter's name.

    Raises:
        ConfigError: the policy is no single LoRA: several adapters, or settings that need the base stream.
    """
    name, *others = model.adapters
    if others or not model.configs[name].single_stream:
        reason = f"it has {len(others) + 1} adapters" if others else "alpha_0 differs from alpha_tilde"
        if not others and model.configs[name].parametrisation == "logits":
            reason = "it is of the logits form"
        raise ConfigError(
            f"this policy cannot be merged exactly: {reason}. Distil it into a plain LoRA instead "
            "(qadapter export --format distilled --prompts-file FILE)."
        )
    return name


def export_merged(model: QAdapterForCausalLM, folder: str | os.PathLike[str], tokenizer: Any = None) -> float:
    """Write the policy at strength 1 as a plain checkpoint; the largest logit difference between the two.

    The checkpoint is loaded again to measure it. In bfloat16 the merged weights are rounded, which the figure shows.
    """
    name = require_exact(model)
    _refuse_quantised(model)

    def write(scratch: Path) -> None:
        state = merged_state(model, name)
        model.base.save_pretrained(scratch, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)

    into_new_folder(Path(folder), write)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, use_safetensors=True).to(model.device)
    return largest_difference(model, merged)


def merged_state(model: QAdapterForCausalLM, adapter: str) -> dict[str, torch.Tensor]:
    """The base's state dict with the adapter's update added, under the base's own names; the model stays as it is."""
    state = {}
    for key, value in model.base.state_dict().items():
        if ".lora_" not in key:
            state[key.replace(".base_layer.", ".")] = value
    for name, module in model.base.named_modules():
        if isinstance(module, StreamLinear) and adapter in module.lora_A:
            key = f"{name}.weight"
            if adapter in module.lora_variant:  # DoRA scales the sum
                delta = module.lora_variant[adapter].merge_safe(module, adapter, state[key].clone()) - state[key]
            else:
                delta = module.get_delta_weight(adapter)
            wide = torch.promote_types(state[key].dtype, torch.float32)
            state[key] = (state[key].to(wide) + delta.to(wide)).to(state[key].dtype)
    return state


def _refuse_quantised(model: QAdapterForCausalLM) -> None:
    if getattr(model.base, "is_quantized", False):
        raise ConfigError(
            "the base is quantised: merging would round the adapter away. Load it unquantised (drop --load-in-*)."
        )


@torch.no_grad()
def largest_difference(policy: QAdapterForCausalLM, other: PreTrainedModel) -> float:
    """The largest absolute difference of logits between the policy at strength 1 and a plain model."""
    vocabulary = policy.config.get_text_config(decoder=True).vocab_size
    ids = ((torch.arange(CHECKED_TOKENS, device=policy.device) + 1) * 7919 % vocabulary).unsqueeze(0)
    weights = dict.fromkeys(policy.adapters, 1.0)
    ours = policy(ids, strength=1.0, adapter_weights=weights, use_cache=False).logits.float()
    return float((ours - other.eval()(ids, use_cache=False).logits.float()).abs().max())


def export_lora(model: QAdapterForCausalLM, folder: str | os.PathLike[str], tokenizer: Any = None) -> None:
    """Write the adapter as a plain PEFT LoRA: the policy at strength 1, exactly."""
    name = require_exact(model)

    def write(scratch: Path) -> None:
        write_adapter(model, name, scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)

    into_new_folder(Path(folder), write)


def into_new_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a scratch folder that becomes `folder` only when it is whole.

    Raises:
        ConfigError: `folder` exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output folder {folder} exists and is not empty: choose another one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".exporting-") as name:
        scratch = Path(name) / "export"
        scratch.mkdir()
        write(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
