"""Exact exports: the residual form with α₀ = α̃ is a plain LoRA at strength 1, with interpolated weights at any."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qadapter.errors import ConfigError
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.checkpoint import write_adapter, write_json
from qadapter.modeling.quantised import require_unquantised
from qadapter.modeling.streams import StreamLinear
from qadapter.new_folders import into_new_folder, set_mode_of_weights

CHECKED_TOKENS = 64


def require_exact(model: QAdapterForCausalLM, interpolated: float | None = None) -> str:
    """The only adapter's name.

    Args:
        interpolated: the strength of a policy with interpolated weights; None for the policy at strength 1.

    Raises:
        ConfigError: the policy is no single LoRA: several adapters, or settings that need the base stream.
    """
    name = model.adapters[0]
    if reason := _need_of_streams(model, name, interpolated):
        raise ConfigError(
            f"this policy cannot be merged exactly: {reason}. Distil it into a plain LoRA instead "
            "(qadapter export --format distilled --prompts-file FILE)."
        )
    return name


def _need_of_streams(model: QAdapterForCausalLM, name: str, interpolated: float | None) -> str | None:
    """Why the policy is not the stream of the adapter `name` alone, scaled or not; None if it is."""
    if len(model.adapters) > 1:
        return f"it has {len(model.adapters)} adapters"
    if model.configs[name].parametrisation == "logits":
        return "it is of the logits form"
    if not model.configs[name].single_stream:
        return "alpha_0 differs from alpha_tilde"
    if interpolated is not None:
        if any(isinstance(m, StreamLinear) and name in m.lora_variant for m in model.base.modules()):
            return "DoRA's weights do not grow with the strength alone"
        return None
    if model.adapter_weights[name] != 1.0:
        return f"its adapter has weight {model.adapter_weights[name]:g}"
    return None


def scale_of(model: QAdapterForCausalLM, name: str, interpolated: float | None) -> float:
    """What the adapter's update counts for: 1, or with interpolated weights its strength times its weight."""
    return 1.0 if interpolated is None else interpolated * model.adapter_weights[name]


def export_merged(
    model: QAdapterForCausalLM,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    interpolated: float | None = None,
) -> float:
    """Write the policy as a plain checkpoint; the largest logit difference between the two.

    The checkpoint is loaded again to measure it. In bfloat16 the merged weights are rounded, which the figure shows.

    Args:
        interpolated: the strength of a policy with `interpolation="weights"`; None writes the policy at strength 1.
    """
    require_mergeable(model, interpolated)
    return into_new_folder(Path(folder), lambda scratch: write_merged(model, scratch, tokenizer, interpolated))


def require_mergeable(model: QAdapterForCausalLM, interpolated: float | None = None) -> None:
    """Raise ConfigError unless the policy is the base with other weights, which can be written."""
    require_exact(model, interpolated)
    require_unquantised(model.base, "merging would round the adapter away")


def write_merged(model: QAdapterForCausalLM, folder: Path, tokenizer: Any, interpolated: float | None = None) -> float:
    """Fill `folder` as `export_merged` does."""
    name = require_exact(model, interpolated)
    model.base.save_pretrained(folder, state_dict=merged_state(model, name, scale_of(model, name, interpolated)))
    set_mode_of_weights(folder / "config.json")
    _untie_a_changed_head(model, name, folder / "config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, use_safetensors=True).to(model.device)
    return largest_difference(model, merged, interpolated)


def _untie_a_changed_head(model: QAdapterForCausalLM, adapter: str, config_path: Path) -> None:
    """Say in config.json that the head is not the embeddings any more where it alone has an adapter.

    transformers 5 sees it by the weights; transformers 4, vLLM and some of llama.cpp's converters go by the config, of
    a multimodal model by the text's part of it.
    """
    head = model.base.get_output_embeddings()
    if isinstance(head, StreamLinear) and adapter in head.lora_A:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        text = model.base.config.get_text_config(decoder=True)
        for part in (config, *(config[name] for name in config if getattr(model.base.config, name, None) is text)):
            part["tie_word_embeddings"] = False
        write_json(config_path, config)


def merged_state(model: QAdapterForCausalLM, adapter: str, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The base's state dict, under its own names, with so much of the adapter's update added; the model stays."""
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
            state[key] = (state[key].to(wide) + scale * delta.to(wide)).to(state[key].dtype)
    return state


@torch.no_grad()
def largest_difference(policy: QAdapterForCausalLM, other: PreTrainedModel, interpolated: float | None = None) -> float:
    """The largest absolute difference of logits between the policy and a plain model."""
    vocabulary = policy.config.get_text_config(decoder=True).vocab_size
    ids = ((torch.arange(CHECKED_TOKENS, device=policy.device) + 1) * 7919 % vocabulary).unsqueeze(0)
    dial: dict[str, Any] = {"strength": 1.0} if interpolated is None else {
        "strength": interpolated, "interpolation": "weights"}  # fmt: skip
    ours = policy(ids, use_cache=False, **dial).logits.float()
    return float((ours - other.eval()(ids, use_cache=False).logits.float()).abs().max())


def export_lora(
    model: QAdapterForCausalLM,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    interpolated: float | None = None,
) -> None:
    """Write the adapter as a plain PEFT LoRA: exactly the policy, of which `interpolated` is as of `export_merged`."""
    name = require_exact(model, interpolated)

    def write(scratch: Path) -> None:
        write_adapter(model, name, scratch, scale=scale_of(model, name, interpolated))
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)

    into_new_folder(Path(folder), write)
