"""A digest of a whole frozen base, for what must not outlive any change of it."""

import hashlib
import json

import torch
from torch import Tensor
from transformers import PreTrainedModel

SUMMED_AT_ONCE = 2**22  # numbers; their sums take 8 bytes each
# Of the config, what the base computes does not depend on.
NO_MATTER = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")


def base_digest(base: PreTrainedModel) -> str:
    """SHA-256 over the base's config and the sums of all its weights and buffers, which change with any one number.

    The fingerprint in an adapter folder samples the weights; here a base may be the same but for a row of its
    embeddings, or the frequencies of its positions.
    """
    config = base.config.to_dict()
    for name in NO_MATTER:
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    named = [*base.named_parameters(), *base.named_buffers()]
    frozen = {name.replace(".base_layer.", "."): tensor for name, tensor in named if "lora_" not in name}
    for name in sorted(frozen):
        digest.update(f"{name} {tuple(frozen[name].shape)} {bit_sums(frozen[name])}".encode())
    return digest.hexdigest()


def bit_sums(tensor: Tensor) -> tuple[int, int]:
    """Σ bᵢ and Σ bᵢ·(i mod m) of the numbers as integers bᵢ, modulo 2⁶⁴: exact, in whatever order they are summed."""
    flat = tensor.detach().reshape(-1)
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = bits.new_zeros(2, dtype=torch.int64)
    places = torch.arange(1, min(SUMMED_AT_ONCE, max(1, bits.numel())) + 1, device=bits.device)
    for part in bits.split(SUMMED_AT_ONCE):
        wide = part.to(torch.int64)
        total += torch.stack([wide.sum(), (wide * places[: len(wide)]).sum()])
    plain, placed = total.tolist()
    return plain, placed
