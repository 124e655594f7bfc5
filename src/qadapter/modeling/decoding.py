"""generate() for a policy with a dial: settings a request, conditions on the text so far, strengths on record."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin

from qadapter.errors import ConfigError
from qadapter.modeling.cache_name import CACHE, NAMES, given_cache
from qadapter.modeling.mixing import (
    AdapterWeights,
    StepState,
    Strength,
    bounded,
    check_shape,
    checked_decay,
    checked_nats,
    checked_number,
    checked_weights,
    evaluated,
    refuse_changing,
)
from qadapter.modeling.stacked import StackedPasses, refuse_images, streams_in
from qadapter.modeling.streams import Blend, parts_of

ASSISTED = ("assistant_model", "prompt_lookup_num_tokens")


class PolicyGenerationMixin(StackedPasses, GenerationMixin):
    """GenerationMixin whose `generate` takes the policy's settings; for `QAdapterForCausalLM`."""

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        strength: Strength | None = None,
        adapter_weights: AdapterWeights | None = None,
        max_kl: float | Tensor | None = None,
        min_kl: float | Tensor | None = None,
        decay: float | None = None,
        interpolation: str | None = None,
        output_strengths: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Token ids (B, prompt and answer), or what else `GenerationMixin.generate` returns, of the customised policy.

        Args:
            strength, adapter_weights, max_kl, min_kl, interpolation: as of `QAdapterForCausalLM.forward`, a row of the
                given inputs.
            decay: factor ρ of the strength from one token of the answer to the next, 0 < ρ ≤ 1: λ ρᵗ at the t-th. The
                first tokens settle what the base then continues by itself (docs/dial.md); None takes the model's own
                `decay`, which is 1.
            output_strengths: return a dictionary (as `return_dict_in_generate=True` does) with `strengths`
                (B, new tokens), the strength used at each token.

        Raises:
            ConfigError: a setting that is not finite, too large or of the wrong shape; a callable strength, a decay or
                `output_strengths` where a step is not one token (assisted decoding) or sees a piece of the prompt
                (`prefill_chunk_size`); `output_strengths` with beams; a callable strength, a decay or weights a row
                with `guidance_scale`, these or any values a row with `token_healing`; `assistant_early_exit`; a cache
                that another call has filled with other streams; with `interpolation="weights"` a strength that changes
                along the answer, or adapters it cannot scale.
        """
        refuse_images(kwargs)
        cache = given_cache(*(kwargs.pop(name, None) for name in NAMES))
        if cache is not None:
            kwargs[CACHE] = cache
        prompt = inputs if kwargs.get("input_ids") is None else kwargs["input_ids"]
        given = kwargs.get("inputs_embeds") if prompt is None else prompt
        rows = 1 if given is None else len(given)
        strength = self._strength_of_answers(strength, rows)
        adapter_weights = self.adapter_weights if adapter_weights is None else adapter_weights
        adapter_weights = stacked_weights(adapter_weights, self.adapters, rows, self.device)
        cap = self._nats_of_answers("max_kl", max_kl, rows)
        threshold = self._nats_of_answers("min_kl", min_kl, rows)
        decay = checked_decay(self.decay if decay is None else decay)
        if isinstance(strength, float) and strength == 0.0:
            decay = 1.0  # the base alone, for which one stream is enough
        changing = "a callable strength" if callable(strength) else "a decay" if decay < 1 else ""
        interpolation = self.checked_interpolation(interpolation)
        if interpolation == "weights":
            refuse_changing(changing if threshold is None else "min_kl")
        config = args[0] if args else kwargs.get("generation_config")
        setting = partial(generation_setting, kwargs, (config, self.generation_config))
        refuse_unsupported(changing, output_strengths, setting)
        guided = setting("guidance_scale") not in (None, 1)
        if guided and (changing or isinstance(adapter_weights, Tensor)):
            what = changing or "weights a row"
            raise ConfigError(f"{what} cannot be used with guidance_scale: its second pass is not told of them.")
        record: list[Tensor] | None = [] if output_strengths else None
        settings = {
            **self._free_of_numbers(strength, adapter_weights, interpolation, rows),
            "max_kl": cap,
            # A 0 that was asked for holds against the model's own.
            "min_kl": 0.0 if threshold is None and self.min_kl is not None else threshold,
            "strength_record": record,
            "prompt_length": int(given is None) if prompt is None else prompt.shape[1],  # 1: generate begins with BOS
            "decay": decay if decay < 1 else None,
            "interpolation": interpolation if interpolation != self.interpolation else None,
        }
        # Only what differs from the defaults goes into the loop: fewer arguments to guard when compiled.
        settings = {name: value for name, value in settings.items() if value is not None}
        if output_strengths:
            kwargs["return_dict_in_generate"] = True
        assisted = kwargs.get("assistant_model") is not None  # it would be handed every argument of the loop
        healed = bool(setting("token_healing"))  # a call of generate for each prompt's last token
        # They are not handed the loop's arguments and take the model's own; so does guidance's pass without prompt.
        texts = max(setting(name) or 1 for name in ("num_beams", "num_return_sequences"))
        own: dict[str, Any] = {"strength": strength, "max_kl": cap, "min_kl": threshold}
        own = {k: v.repeat_interleave(texts) if isinstance(v, Tensor) else v for k, v in own.items()}
        own |= {"adapter_weights": adapter_weights, "interpolation": interpolation}
        if healed:
            own = {name: of_one_prompt(value, name) for name, value in own.items()}
        if isinstance(weights := own["adapter_weights"], Tensor):  # of one row, wherever they are read
            own["adapter_weights"] = dict(zip(self.adapters, weights[0].tolist(), strict=True))
        with self.dial(**own) if assisted or guided or healed else nullcontext():
            output = super().generate(inputs, *args, **kwargs, **({} if assisted else settings))
        if record is not None:
            output["strengths"] = torch.stack(record, dim=1)
        return output

    def _strength_of_answers(self, strength: Strength | None, rows: int) -> Strength:
        """The strength of a call, the model's own where it gives none; raises ConfigError if it is not finite."""
        strength = self.strength if strength is None else strength
        if callable(strength):
            return strength
        check_shape("strength", strength, (rows,))
        if not isinstance(strength, Tensor):
            return checked_number(strength, "strength")
        strength = bounded(strength, "strength").to(self.device)
        # generate repeats tensors row by row
        return strength.reshape(()).expand(rows) if strength.numel() == 1 else strength

    def _nats_of_answers(self, name: str, value: float | Tensor | None, rows: int) -> Tensor | None:
        """`max_kl` or `min_kl` of a call (B,), the model's own where it gives none; generate repeats it row by row."""
        nats = checked_nats(getattr(self, name) if value is None else value, name, self.device, rows)
        # Copied: a compiled step would be compiled anew for another layout.
        return nats.reshape(()).repeat(rows) if nats is not None and nats.numel() == 1 else nats

    def _free_of_numbers(
        self, strength: Strength, weights: AdapterWeights, interpolation: str, rows: int
    ) -> dict[str, Any]:
        """Both as tensors (B,) and (B, K), unless more streams would run then.

        A number is compiled into the step, which is then compiled anew for another one.
        """
        if callable(strength):
            return {"strength": strength, "adapter_weights": weights}
        strengths = torch.full((rows,), strength, device=self.device) if isinstance(strength, float) else strength
        columns = stacked_columns(weights, rows, self.device)
        as_given, as_tensors = (
            {(isinstance(stream, Blend), name) for stream in streams for name, _ in parts_of(stream) or ((None, 1.0),)}
            for streams in (
                self.stream_coefficients(strength, weights, interpolation),
                self.stream_coefficients(strengths, columns, interpolation),
            )
        )
        if as_given != as_tensors:
            return {"strength": strength, "adapter_weights": weights}
        return {"strength": strengths, "adapter_weights": columns}

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' continuous batching feeds one stream, and would answer nothing.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "transformers' continuous batching (generate_batch) cannot run a policy of several streams: "
            "use generate, `qadapter serve`, or vLLM (docs/serving.md)."
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        strength: Strength | None = None,
        prompt_length: int = 0,
        decay: float | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As the base's, with a strength callable asked for this step's value, and the strength decayed."""
        inputs = self.base.prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        value = None if strength is None else evaluated(strength, StepState(input_ids, prompt_length))
        if decay is not None and value is not None:
            value = decayed(value, decay ** (input_ids.shape[1] - prompt_length), input_ids)
        inputs["strength"] = value
        return inputs

    def _get_static_cache_init_shape(self) -> None:
        """No shape: the first pass allocates a static cache, in which each layer has as many rows as run there."""

    def _reorder_cache(self, cache: Cache, beam_idx: Tensor) -> Cache:
        """`cache` with the rows of every stream in the order of `beam_idx` (B,); beam search calls it."""
        streams = len(streams_in(cache) or ())
        offsets = torch.arange(streams, device=beam_idx.device).unsqueeze(1) * len(beam_idx)
        stacked = (offsets + beam_idx).flatten()
        shared = self.shared_layers if self.forks(streams) else 0
        for index, layer in enumerate(cache.layers):
            layer.reorder_cache(beam_idx if index < shared else stacked)
        return cache


def decayed(strength: float | Tensor, factor: float, input_ids: Tensor) -> Tensor:
    """The strength times the factor, always as a tensor, so that the set of streams is the same at every token."""
    if isinstance(strength, Tensor):
        return strength * factor
    return torch.full((input_ids.shape[0],), strength * factor, device=input_ids.device)


def stacked_weights(
    weights: AdapterWeights, adapters: Sequence[str], rows: int, device: torch.device
) -> dict[str, float | Tensor] | Tensor:
    """A weight for each adapter; as one tensor (B, K) if any is a tensor: generate expands its rows with the batch's.

    Raises:
        ConfigError: a weight that is not finite or too large, of another number of rows, or of an unknown adapter.
    """
    if isinstance(weights, Tensor):
        check_shape("adapter_weights", weights, (rows, len(adapters)), (1, len(adapters)))
        return bounded(weights, "adapter_weights").to(device).expand(rows, len(adapters))
    for name, weight in weights.items():
        check_shape(f"adapter_weights[{name!r}]", weight, (rows,))
    weights = checked_weights(weights, dict.fromkeys(adapters, 0.0))
    if not any(isinstance(weight, Tensor) for weight in weights.values()):
        return weights
    return bounded(stacked_columns(weights, rows, device), "adapter_weights")


def stacked_columns(weights: AdapterWeights, rows: int, device: torch.device) -> Tensor:
    """The weights as one tensor (B, K)."""
    if isinstance(weights, Tensor):
        return weights.contiguous()
    columns = [torch.as_tensor(weight, dtype=torch.float32, device=device).expand(rows) for weight in weights.values()]
    return torch.stack(columns, dim=-1)


def generation_setting(kwargs: Mapping[str, Any], configs: Sequence[Any], name: str) -> Any:
    """The value that `GenerationMixin` will use: the call's own, else that of the first config that has one."""
    if name in kwargs:
        return kwargs[name]
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)


