"""From final hidden states to logits: what the architecture does there, and whether one matmul serves all streams."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedModel

from qadapter.errors import ConfigError, first_line
from qadapter.functional import MixCoefficients, mix_streams
from qadapter.fused import (
    TokenStatistics,
    single_head_statistics,
    token_statistics,
    two_head_chunk_size,
    two_head_statistics,
)
from qadapter.modeling.cache_name import CACHE
from qadapter.modeling.streams import Stream, StreamLinear, StreamPlan
from qadapter.modeling.trial_runs import UNFIT, can_run


@dataclass(frozen=True)
class Head:
    """The head of a causal language model: linear layer, then scale, then soft cap."""

    module: nn.Module
    scale: float
    softcap: float | None
    compiled: bool = False  # whether training compiles what follows the matmul (`compiled.compile_layers`)
    fused: bool = True  # whether training's statistics come chunk by chunk, without the logits of all tokens

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """The head of `model`, as its config describes it."""
        module = model.get_output_embeddings()
        if not isinstance(module, nn.Linear | StreamLinear):
            raise ConfigError(f"{type(model).__name__} has no linear language-model head: it cannot be customised.")
        config = model.config.get_text_config(decoder=True)
        # Cohere multiplies the logits, Granite divides them, Gemma 2 caps them.
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(module, float(scale), getattr(config, "final_logit_softcapping", None))

    @property
    def linear(self) -> nn.Linear:
        """The frozen linear layer itself, below any adapter."""
        return self.module.get_base_layer() if isinstance(self.module, StreamLinear) else self.module  # type: ignore[return-value]

    @property
    def shared(self) -> bool:
        """Whether one matmul with the head serves any mix of streams (method.md, identity 4)."""
        return self.linear.bias is None and self.softcap is None and not isinstance(self.module, StreamLinear)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., H), in the head's dtype; follows the stream plan if adapted."""
        # Of a slice, the last states, torch makes a batched product, for which a CPU copies the head for each row.
        logits = self.module(hidden.to(self.linear.weight.dtype).contiguous())
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def check(self, model: PreTrainedModel) -> None:
        """Raise ConfigError unless this description reproduces the model's own logits."""
        if not can_run(model):
            return
        ids = torch.arange(3, device=model.device).unsqueeze(0)
        with torch.no_grad():
            try:
                output = model.get_decoder()(input_ids=ids, use_cache=False)
            except UNFIT as error:  # ModernBERT's decoder gives its head
                raise ConfigError(
                    f"{type(model).__name__} cannot run its decoder alone ({first_line(error)}): it cannot be "
                    "customised yet."
                ) from error
            if "last_hidden_state" not in output:  # Llama 4 gives itself as its decoder
                raise ConfigError(
                    f"{type(model).__name__} does not give its decoder alone: it cannot be customised yet."
                )
            without_keys = DynamicCache(config=model.config.get_text_config(decoder=True)).is_linear  # a layer each
            if CACHE not in getattr(type(output), "__dataclass_fields__", ()) or all(without_keys):  # RWKV, Mamba
                raise ConfigError(f"{type(model).__name__} keeps no keys and values: it cannot be customised.")
            if not model._supports_default_dynamic_cache():  # MiniMax
                raise ConfigError(
                    f"{type(model).__name__} keeps keys and values in a cache of its own: it cannot be customised yet."
                )
            hidden = output.last_hidden_state
            ours, theirs = self.logits(hidden).float(), model(input_ids=ids, use_cache=False).logits.float()
        if ours.shape != theirs.shape or (ours - theirs).abs().max() > 1e-3 * theirs.abs().max() + 1e-4:
            raise ConfigError(
                f"{type(model).__name__} computes its logits in a way that is not known here "
                "(not linear, scaled or soft-capped): it cannot be customised yet."
            )

    def mixed_logits(
        self, hidden: Mapping[Stream, Tensor], coefficients: Mapping[Stream, float | Tensor], plan: StreamPlan
    ) -> Tensor:
        """Logits of Σ_k c_k z_k over the streams: one matmul where the head allows, else one a stream."""
        weights = [coefficients[stream] for stream in hidden]
        if len(weights) == 1 and isinstance(weights[0], float) and weights[0] == 1.0:
            return self.stream_logits(hidden, plan)[0]
        if self.shared:
            return self.logits(mix_streams(list(hidden.values()), weights))
        return mix_streams(self.stream_logits(hidden, plan), weights)

    def direction(
        self, hidden: Mapping[Stream, Tensor], coefficients: Mapping[Stream, float | Tensor], plan: StreamPlan
    ) -> tuple[Tensor, Tensor]:
        """The base's logits z_b, and Σ_k c_k z_k − z_b, in float32 or wider.

        Where one matmul serves all streams the difference is taken of the hidden states: in bfloat16 the difference of
        two rounded logits would be off by more than a weak adapter moves them.
        """
        base = widened(self.stream_logits({None: hidden[None]}, plan)[0])
        if not self.shared:
            return base, widened(self.mixed_logits({k: hidden[k] for k in coefficients}, coefficients, plan)) - base
        mixed = mix_streams([hidden[stream] for stream in coefficients], list(coefficients.values()))
        return base, widened(self.logits(mixed - hidden[None]))

    def stream_logits(self, hidden: Mapping[Stream, Tensor], plan: StreamPlan) -> Sequence[Tensor]:
        """The logits of each stream, in order."""
        result = []
        for stream, states in hidden.items():
            with plan.running(stream):
                result.append(self.logits(states))
        return result

    def statistics(
        self,
        adapter: str,
        adapter_hidden: Tensor,
        base_hidden: Tensor,
        coefficients: MixCoefficients,
        targets: Tensor,
        plan: StreamPlan,
        chunk_size: int | None = None,
        kl_gradient: bool = False,
    ) -> TokenStatistics:
        """Per-token statistics (N,) of the trained policy, from hidden states (N, H) of both streams."""
        if not self.fused:
            hidden: dict[Stream, Tensor] = {adapter: adapter_hidden, None: base_hidden}
            logits = self.mixed_logits(hidden, {adapter: coefficients.adapter, None: coefficients.base}, plan)
            with torch.no_grad():
                (base_logits,) = self.stream_logits({None: base_hidden}, plan)
            statistics = token_statistics(widened(logits), widened(base_logits), targets)
            return statistics if kl_gradient else statistics._replace(kl=statistics.kl.detach())
        weight = whole(self.linear.weight)
        if self.shared:
            mixed = mix_streams([adapter_hidden, base_hidden], coefficients)
            return single_head_statistics(
                mixed, base_hidden, weight, targets, self.scale, chunk_size, self.compiled, kl_gradient
            )

        def logits_of(stream: Stream, rows: Tensor) -> Tensor:
            with plan.running(stream):
                return self.logits(rows)

        return two_head_statistics(
            adapter_hidden,
            base_hidden,
            lambda rows: logits_of(adapter, rows),
            lambda rows: logits_of(None, rows),
            coefficients,
            targets,
            chunk_size or two_head_chunk_size(weight),
        )


def widened(logits: Tensor) -> Tensor:
    """The logits in float32, or in float64 where they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def whole(weight: Tensor) -> Tensor:
    """The weight itself, gathered where FSDP2 has sharded it: it does so by itself only for a layer that is called."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
