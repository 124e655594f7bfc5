"""The trunk: the layers below the first adapted one, which all streams share.

No adapter touches the trunk, so its hidden states are the same in every stream: they are computed once and forked
where the streams part. In training the base's pass keeps them (`KeepTrunk`) and the adapter's goes on from there
(`FromTrunk`); in decoding one pass repeats its rows at the fork (`ForkRows`), and the layers of the trunk hold one
key-value cache for all streams. Embeddings, masks, positions and the final norm stay the architecture's own code.

Decoder layers follow a `StreamPlan` through a class made for each kind of layer, as FSDP2 does it: names, weights and
`isinstance` stay what they were.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapter.errors import ConfigError
from qadapter.modeling.adapter_settings import ALL_LINEAR, linear_targets
from qadapter.modeling.streams import StreamLinear, StreamPlan, repeat_rows
from qadapter.modeling.trial_runs import UNFIT, can_run

Run = Callable[..., Any]


class LayerPass(Protocol):
    """What a pass of the decoder does at each layer; `run` is the layer itself."""

    def __call__(self, index: int, run: Run, hidden: Tensor, *args: Any, **kwargs: Any) -> Any: ...


class KeepTrunk:
    """An ordinary pass that keeps the hidden states (B, T, H) which enter layer `first`, as `states`."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.states: Tensor | None = None

    def __call__(self, index: int, run: Run, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if index == self.first:
            self.states = hidden
        return run(hidden, *args, **kwargs)


class FromTrunk:
    """A pass that begins at layer `first` with given hidden states; the layers below are left out."""

    def __init__(self, first: int, states: Tensor) -> None:
        self.first, self.states = first, states

    def __call__(self, index: int, run: Run, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if index < self.first:
            return hidden
        return run(self.states if index == self.first else hidden, *args, **kwargs)


class ForkRows:
    """A pass of `rows` rows below layer `first`, and of `times` stacked copies of them from there on."""

    def __init__(self, first: int, rows: int, times: int) -> None:
        self.first, self.rows, self.times = first, rows, times

    def __call__(self, index: int, run: Run, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if index < self.first:
            return run(hidden, *args, **kwargs)
        if index == self.first:
            hidden = repeat_rows(hidden, self.times, self.rows)
        args, kwargs = repeat_rows((args, kwargs), self.times, self.rows)
        return run(hidden, *args, **kwargs)


class StreamLayer(nn.Module):
    """A decoder layer that lets the running pass of its plan decide; mixed into the layer's own class."""

    plan: StreamPlan
    layer_index: int

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """How pickle and copy make the layer again: its class is in no module."""
        return empty_stream_layer, (type(self).__bases__[1],), *super().__reduce_ex__(protocol)[2:]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, or what the running pass makes of it."""
        if self.plan.layer_pass is None:
            return super().__call__(hidden_states, *args, **kwargs)
        return self.plan.layer_pass(self.layer_index, super().__call__, hidden_states, *args, **kwargs)


@functools.cache
def stream_layer_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """The layer's class with `StreamLayer` before it; it keeps its name, by which FSDP finds the layers to wrap."""
    return type(layer_class.__name__, (StreamLayer, layer_class), {"__module__": layer_class.__module__})


def empty_stream_layer(layer_class: Any) -> nn.Module:
    """A layer of the class with streams, made from the bare layer's class, that has no state yet."""
    made = stream_layer_class(layer_class)
    return made.__new__(made)


def decoder_layers(base: PreTrainedModel) -> nn.ModuleList | None:
    """The decoder's list of layers, or None for an architecture that has no single one."""
    depth = getattr(base.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [m for m in base.get_decoder().children() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return lists[0] if len(lists) == 1 else None


def with_first_layer(peft_config: LoraConfig, base: PreTrainedModel, first: int) -> LoraConfig:
    """A copy of the config that adapts decoder layer `first` (from 0) and those above it.

    Raises:
        ConfigError: the decoder has no single list of layers, or no such layer, or the targets are an expression.
    """
    layers = decoder_layers(base)
    if layers is None:
        raise ConfigError(
            f"first_adapted_layer = {first}: the decoder of {type(base).__name__} is no single list of layers, so none "
            "can be left to the trunk. Leave first_adapted_layer out."
        )
    if not 0 <= first < len(layers):
        raise ConfigError(f"first_adapted_layer = {first}: {base.name_or_path} has layers 0 to {len(layers) - 1}.")
    targets = peft_config.target_modules
    if targets == ALL_LINEAR:
        adapted = {module for layer in layers[first:] for module in layer.modules()}
        names = [name for name in linear_targets(base) if base.get_submodule(name) in adapted]
        return replace(peft_config, target_modules=names)
    if isinstance(targets, str):
        raise ConfigError(f"first_adapted_layer = {first} with target_modules = {targets!r}: name the modules instead.")
    changes = {"target_modules": targets, "layers_to_transform": list(range(first, len(layers)))}
    return replace(peft_config, **changes)


def first_adapted_layer(base: PreTrainedModel) -> int:
    """How many layers lie below the first that an adapter touches: 0 if all streams part at the start."""
    layers = decoder_layers(base)
    if layers is None:
        return 0
    inside = set(layers.modules())
    if any(isinstance(module, StreamLinear) and module not in inside for module in base.get_decoder().modules()):
        return 0
    adapted = (i for i, layer in enumerate(layers) if any(isinstance(m, StreamLinear) for m in layer.modules()))
    return next(adapted, 0)


def share_trunk(base: PreTrainedModel, plan: StreamPlan) -> int:
    """Let the decoder's layers follow `plan`; how many of them all streams share.

    That is 0 where an adapter touches the first layer, or where leaving the trunk out changes the result (layers that
    read what another layer has kept, say): then every pass runs all layers.
    """
    first, layers = first_adapted_layer(base), decoder_layers(base)
    if first == 0 or layers is None:
        return 0
    for index, layer in enumerate(layers):
        layer.__class__ = stream_layer_class(type(layer))  # type: ignore[arg-type]
        stream_layer = cast(StreamLayer, layer)
        stream_layer.plan, stream_layer.layer_index = plan, index
    return first if _can_be_left_out(base, plan, first) else 0


@torch.no_grad()
def _can_be_left_out(base: PreTrainedModel, plan: StreamPlan, first: int) -> bool:
    """Whether a pass from the trunk's states gives what a whole pass gives; True for weights not loaded yet.

    Layers that run more than once (Dory) have no one state that enters them.
    """
    batch = _probe(base, 1)
    if batch is None:
        return True
    decoder, keep = base.get_decoder(), KeepTrunk(first)
    visited = []

    def keep_and_note(index: int, *args: Any, **kwargs: Any) -> Any:
        visited.append(index)
        return keep(index, *args, **kwargs)

    with plan.running(None, layer_pass=keep_and_note):
        whole = decoder(**batch).last_hidden_state
    if keep.states is None or visited != sorted(set(visited)):
        return False
    return _same(decoder, batch, plan, FromTrunk(first, keep.states), whole, 1e-3)


@torch.no_grad()
def can_fork(base: PreTrainedModel, plan: StreamPlan, first: int) -> bool:
    """Whether rows can be repeated in front of layer `first`; True for weights not loaded yet.

    Not where a layer is handed something that has other than a row for each row of the batch (BLOOM's position biases,
    Gemma 3n's four copies of the states), also not where it is taken for rows by chance: MPT's biases, a row a head, of
    as many rows as heads.
    """
    if first == 0:
        return True
    decoder, heads = base.get_decoder(), getattr(base.config.get_text_config(decoder=True), "num_attention_heads", None)
    for rows, tokens in ((2, 3), (3, 3), (heads if isinstance(heads, int) else 2, 1)):
        batch = _probe(base, rows, tokens)
        if batch is None:
            return True
        with plan.running(None):
            whole = decoder(**batch).last_hidden_state
        # In half precision products of more rows may round otherwise.
        tolerance = 0.05 if whole.dtype.itemsize < 4 else 1e-3
        if not _same(decoder, batch, plan, ForkRows(first, rows, 2), whole.repeat(2, 1, 1), tolerance):
            return False
    return True


def _probe(base: PreTrainedModel, rows: int, tokens: int = 3) -> dict[str, Any] | None:
    """A batch in which no two rows are alike; None for weights not loaded yet."""
    if not can_run(base):
        return None
    ids = torch.arange(rows * tokens, device=base.device).view(rows, tokens)
    return {"input_ids": ids % base.get_input_embeddings().weight.shape[0], "use_cache": False}


def _same(
    decoder: nn.Module, batch: dict[str, Any], plan: StreamPlan, layer_pass: LayerPass, expected: Tensor, share: float
) -> bool:
    """Whether the pass gives the expected states but for a share of the largest, instead of others or an error."""
    try:
        with plan.running(None, layer_pass=layer_pass):
            states = decoder(**batch).last_hidden_state
    except UNFIT:
        return False
    if states.shape != expected.shape:
        return False
    return bool((states - expected).abs().max() <= share * expected.abs().max())
