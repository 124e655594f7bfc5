"""Exact exports: the residual form with α₀ = α̃ is a plain LoRA at strength 1, with interpolated weights at any.

A composition of interpolated weights is one, too: the sum of its adapters' updates.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qadapter.data.encoding import trained_end
from qadapter.errors import ConfigError
from qadapter.export.summed import write_summed_lora
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.bases import context_limit, loading_class
from qadapter.modeling.checkpoint import write_adapter
from qadapter.modeling.policy_part import NEUTRAL
from qadapter.modeling.quantised import require_unquantised
from qadapter.modeling.streams import StreamLinear
from qadapter.new_folders import into_new_folder, set_mode_of_weights, write_json

CHECKED_TOKENS = 64


def exact_factors(model: QAdapterForCausalLM, interpolated: float | None = None) -> dict[str, float]:
    """What the update of each adapter counts for in the one LoRA that the policy is.

    Args:
        interpolated: the strength of a policy with interpolated weights; None for the policy at strength 1.

    Raises:
        ConfigError: the policy is no LoRA: it mixes logits, or its settings need the base stream.
    """
    for name, value in model.unusual().items():
        if name != "interpolation":
            raise ConfigError(
                f"the model's own {name} = {value!r} is not part of any LoRA: set it to {NEUTRAL[name][0]!r}, or "
                "distil the policy (qadapter.export.distil)."
            )
    weights = {name: weight for name, weight in model.adapter_weights.items() if weight}
    if reason := _need_of_streams(model, weights, interpolated):
        raise ConfigError(
            f"this policy cannot be merged exactly: {reason}, or distil it into a plain LoRA (qadapter export --format "
            "distilled --prompts-file FILE)."
        )
    return {name: (1.0 if interpolated is None else interpolated) * weight for name, weight in weights.items()}


def _need_of_streams(
    model: QAdapterForCausalLM, weights: Mapping[str, float], interpolated: float | None
) -> str | None:
    """Why the policy is not the base with the weighted updates added, and a way out; None if it is."""
    for name in weights:
        if model.configs[name].parametrisation == "logits":
            return "it is of the logits form. Use `qadapter serve`"
        if not model.configs[name].single_stream:
            return "alpha_0 differs from alpha_tilde. Use `qadapter serve`"
        if interpolated is not None and any(
            isinstance(module, StreamLinear) and name in module.lora_variant for module in model.base.modules()
        ):
            return "DoRA's weights do not grow with the strength alone. Take strength 1 without interpolation"
    if not weights:
        return "every adapter has weight 0, which is the base. Give one a weight"
    mixed = "Add --interpolation weights (interpolated=1.0 in Python) to mix weights instead"
    if interpolated is None and len(weights) > 1:
        return f"it mixes {len(weights)} adapters' logits. {mixed}"
    if interpolated is None and set(weights.values()) != {1.0}:
        return f"its adapter has weight {next(iter(weights.values())):g}. {mixed}"
    return None


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
    exact_factors(model, interpolated)
    require_unquantised(model.base, "merging would round the adapter away")


def write_merged(model: QAdapterForCausalLM, folder: Path, tokenizer: Any, interpolated: float | None = None) -> float:
    """Fill `folder` as `export_merged` does."""
    factors = exact_factors(model, interpolated)
    model.base.save_pretrained(folder, state_dict=merged_state(model, factors))
    set_mode_of_weights(folder / "config.json")
    _untie_a_changed_head(model, factors, folder / "config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        name_the_trained_end(folder, tokenizer)
    kind = loading_class(model.base.config, model.base_source.name)
    merged = kind.from_pretrained(folder, dtype=model.dtype, use_safetensors=True).to(model.device)
    return largest_difference(model, merged, interpolated)


def name_the_trained_end(folder: Path, tokenizer: Any) -> None:
    """Have generation stop where answers were trained to end, which the base's own settings need not know."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = settings.get("eos_token_id", config.get("eos_token_id"))
    ends = known if isinstance(known, list) else [known]
    end = trained_end(tokenizer)
    if end is not None and end not in ends:
        settings["eos_token_id"] = [*(token for token in ends if token is not None), end]
        write_json(path, settings)


def _untie_a_changed_head(model: QAdapterForCausalLM, adapters: Collection[str], config_path: Path) -> None:
    """Say in config.json that the head is not the embeddings any more where one of the adapters is on it alone.

    transformers 5 sees it by the weights; transformers 4, vLLM and some of llama.cpp's converters go by the config, of
    a multimodal model by the text's part of it.
    """
    head = model.base.get_output_embeddings()
    if isinstance(head, StreamLinear) and not head.lora_A.keys().isdisjoint(adapters):
        config = json.loads(config_path.read_text(encoding="utf-8"))
        text = model.base.config.get_text_config(decoder=True)
        for part in (config, *(config[name] for name in config if getattr(model.base.config, name, None) is text)):
            part["tie_word_embeddings"] = False
        write_json(config_path, config)


def merged_state(model: QAdapterForCausalLM, factors: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """The base's state dict, under its own names, with so much of each adapter's update added; the model stays."""
    state = {}
    for key, value in model.base.state_dict().items():
        if ".lora_" not in key:
            state[key.replace(".base_layer.", ".")] = value
    for name, module in model.base.named_modules():
        touching = [adapter for adapter in factors if isinstance(module, StreamLinear) and adapter in module.lora_A]
        if touching:
            key = f"{name}.weight"
            wide = torch.promote_types(state[key].dtype, torch.float32)
            merged = state[key].to(wide)
            for adapter in touching:
                merged = merged + factors[adapter] * _update(module, adapter, state[key]).to(wide)
            state[key] = merged.to(state[key].dtype)
    return state


def _update(module: StreamLinear, adapter: str, weight: torch.Tensor) -> torch.Tensor:
    """What the adapter adds to the weight."""
    if adapter in module.lora_variant:  # DoRA scales the sum
        return module.lora_variant[adapter].merge_safe(module, adapter, weight.clone()) - weight
    return module.get_delta_weight(adapter)


@torch.no_grad()
def largest_difference(policy: QAdapterForCausalLM, other: PreTrainedModel, interpolated: float | None = None) -> float:
    """The largest absolute difference of logits between the policy and a plain model."""
    vocabulary = policy.config.get_text_config(decoder=True).vocab_size
    tokens = min(CHECKED_TOKENS, context_limit(policy.config) or CHECKED_TOKENS)
    ids = ((torch.arange(tokens, device=policy.device) + 1) * 7919 % vocabulary).unsqueeze(0)
    dial: dict[str, Any] = {"strength": 1.0, "interpolation": "logits"} if interpolated is None else {
        "strength": interpolated, "interpolation": "weights"}  # fmt: skip
    ours = policy(ids, use_cache=False, **dial).logits.float()
    return float((ours - other.eval()(ids, use_cache=False).logits.float()).abs().max())


def export_lora(
    model: QAdapterForCausalLM,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    interpolated: float | None = None,
) -> None:
    """Write the policy, of which `interpolated` is as of `export_merged`, as one plain PEFT LoRA, exactly.

    Several adapters become one with their ranks side by side.
    """
    factors = exact_factors(model, interpolated)

    def write(scratch: Path) -> None:
        if len(factors) == 1:
            ((name, factor),) = factors.items()
            write_adapter(model, name, scratch, scale=factor)
        else:
            write_summed_lora(model, factors, scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)

    into_new_folder(Path(folder), write)
