"""The streams on the token axis: N tokens become S·N rows, block by block, so that the base's weights are read once.

Everything that works row by row is vLLM's own code on more rows. Attention is not: each stream has an `Attention` of
its own, and with it a key-value cache, which the engine sees, pages, shares and counts like any other layer's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionType

from qadapter.errors import ConfigError


class StreamDecoder(nn.Module):
    """Mixed into one of vLLM's decoders, whose parts it uses: one stream up to `first_layer`, then all of them."""

    streams: int = 1
    first_layer: int = 0
    # The decoder's own.
    embed_input_ids: Any
    layers: Any
    norm: Any

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Final hidden states (S·N, H) of N tokens."""
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds  # (N, H)
        residual = None
        for index, layer in enumerate(self.layers):
            if index == self.first_layer and self.streams > 1:
                positions = positions.repeat(self.streams)  # (S·N,)
                hidden = hidden.repeat(self.streams, 1)  # (S·N, H)
                residual = None if residual is None else residual.repeat(self.streams, 1)
            hidden, residual = layer(positions, hidden, residual)
        hidden, _ = self.norm(hidden, residual)
        return hidden


class StreamAttention(nn.Module):
    """One attention layer with its own cache for each stream, in place of the only one."""

    def __init__(self, first: Attention, streams: int, vllm_config: VllmConfig) -> None:
        super().__init__()
        others = (twin(first, f"{first.layer_name}.stream{number}", vllm_config) for number in range(1, streams))
        self.layers = nn.ModuleList([first, *others])
        self.without_cache = False

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each stream's block of rows through that stream's layer."""
        rows = query.shape[0] // len(self.layers)
        blocks = zip(self.layers, query.split(rows), key.split(rows), value.split(rows), strict=True)
        if self.without_cache:
            return torch.cat([plain_attention(layer, q, k, v) for layer, q, k, v in blocks])
        return torch.cat([layer(q, k, v) for layer, q, k, v in blocks])


def twin(attention: Attention, prefix: str, vllm_config: VllmConfig) -> Attention:
    """Another attention layer like the given one, under another name.

    Raises:
        ConfigError: the layer has more to it than can be copied from its attributes.
    """
    plain = attention.attn_type == AttentionType.DECODER and attention.kv_sharing_target_layer_name is None
    if not plain or attention.has_sink or type(attention) is not Attention:
        raise ConfigError(f"{attention.layer_name}: this kind of attention cannot run in two streams.")
    return Attention(
        attention.num_heads,
        attention.head_size,
        attention.impl.scale,
        num_kv_heads=attention.num_kv_heads,
        cache_config=vllm_config.cache_config,
        quant_config=attention.quant_config,
        per_layer_sliding_window=attention.sliding_window,
        prefix=prefix,
        attn_type=attention.attn_type,
    )


def plain_attention(layer: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention over the rows as one sequence, without a cache, as the probe needs it before there is one."""
    rows = query.shape[0]
    q = query.view(rows, -1, layer.head_size).transpose(0, 1)  # (heads, N, D)
    k, v = (x.view(rows, -1, layer.head_size).transpose(0, 1) for x in (key, value))
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
    distance = torch.arange(rows, device=q.device).unsqueeze(1) - torch.arange(rows, device=q.device)
    visible = (distance >= 0) & (distance < (layer.sliding_window or rows))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=layer.impl.scale)
    return mixed.transpose(0, 1).reshape(rows, -1)


def split_attention(decoder: StreamDecoder, vllm_config: VllmConfig) -> None:
    """Let the decoder's layers from `first_layer` on attend in `streams` streams.

    With one stream the wrapper stays too: the probe attends without a cache.

    Raises:
        ConfigError: attention that cannot run in streams.
    """
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn.attn
        # A quantised base's attention has scales to be read for a quantised cache, which a stream's own would miss.
        if is_quantized_kv_cache(attention.kv_cache_dtype) and next(attention.parameters(), None) is not None:
            raise ConfigError(
                f"{attention.layer_name}: a quantised key-value cache ({attention.kv_cache_dtype}) of a quantised base "
                "has scales that the streams cannot share. Pass --kv-cache-dtype bfloat16 (or float16)."
            )
        count = decoder.streams if index >= decoder.first_layer else 1
        layer.self_attn.attn = StreamAttention(attention, count, vllm_config)
