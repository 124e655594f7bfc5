"""What identifies a base model and its tokenizer in an adapter folder; cheap, by samples of the weights.

`base_digest` is of every number, for what must not outlive any change.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from qadapter.errors import ConfigError

# Values a tensor contributes to the fingerprint: enough to notice another checkpoint, cheap for any size.
FINGERPRINT_VALUES = 64


class WeightSample(NamedTuple):
    """Shape and sampled values of a weight."""

    shape: tuple[int, ...]
    values: bytes


def weight_fingerprint(
    model: torch.nn.Module, gathered: Mapping[str, torch.Tensor] | None = None, linear: bool = True
) -> str:
    """SHA-256 over names, shapes and sampled values of the frozen weights; adapters are left out.

    Values are rounded to bfloat16, so that the same checkpoint in float32 and in bfloat16 has one fingerprint. Of a
    model that is sharded over processes, the values are those of its `gathered` state_dict.

    Args:
        linear: False leaves out the linear layers, whose weights quantising changes, in other ways on other machines.
            (A head that is tied to the embeddings counts as these.)
    """
    left_out = () if linear else _parameters_of_linear_layers(model)
    return combined_fingerprint(
        {
            name.replace(".base_layer.", ".").removeprefix("base."): weight_sample(
                gathered[name] if gathered else parameter
            )
            for name, parameter in model.named_parameters()
            if "lora_" not in name and name not in left_out
        }
    )


def _parameters_of_linear_layers(model: torch.nn.Module) -> set[str]:
    return {
        f"{place}.{name}"
        for place, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        for name, _ in module.named_parameters(recurse=False)
    }


def weight_sample(weight: torch.Tensor) -> WeightSample:
    """What one weight contributes to the fingerprint; engines that never hold the model whole take it as they read."""
    values = weight.detach().flatten()
    sample = values[:: max(1, values.numel() // FINGERPRINT_VALUES)][:FINGERPRINT_VALUES]
    if sample.dtype.is_floating_point:
        sample = sample.to(torch.bfloat16).view(torch.int16)
    return WeightSample(tuple(weight.shape), sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())


def combined_fingerprint(samples: Mapping[str, WeightSample]) -> str:
    """The fingerprint of the weights with these names and samples."""
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(f"{name}{samples[name].shape}".encode())
        digest.update(samples[name].values)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, str]:
    """SHA-256 of a tokenizer's vocabulary with its special tokens, and of its chat template."""
    if not hasattr(tokenizer, "get_vocab"):
        raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}: give a loaded one, AutoTokenizer's.")
    vocabulary = repr(sorted(tokenizer.get_vocab().items())) + repr(sorted(tokenizer.special_tokens_map.items()))
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name, which a folder gives back in another order
        template = dict(sorted(template.items()))
    return {
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "chat_template": hashlib.sha256(repr(template).encode()).hexdigest(),
    }
