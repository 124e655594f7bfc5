"""What a training step must compute, and how fast the device multiplies matrices."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from decode import synchronise
from transformers import PreTrainedModel

from qadapter.data.packing import SIDES
from qadapter.modeling.trunk import decoder_layers

SIDE = {"cuda": 8192, "cpu": 1024}


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matmul of random numbers, the median of ten."""
    side = SIDE[device]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        synchronise(device)
        start = time.perf_counter()
        left @ right
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds[3:])


def needed_operations(base: PreTrainedModel, pairs: Sequence[dict[str, Any]], first_layer: int) -> float:
    """Floating-point operations that a step on these pairs cannot do without, adapter in layer `first_layer` and above.

    Counted from the pairs, not from the batches that are made of them. Each distinct token passes the decoder's
    matmuls in the base's pass, in the adapter's, and once more for the gradient with respect to activations; below
    `first_layer` in the base's pass only. Attention likewise, with four matmuls in the backward pass to two in the
    forward. The head: both streams' logits of each response token and the expected row. The adapter's own products
    and everything element by element are left out.
    """
    config = base.config
    sequences = [(*pair["prompt_ids"], *pair[side]) for pair in pairs for side in SIDES]
    tokens = len({ids[: end + 1] for ids in sequences for end in range(len(ids))})  # a token is what it follows, too
    answered = sum(len(pair[side]) for pair in pairs for side in SIDES)
    layers = decoder_layers(base)
    assert layers is not None
    weights = [sum(p.numel() for p in layer.parameters() if p.dim() == 2) for layer in layers]
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    squares = sum(len(ids) ** 2 / 2 for ids in sequences)
    matmuls = 2 * tokens * (sum(weights) + 2 * sum(weights[first_layer:]))
    attention = 4 * width * squares * (len(layers) + 3 * (len(layers) - first_layer))
    head = 3 * 2 * answered * base.get_output_embeddings().weight.numel()
    return matmuls + attention + head
