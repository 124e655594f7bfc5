"""The streams that a policy needs at a setting of the dial, and the one pass of the decoder over all of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from qadapter.errors import ConfigError
from qadapter.functional import composed_coefficients
from qadapter.modeling.cache_name import CACHE, cache_of
from qadapter.modeling.mixing import (
    AdapterWeights,
    StepState,
    Strength,
    capped_logits,
    check_shape,
    checked_nats,
    checked_number,
    checked_weights,
    evaluated,
    refuse_changing,
    thresholded_logits,
    times,
)
from qadapter.modeling.policy_part import PolicyPart
from qadapter.modeling.streams import Blend, Stream, parts_of, repeat_rows, title_of
from qadapter.modeling.trunk import ForkRows

INTERPOLATIONS = ("logits", "weights")
# In the names of what models of other things than text are handed.
OTHER_THAN_TEXT = ("pixel", "image", "video", "audio", "input_features")


class StackedPasses(PolicyPart):
    """The part of `QAdapterForCausalLM` that mixes streams."""

    def stream_coefficients(
        self,
        strength: float | Tensor | None = None,
        adapter_weights: AdapterWeights | None = None,
        interpolation: str | None = None,
    ) -> dict[Stream, float | Tensor]:
        """The weight of each stream that the policy needs; streams without weight are left out.

        Where weights are interpolated, that is one stream, whose parts have the factors.

        Args are those of `forward`; a callable strength must have been evaluated.
        """
        strength = self.strength if strength is None else strength
        strength = strength.to(self.device) if isinstance(strength, Tensor) else checked_number(strength, "strength")
        if isinstance(adapter_weights, Tensor):
            adapter_weights = dict(zip(self.adapters, adapter_weights.unbind(-1), strict=True))
        given = self.adapter_weights if adapter_weights is None else adapter_weights
        weights = checked_weights(given, dict.fromkeys(self.adapters, 0.0))
        scaled = {name: times(strength, weight) for name, weight in weights.items()}
        if self.checked_interpolation(interpolation) == "weights":
            return {blended(scaled): 1.0}
        adapters, base = composed_coefficients(self.trained_coefficients(), scaled)
        coefficients: dict[Stream, float | Tensor] = dict(adapters.items())
        coefficients[None] = base
        needed = {stream: c for stream, c in coefficients.items() if isinstance(c, Tensor) or c != 0.0}
        return needed or {None: 1.0}

    def checked_interpolation(self, interpolation: str | None = None) -> str:
        """`interpolation`, the model's own if it is None.

        Raises:
            ConfigError: it is neither "logits" nor "weights", or an adapter's weights cannot be scaled.
        """
        interpolation = self.interpolation if interpolation is None else interpolation
        if interpolation not in INTERPOLATIONS:
            raise ConfigError(f"interpolation = {interpolation!r}: it must be one of {', '.join(INTERPOLATIONS)}.")
        if interpolation == "weights":
            for name, config in self.configs.items():
                if not config.single_stream or self.peft_model.peft_config[name].use_dora:
                    raise ConfigError(
                        f'interpolation="weights" scales LoRAs that are a policy by themselves: {name!r} is DoRA, or '
                        'not of the residual form with alpha_0 = alpha_tilde. Leave it at "logits".'
                    )
        return interpolation

    def _dial_of_pass(
        self,
        strength: Strength | None,
        adapter_weights: AdapterWeights | None,
        max_kl: float | Tensor | None,
        min_kl: float | Tensor | None,
        interpolation: str | None,
        input_ids: Tensor | None,
        cache: Any,
        rows: int,
        tokens: int,
    ) -> tuple[float | Tensor, Tensor | None, Tensor | None]:
        """Strength, cap and threshold of a pass, the model's own where it gives none; raises ConfigError."""
        strength = self.strength if strength is None else strength
        max_kl, min_kl = self.max_kl if max_kl is None else max_kl, self.min_kl if min_kl is None else min_kl
        cap, threshold = (
            checked_nats(value, name, self.device, rows, read=not isinstance(value, Tensor))
            for name, value in (("max_kl", max_kl), ("min_kl", min_kl))
        )
        if self.checked_interpolation(interpolation) == "weights":
            refuse_changing("a callable strength" if callable(strength) else "" if threshold is None else "min_kl")
            check_shape("strength", strength, (rows,))
        # Asked only where it matters: compiled code cannot ask how much a static cache holds.
        partial = callable(strength) and cache is not None and cache.get_seq_length() > 0
        used = evaluated(strength, None if partial or input_ids is None else StepState(input_ids, 0))
        check_shape("strength", used, (rows,), (rows, tokens))
        if isinstance(adapter_weights, Tensor):
            check_shape("adapter_weights", adapter_weights, (rows, len(self.adapters)), (1, len(self.adapters)))
        else:
            for name, weight in (adapter_weights or {}).items():
                check_shape(f"adapter_weights[{name!r}]", weight, (rows,))
        if not isinstance(used, Tensor) and used == 0:
            threshold = None  # there is nothing to lower: the base's stream alone
        return used, cap, threshold

    def stacked_pass(
        self, streams: list[Stream], batch: dict[str, Any], cache: Any, use_cache: bool | None
    ) -> tuple[dict[Stream, Tensor], Any]:
        """One pass of the decoder over all streams' copies of the batch: their hidden states, and the cache."""
        rows, _ = shape_of(batch)
        config = self.config.get_text_config(decoder=True)
        use_cache = config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        if cache is not None:
            mark_streams(cache, tuple(streams))
        fork = None
        if self.forks(len(streams)):
            fork = ForkRows(self.shared_layers, rows, len(streams))
        else:
            batch = {name: repeat_rows(value, len(streams), rows) for name, value in batch.items()}
        if self.training and torch.is_grad_enabled():
            # The resting plan, too: activation checkpointing runs the layers again in the backward pass.
            self.plan.blocks = tuple(streams)
        with self.plan.running(*streams, layer_pass=fork):
            output = self.base.get_decoder()(**batch, **{CACHE: cache}, use_cache=use_cache)
        blocks = output.last_hidden_state.split(rows)
        return dict(zip(streams, blocks, strict=True)), cache_of(output)

    def dialled_logits(
        self,
        hidden: Mapping[Stream, Tensor],
        coefficients: Mapping[Stream, float | Tensor],
        strength: float | Tensor,
        cap: Tensor | None,
        threshold: Tensor | None,
    ) -> tuple[Tensor, float | Tensor]:
        """Logits (B, T, V) of the mixed streams, and the share of the strength that threshold and cap left.

        Args:
            hidden: of every stream (B, T, H); of the base, too, where there is a cap or a threshold.
            coefficients: of the streams to be mixed; with a threshold, those of the policy at strength 1.
        """
        share: float | Tensor = 1.0
        if threshold is not None:
            base_logits, delta = self.head.direction(hidden, coefficients, self.plan)
            logits, share = thresholded_logits(base_logits, delta, strength, threshold)
        else:
            logits = self.head.mixed_logits({k: hidden[k] for k in coefficients}, coefficients, self.plan)
        if cap is not None:
            if threshold is None:
                base_logits = self.head.stream_logits({None: hidden[None]}, self.plan)[0]
            logits, let_through = capped_logits(logits, base_logits, cap)
            share = share * let_through
        return logits, share

    def forks(self, streams: int) -> bool:
        """Whether a pass of so many streams parts above the first layer, with one cache for all below.

        FlexAttention's block masks cannot be repeated in the middle of a pass, nor what some layers are handed.
        """
        flexible = self.config.get_text_config(decoder=True)._attn_implementation == "flex_attention"
        return streams > 1 and self.shared_layers > 0 and self.rows_can_fork and not flexible


