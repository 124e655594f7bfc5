"""LoRA on a stream's rows, inside vLLM's linear layers, or merged into the weights while they are read."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm, dispatch_unquantized_gemm
from vllm.platforms import current_platform

from qadapter.errors import ConfigError
from qadapter_vllm.settings import LoraUpdate, Policy

# Up to this rank of a module, compiled sums take less time on a CPU than a call of a kernel (benchmarks/LOG.md).
SUMS_RANK = 16


class UpdateMatrix(nn.Module):
    """Multiplies by a matrix (out, in) of an update, as vLLM multiplies by an unquantised layer's weight.

    On a CPU, vLLM packs the weight and keeps oneDNN's plan: a matrix as small as these takes half of torch's time.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # A buffer, so that whatever moves the layer moves it too.
        self.weight: Tensor
        self.register_buffer("weight", weight, persistent=False)
        self.gemm = dispatch_unquantized_gemm()

    def pack(self) -> None:
        """Once the weight is in its place."""
        if current_platform.is_cpu():
            dispatch_cpu_unquantized_gemm(self, remove_weight=False)

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ, (N, out)."""
        return self.gemm(self, x, self.weight, None)


class Update(nn.Module):
    """One stream's update of a layer, x Aᵀ Bᵀ: (N, in) to (N, out).

    Args:
        lora_a: (Σ r, in), the packed modules' ranks stacked.
        parts: B of each packed module (its outputs, r) in turn, carrying the scale; r is 0 where it is not adapted.
    """

    def __init__(self, lora_a: Tensor, parts: list[Tensor]) -> None:
        super().__init__()
        self.lora_a = UpdateMatrix(lora_a)
        self.lora_b = UpdateMatrix(torch.block_diag(*parts))
        self.as_sums = current_platform.is_cpu() and max(part.shape[1] for part in parts) <= SUMS_RANK
        self.parts = len(parts)
        for number, part in enumerate(parts if self.as_sums else ()):
            self.register_buffer(f"part_{number}", part.t().contiguous(), persistent=False)  # (r, its outputs)

    def pack(self) -> None:
        """Once the weights are in their place."""
        self.lora_a.pack()
        self.lora_b.pack()

    def forward(self, x: Tensor) -> Tensor:
        """x Aᵀ Bᵀ, (N, out)."""
        if self.as_sums and torch.compiler.is_compiling():
            return self.summed(x)
        return self.lora_b(self.lora_a(x))

    def summed(self, x: Tensor) -> Tensor:
        """The same written out, in float32, which the compiler melts into the loops around it."""
        hidden = (x.unsqueeze(-2).float() * self.lora_a.weight.float()).sum(-1)  # (N, Σ r)
        parts: list[Tensor] = [getattr(self, f"part_{number}").float() for number in range(self.parts)]
        pieces = [
            sum((h[:, j : j + 1] * row for j, row in enumerate(part)), start=h.new_zeros(len(h), part.shape[1]))
            for h, part in zip(hidden.split([len(part) for part in parts], dim=-1), parts, strict=True)
        ]
        return torch.cat(pieces, dim=-1).to(x.dtype)


class StreamLoraMethod(LinearMethodBase):
    """A layer's own linear method, then each stream's update on its block of rows.

    It works inside `apply`: above a quantised kernel, and below the sum over ranks of a row-parallel layer.
    """

    def __init__(self, inner: LinearMethodBase, streams: int) -> None:
        self.inner = inner
        self.streams = streams
        self.blocks: list[tuple[int, Update]] = []  # block of rows, its update
        self.requires_device_loading = inner.requires_device_loading
        self.supports_pre_processed_weights = inner.supports_pre_processed_weights

    def create_weights(self, *args: object, **kwargs: object) -> None:
        """Not called: the inner method has made them when the layer was built."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As the inner method does it; the updates' matrices are packed."""
        self.inner.process_weights_after_loading(layer)
        for _, update in self.blocks:
            update.pack()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output (S·N, out) with the updates added."""
        if not isinstance(x, Tensor):
            raise TypeError("a layer with LoRA was given an input that is quantised already: turn that fusion off.")
        output = self.inner.apply(layer, x, bias)
        rows = x.shape[0] // self.streams
        for block, update in self.blocks:
            part = slice(block * rows, (block + 1) * rows)
            output[part] += update(x[part])
        return output


def add_lora(model: nn.Module, policy: Policy, packed: dict[str, list[str]]) -> None:
    """Give every adapted linear layer of `model` its updates.

    Raises:
        ConfigError: an update for a layer that is not there or is of another size.
    """
    pending = {(name, module) for name, updates in policy.updates.items() for module in updates}
    for name, layer in model.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        parent, _, leaf = name.rpartition(".")
        modules = [f"{parent}.{part}" for part in packed.get(leaf, [leaf])]
        method = StreamLoraMethod(layer.quant_method, len(policy.streams))
        for block, stream in enumerate(policy.streams):
            updates = [policy.updates.get(stream, {}).get(module) for module in modules]  # type: ignore[arg-type]
            if any(updates):
                refuse_unknown(method.inner, name)
                update = packed_update(layer, updates, name)
                layer.add_module(f"update_{block}", update)
                method.blocks.append((block, update))
                pending -= {(stream, module) for module in modules}
        if method.blocks:
            layer.quant_method = method
    if pending:
        name, module = min(pending)
        raise ConfigError(f"adapter {name!r}: the base has no linear layer {module!r}: it is another model.")


def refuse_unknown(method: LinearMethodBase, name: str) -> None:
    """Raise ConfigError for a layer whose own method cannot carry an update on top.

    One that quantises float weights while it reads them is handled apart by vLLM's loader, which knows it by its class.
    """
    if not isinstance(method, LinearMethodBase) or method.uses_meta_device:
        raise ConfigError(
            f"{name}: its {type(method).__name__} cannot carry an adapter's update. Serve files that are quantised "
            "already, or the base as it was trained on, without --quantization."
        )


def packed_update(layer: LinearBase, updates: list[LoraUpdate | None], name: str) -> Update:
    """The update of the modules packed in `layer`, this rank's share of them, in the layer's dtype."""
    sizes = getattr(layer, "output_partition_sizes", [layer.output_size])
    place = {"device": torch.get_default_device(), "dtype": layer.params_dtype}
    lora_a, lora_b = [], []
    for index, (update, size) in enumerate(zip(updates, sizes, strict=True)):
        if update is None:
            lora_b.append(torch.empty(size, 0, **place))
            continue
        a, b = update.lora_a.float(), update.lora_b.float() * update.scale
        if isinstance(layer, RowParallelLinear):
            a = _share(a, 1, layer.input_size_per_partition, layer.tp_rank, layer.tp_size, name)
            size = layer.output_size
        elif isinstance(layer, ColumnParallelLinear):
            copies = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index else 1
            b = _share(b, 0, size, layer.tp_rank // copies, layer.tp_size // copies, name)
        if a.shape[1] != _inputs(layer) or b.shape[0] != size:
            raise ConfigError(
                f"{name}: the update is {tuple(update.lora_b.shape)} x {tuple(update.lora_a.shape)}, which does not "
                "fit the base's layer: it is another model."
            )
        lora_a.append(a)
        lora_b.append(b.to(**place))
    return Update(torch.cat(lora_a).to(**place).contiguous(), lora_b)


def _inputs(layer: LinearBase) -> int:
    return layer.input_size_per_partition if isinstance(layer, RowParallelLinear) else layer.input_size


def _share(tensor: Tensor, dim: int, size: int, rank: int, ranks: int, name: str) -> Tensor:
    if tensor.shape[dim] != size * ranks:
        raise ConfigError(f"{name}: the update has {tensor.shape[dim]} columns, the base's layer {size * ranks}.")
    return tensor.narrow(dim, rank * size, size)


def merged(weights: Iterable[tuple[str, Tensor]], updates: dict[str, LoraUpdate]) -> Iterator[tuple[str, Tensor]]:
    """The base's weights with the updates added, in float32 and then rounded as the base is.

    Raises:
        ConfigError: an update whose weight is not among them.
    """
    pending = set(updates)
    for name, weight in weights:
        module = name.removesuffix(".weight")
        if module in pending:
            pending.remove(module)
            update = updates[module]
            delta = (update.lora_b.float() @ update.lora_a.float()) * update.scale
            if delta.shape != weight.shape:
                raise ConfigError(f"{module}: the update is {tuple(delta.shape)}, the weight {tuple(weight.shape)}.")
            weight = (weight.float() + delta.to(weight.device)).to(weight.dtype)
        yield name, weight
    if pending:
        raise ConfigError(f"the base's files hold no weight {min(pending)!r}: it is another model.")