def of_one_prompt(value: Any, name: str) -> Any:
    """A setting of the dial, of which a tensor has the one row that all rows are equal to.

    Raises:
        ConfigError: they are not.
    """
    if not isinstance(value, Tensor):
        return value
    if bool((value != value[:1]).any()):
        raise ConfigError(
            f"{name} of one value a row cannot be used with token_healing, which heals the prompts one by one: give "
            "all rows one value, or leave token_healing out."
        )
    return value[:1]


def refuse_unsupported(changing: str, recorded: bool, setting: Callable[[str], Any]) -> None:
    """Raise ConfigError where one step of generation is not one token of one row.

    Args:
        changing: what makes the strength another one at each step; "" for nothing.
        setting: the value of a setting of generation, by its name.
    """
    if setting("assistant_early_exit") is not None:
        raise ConfigError(
            "assistant_early_exit is not supported, as a draft of the lower layers has no streams to mix: use "
            "assistant_model or prompt_lookup_num_tokens."
        )
    assisted = [name for name in ASSISTED if setting(name) is not None]
    beams = (setting("num_beams") or 1) > 1
    if (changing or recorded) and assisted:
        what = changing or "output_strengths"
        raise ConfigError(f"{what} cannot be used with {assisted[0]}: one pass there covers several tokens.")
    if (changing or recorded) and setting("prefill_chunk_size") is not None:
        what = changing or "output_strengths"
        raise ConfigError(f"{what} cannot be used with prefill_chunk_size: a pass there sees a piece of the prompt.")
    if changing and setting("token_healing"):
        raise ConfigError(f"{changing} cannot be used with token_healing, which may change the prompt's length.")
    if recorded and beams:
        raise ConfigError("output_strengths cannot be used with num_beams > 1: beams change rows at every token.")