def refuse_images(kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError for images, sound and video: a decoder of text would take them and not look at them."""
    given = [
        name for name, value in kwargs.items() if value is not None and any(part in name for part in OTHER_THAN_TEXT)
    ]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: a policy reads text only, also of a base that takes more. Leave it out."
        )


def blended(factors: Mapping[str, float | Tensor]) -> Stream:
    """The one stream of adapters so scaled: the base or a single adapter as it is where that is all."""
    parts = tuple((name, f) for name, f in factors.items() if isinstance(f, Tensor) or f != 0.0)
    if not parts:
        return None
    name, factor = parts[0]
    return name if len(parts) == 1 and not isinstance(factor, Tensor) and factor == 1.0 else Blend(parts)


def streams_in(cache: Any) -> tuple[Stream, ...] | None:
    """Whose keys and values the cache holds; None for one that no pass of a policy has had."""
    return getattr(cache, "qadapter_streams", None)


def mark_streams(cache: Any, streams: tuple[Stream, ...]) -> None:
    """Note in the cache whose keys and values it gets.

    Raises:
        ConfigError: it holds those of other streams, or, without a note, the plain base's.
    """
    filled = streams_in(cache)
    if filled is None:  # Filled by the plain base, if at all; compiled code cannot ask how much a static cache holds.
        filled = streams if torch.compiler.is_compiling() else (None,)
    kinds, others = (
        tuple(Blend if isinstance(stream, Blend) else stream for stream in own) for own in (filled, streams)
    )
    if kinds != others and cache.get_seq_length() > 0:
        names = [[title_of(stream) for stream in own] for own in (filled, streams)]
        raise ConfigError(
            f"the cache holds the streams {names[0]}, and this call runs {names[1]}: keep strength, weights and "
            "cap such that the same ones run (a tensor as the strength runs all), or start without the cache."
        )
    numbers = [
        [f for stream in own for _, f in parts_of(stream) if not isinstance(f, Tensor)] for own in (filled, streams)
    ]
    if all(numbers) and numbers[0] != numbers[1] and cache.get_seq_length() > 0:
        raise ConfigError(
            f"the cache holds what LoRAs scaled by {numbers[0]} made of the text, and this call scales them by "
            f"{numbers[1]}: keep strength and weights, or start without the cache."
        )
    cache.qadapter_streams = streams


def shape_of(batch: Mapping[str, Any]) -> tuple[int, int]:
    """(B, T) of a batch given as ids or as embeddings."""
    inputs = batch["input_ids"] if batch["input_ids"] is not None else batch["inputs_embeds"]
    if inputs is None:
        raise ConfigError("give input_ids or inputs_embeds.")
    return inputs.shape[0], inputs.shape[1]
