"""One batch, several streams: the base model and its LoRA adapters through the same weights in one pass.

A batch of B rows that needs K streams is repeated to K·B rows, block by block; every layer runs once on all of them,
and the LoRA layers add each adapter's update to its own block of rows only. The base weights are read once.

LoRA itself (initialisation, rsLoRA, DoRA, dropout, file format) is PEFT's. Its own mixed-batch forward picks rows by
Python lists in every layer and is limited to eval mode; ours uses slices.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qadapter.errors import ConfigError, require_rules
from qadapter.functional import beside
from qadapter.modeling.adapter_settings import is_linear_map


class Blend(NamedTuple):
    """A stream of several adapters, each scaled: W + Σ_k f_k B_k A_k, and f_k a number or one a row (B,)."""

    factors: tuple[tuple[str, float | Tensor], ...]


# A stream is an adapter's name, several adapters blended, or None for the base.
Stream = str | Blend | None


def parts_of(stream: Stream) -> Sequence[tuple[str, float | Tensor]]:
    """The adapters of a stream, each with its factor."""
    if isinstance(stream, Blend):
        return stream.factors
    return () if stream is None else ((stream, 1.0),)


def title_of(stream: Stream) -> str:
    """What messages call a stream."""
    return "a blend" if isinstance(stream, Blend) else stream or "base"


# LoraConfig's settings that would change the base or need more than the streams' forward, and the ways to start an
# adapter that leave the base's weights alone (PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA rewrite them).
UNSUPPORTED_SETTINGS = (
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens",
    "arrow_config", "use_bdlora", "use_qalora", "lora_bias", "megatron_config", "velora_config", "monteclora_config",
    "kasa_config",
)  # fmt: skip
# What is read back: a rank may be MAX_RANK at most, an alpha lies below ALPHA_LIMIT.
MAX_RANK, ALPHA_LIMIT = 4096, 1e6
SUPPORTED_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
HALF_PRECISION = (torch.bfloat16, torch.float16)
# Compiled decoding writes products of at most this rank, for at most so many tokens, as sums.
LARGEST_SUMMED_RANK, MOST_SUMMED_TOKENS = 8, 64


class StreamPlan:
    """Which stream each block of rows of the running batch belongs to; shared by all `StreamLinear` of a model.

    The resting plan is the one training runs under: activation checkpointing repeats a layer's forward during the
    backward pass, after `running` has ended.
    """

    def __init__(self, *resting: Stream) -> None:
        self.blocks: tuple[Stream, ...] = resting
        self.sizes: tuple[int, ...] | None = None
        self.layer_pass: Any = None  # a `trunk.LayerPass`, or None: every layer runs as it is
        self.sums_products = True  # compiled decoding writes small products of adapters as sums; False: as matmuls
        self.turn = RLock()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over: all but the lock, of which it has its own."""
        return {name: value for name, value in vars(self).items() if name != "turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, turn=RLock())

    @contextmanager
    def running(self, *blocks: Stream, sizes: tuple[int, ...] | None = None, layer_pass: Any = None) -> Iterator[None]:
        """Within the context, the batch is made of `blocks`, of `sizes` rows each, or all of the same number.

        `layer_pass` decides what happens at each decoder layer (see `qadapter.modeling.trunk`). Threads take turns;
        compiled passes have their plan in the graph.
        """
        with nullcontext() if torch.compiler.is_compiling() else self.turn:
            resting = self.blocks, self.sizes, self.layer_pass
            self.blocks, self.sizes, self.layer_pass = blocks, sizes, layer_pass
            try:
                yield
            finally:
                self.blocks, self.sizes, self.layer_pass = resting


class StreamLinear(LoraLinear):
    """PEFT's LoRA linear layer whose forward follows a `StreamPlan` instead of the set of active adapters."""

    plan: StreamPlan | None = None
    transposed = False  # the base layer's weight
    # Of the weights that `narrow_adapters` copied, by stream: see `_version`.
    narrowed_versions: Mapping[str, tuple[int, ...]] = {}

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        config = copy.copy(config)  # which all layers share
        config.fan_in_fan_out = self.transposed
        super().__init__(base_layer, adapter_name, config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output, plus each adapter's update on that adapter's rows."""
        if self.plan is None:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        blocks = self.plan.blocks
        if self.merged:
            if list(blocks) != self.merged_adapters:
                raise ConfigError(
                    "the adapter is merged: only its own policy at strength 1 can run, not the streams "
                    f"{[title_of(stream) for stream in blocks]}. Leave `policy.merged()` first."
                )
            return result
        if len(blocks) == 1:
            for name, factor in parts_of(blocks[0]):
                if name not in self.lora_A:
                    continue
                # A whole adapter in float32 is added as PEFT does, to the last bit.
                fast = name in self.narrowed_versions or (
                    isinstance(factor, Tensor) and type(self.base_layer) is nn.Linear
                )
                if fast and not torch.is_grad_enabled():
                    self._adapt_in_place(result, x, name, factor)
                else:
                    result = self._adapted(result, x, name, factor)
            return result
        if type(self.base_layer) is not nn.Linear:
            result = result.clone()  # quantised layers may hand out a view that must not be written to
        sizes = self.plan.sizes or (1,) * len(blocks)
        unit, end = x.shape[0] // sum(sizes), 0
        for stream, size in zip(blocks, sizes, strict=True):
            block = slice(end, end + size * unit)
            end = block.stop
            for name, factor in parts_of(stream):
                if name in self.lora_A:
                    self._adapt_in_place(result[block], x[block], name, factor)
        return result

    def _adapt_in_place(self, result: Tensor, x: Tensor, name: str, factor: float | Tensor = 1.0) -> None:
        """Add an adapter's update to a block of rows; decoding takes two kernels for it instead of eight."""
        lora_a, lora_b = self._decoding_weights(name, x.dtype)
        plain = name not in self.lora_variant and lora_a.dtype == x.dtype == result.dtype
        if torch.is_grad_enabled() or self.training or not plain or not result.is_contiguous():
            result.copy_(self._adapted(result, x, name, factor))
            return
        scale = self.scaling[name] * (1.0 if isinstance(factor, Tensor) else factor)
        sums = self._sums_products(x.shape[:-1].numel(), lora_a.shape[0])
        # A kernel for each product this small costs more than the product; sums melt into the kernels around.
        update = (x.unsqueeze(-2) * lora_a).sum(-1) if sums else F.linear(x, lora_a)  # (..., r)
        if isinstance(factor, Tensor):
            update = (update * factor_beside(factor, update)).to(x.dtype)
        if sums:
            result.add_((update.unsqueeze(-2) * lora_b).sum(-1), alpha=scale)
        else:
            result.flatten(0, -2).addmm_(update.flatten(0, -2), lora_b.t(), alpha=scale)

    def _sums_products(self, tokens: int, rank: int) -> bool:
        small = tokens <= MOST_SUMMED_TOKENS and rank <= LARGEST_SUMMED_RANK
        return small and torch.compiler.is_compiling() and self.plan is not None and self.plan.sums_products

    def _decoding_weights(self, stream: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The adapter's two matrices, cast to half precision if `dtype` is, or as `narrow_adapters` has kept them."""
        lora_a, lora_b = self.lora_A[stream].weight, self.lora_B[stream].weight
        if dtype not in HALF_PRECISION:
            return lora_a, lora_b
        narrow_a, narrow_b = (getattr(self, f"narrow_{side}_{stream}", None) for side in "AB")
        if narrow_a is None or narrow_b is None:
            return lora_a.to(dtype), lora_b.to(dtype)
        if not torch.compiler.is_compiling() and self.narrowed_versions[stream] != _version(lora_a, lora_b):
            return lora_a.to(dtype), lora_b.to(dtype)
        return narrow_a, narrow_b

    def narrow_adapters(self) -> None:
        """Keep copies of adapters in the base's dtype where it is half precision: decoding need not cast them."""
        dtype = self.get_base_layer().weight.dtype
        versions = {}
        for stream in self.lora_A if dtype in HALF_PRECISION else ():
            lora_a, lora_b = self.lora_A[stream].weight, self.lora_B[stream].weight
            if lora_a.is_inference() or lora_b.is_inference():  # has no version to tell changes by
                continue
            versions[stream] = _version(lora_a, lora_b)
            self.register_buffer(f"narrow_A_{stream}", lora_a.detach().to(dtype), persistent=False)
            self.register_buffer(f"narrow_B_{stream}", lora_b.detach().to(dtype), persistent=False)
        self.narrowed_versions = versions

    def _adapted(self, result: Tensor, x: Tensor, name: str, factor: float | Tensor = 1.0) -> Tensor:
        if name in self.lora_variant:  # DoRA, which PEFT computes in the adapter's dtype, and which has no factor
            variant, x = self.lora_variant[name], self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
            return variant.forward(self, active_adapter=name, x=x, result=result).to(result.dtype)
        lora_a, lora_b = self.lora_A[name], self.lora_B[name]
        x = self.lora_dropout[name](x)
        # Scaled where there are r numbers a token, not where there are as many as the layer gives.
        if isinstance(factor, Tensor):
            factor = factor_beside(factor, x).to(torch.promote_types(lora_a.weight.dtype, torch.float32))
        scale = self.scaling[name] * factor
        if x.dtype in HALF_PRECISION:
            # Matmuls in the adapter's float32 would take the hidden states there and run ten times slower.
            with torch.autocast(x.device.type, x.dtype):
                update = lora_b(lora_a(x) * scale)
        else:
            update = lora_a(self._cast_input_dtype(x, lora_a.weight.dtype)) * scale
            update = lora_b(update.to(lora_b.weight.dtype))
        return (result + update).to(result.dtype)


def factor_beside(factor: Tensor, x: Tensor) -> Tensor:
    """A factor a row (B,) for the states (B, ..., H) of those rows, or of all their tokens (B·T, H)."""
    factor = factor.reshape(-1)
    if factor.numel() > 1 and x.shape[0] != factor.shape[0]:
        factor = factor.repeat_interleave(x.shape[0] // factor.shape[0])
    return beside(factor, x.dim())


def _version(*weights: Tensor) -> tuple[int, ...]:
    """Which tensors these are, and in which state: a copy of a model counts its changes from 0 again."""
    return tuple(number for weight in weights for number in (id(weight), weight._version))


class StreamConv1D(StreamLinear):
    """The same for GPT-2's Conv1D, whose weight is stored transposed."""

    transposed = True

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        config.fan_in_fan_out = True  # to be saved, as PEFT does
        kwargs["is_target_conv_1d_layer"] = True
        super().__init__(base_layer, adapter_name, config, **kwargs)


def with_stream_layers(peft_config: LoraConfig) -> LoraConfig:
    """A copy of the config for which PEFT builds `StreamLinear`, after checking that a frozen base can carry it.

    Raises:
        ConfigError: the adapter would train base weights, or is of a kind that cannot run as a stream.
    """
    if not isinstance(peft_config, LoraConfig):
        raise ConfigError(
            f"peft_config is a {type(peft_config).__name__}: a Q-Adapter needs a LoraConfig "
            "(plain LoRA, rsLoRA or DoRA)."
        )
    for field in UNSUPPORTED_SETTINGS:
        if getattr(peft_config, field, None):
            raise ConfigError(f"LoraConfig.{field} is set: it would change the base model, which must stay frozen.")
    ranks, alphas = (peft_config.rank_pattern or {}).values(), (peft_config.alpha_pattern or {}).values()
    require_rules(
        peft_config,
        ("r", peft_config.r <= MAX_RANK, f"must be {MAX_RANK} or below"),
        ("rank_pattern", all(rank <= MAX_RANK for rank in ranks), f"ranks must be {MAX_RANK} or below"),
        ("lora_alpha", 0 < peft_config.lora_alpha < ALPHA_LIMIT, f"must lie between 0 and {ALPHA_LIMIT:g}"),
        ("alpha_pattern", all(0 < a < ALPHA_LIMIT for a in alphas), f"must lie between 0 and {ALPHA_LIMIT:g}"),
        ("bias", peft_config.bias == "none", 'use bias="none", the base must stay frozen'),
        (
            "init_lora_weights",
            peft_config.init_lora_weights in SUPPORTED_INITIALISATIONS,
            "it would rewrite the base's weights, which must stay frozen. Use True or 'gaussian'",
        ),
        ("task_type", peft_config.task_type in (None, "CAUSAL_LM"), "use 'CAUSAL_LM'"),
        prefix="LoraConfig.",
    )
    # PEFT writes what it resolves (target names, say) into the config it is given.
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type, peft_config.fan_in_fan_out = "CAUSAL_LM", False
    peft_config._register_custom_module({nn.Linear: StreamLinear, Conv1D: StreamConv1D})
    return peft_config


def follow_plan(model: nn.Module, plan: StreamPlan) -> None:
    """Let every LoRA layer of `model` follow `plan`.

    Raises:
        ConfigError: a LoRA layer that is no `StreamLinear`, such as on an embedding or a fused quantised layer, or is
            on a router that gives no tensor to add to.
    """
    for name, module in model.named_modules():
        if isinstance(module, StreamLinear) and is_linear_map(module.get_base_layer()):
            module.plan = plan
        elif isinstance(module, LoraLayer):
            kind = type(module.get_base_layer()).__name__
            can = {
                path.rpartition(".")[2]
                for path, part in model.named_modules()
                if isinstance(part, StreamLinear) and is_linear_map(part.get_base_layer())
            }
            raise ConfigError(
                f"LoRA on {name} ({kind}) cannot run beside the base in one batch: leave it out of target_modules"
                + (f", as in {' '.join(sorted(can))}." if can else ".")
            )


def narrow_adapters(model: nn.Module) -> None:
    """Let every LoRA layer keep its adapters in the base's dtype, too, for decoding; for adapters that are trained."""
    for module in model.modules():
        if isinstance(module, StreamLinear):
            module.narrow_adapters()


def repeat_rows(value: Any, times: int, rows: int) -> Any:
    """`value` for `times` stacked copies of a batch of `rows`: tensors, in dicts and tuples too, are repeated row-wise.

    Tensors whose first dimension is not `rows` (a mask shared by all rows, say) are returned as they are.
    """
    if isinstance(value, dict):
        return {key: repeat_rows(item, times, rows) for key, item in value.items()}
    if type(value) is tuple:
        return tuple(repeat_rows(item, times, rows) for item in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != rows:
        return value
    return value.repeat(times, *[1] * (value.dim() - 1))


def disable_dropout(model: nn.Module) -> None:
    """Switch off the base's own dropout, so that both streams differ by the adapter alone (as TRL does).

    Much of it is a number that a layer hands to a function in its forward: `residual_dropout`, `attn_pdrop`. The noise
    of routers is off in eval mode (`keep_base_in_eval`), where its number may count, too: PhiMoE compares scores by it.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def keep_base_in_eval(module: nn.Module) -> None:
    """Put the base's own modules into eval mode; its LoRA layers keep theirs.

    In training mode some architectures draw experts at random or bound their weights. Modules whose activations can be
    checkpointed keep their mode, since transformers checkpoints in training mode only, and so do quantised layers,
    which choose by it what they keep for the backward pass.
    """
    if isinstance(module, LoraLayer) or type(module).__module__.startswith("bitsandbytes"):
        return
    if not hasattr(module, "gradient_checkpointing"):
        module.training = False
    for child in module.children():
        keep_base_in_eval(child)


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of one adapter by their names in `model`."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name and adapter in name.split(".")
    }
