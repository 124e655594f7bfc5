"""The trained policy in one pass of the base: its adapter folded into the base's weights for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qadapter.errors import ConfigError
from qadapter.modeling.streams import StreamLinear

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextmanager
def folded(base: PreTrainedModel, adapter: str) -> Iterator[None]:
    """Within the context, the adapter's layers hold W + ΔW; afterwards the very weights that they had.

    The sums are new weights, so memory grows by their size, and what else a weight is tied to (a head to the
    embeddings) keeps its own. Layers raise ConfigError for any other stream than the adapter's.

    Raises:
        ConfigError: an adapted layer is quantised, so that ΔW cannot be added to its weights.
    """
    layers = {name: m for name, m in base.named_modules() if isinstance(m, StreamLinear) and adapter in m.lora_A}
    for name, layer in layers.items():
        if not isinstance(layer.base_layer, nn.Linear | Conv1D) or not is_plain(layer.base_layer.weight):
            kind = type(layer.base_layer).__name__
            raise ConfigError(
                f"{name} is a {kind}, quantised or sharded: no adapter can be folded into it. Run it beside."
            )
    originals = {name: layer.base_layer.weight for name, layer in layers.items()}
    try:
        for layer in layers.values():
            weight = layer.base_layer.weight
            layer.base_layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            layer.merge(adapter_names=[adapter])
        yield
    finally:
        for name, layer in layers.items():
            layer.base_layer.weight = originals[name]
            layer.merged_adapters.clear()


def is_plain(weight: object) -> bool:
    """Whether a weight is a matrix of numbers that others can be added to; quantised ones are of other kinds."""
    return type(weight) is nn.Parameter and weight.dtype in PLAIN


def require_unfolded(base: nn.Module) -> None:
    """Raise ConfigError if an adapter is folded into the weights, which then are not the base's."""
    if any(isinstance(module, StreamLinear) and module.merged for module in base.modules()):
        raise ConfigError("the adapter is folded into the base's weights: leave `policy.merged()` first.")
