"""The customised policy as a vLLM model: one decoder for all streams, their hidden states mixed, one head."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from qadapter_vllm.lora import add_lora, merged
from qadapter_vllm.settings import read_policy
from qadapter_vllm.streams import StreamDecoder, split_attention
from qadapter_vllm.verification import FingerprintReader, check_fingerprint, check_probe


class QAdapterModel(nn.Module, SupportsQuant):
    """What all families share; a family names its decoder, which is one of vLLM's with `StreamDecoder` mixed in."""

    decoder_class: type[StreamDecoder]
    # For families whose decoder does not map the files' names itself.
    top_mapper: WeightsMapper | None = None
    packed_modules_mapping = {  # noqa: RUF012 -- vLLM reads it on the class
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        model = vllm_config.model_config
        self.policy = read_policy(config, model.model, model.revision)
        self.tied = config.tie_word_embeddings
        self.dtype = vllm_config.model_config.dtype
        self.quantisation = vllm_config.model_config.quantization
        self.model = self.decoder_class(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.model.streams, self.model.first_layer = len(self.policy.streams), self.policy.first_layer
        split_attention(self.model, vllm_config)
        # One stream with an adapter has nothing beside it: the adapter is merged, unless the base is quantised.
        self.merges = not self.policy.has_dial and vllm_config.quant_config is None
        if not self.merges:
            add_lora(self, self.policy, self.packed_modules_mapping)
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if self.tied:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size, scale=getattr(config, "logit_scale", 1.0))

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token embeddings (N, H)."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        strength: Tensor | None = None,
    ) -> Tensor:
        """Mixed hidden states (N, H), from which the head makes the policy's logits.

        Args:
            strength: one a token (N,), where the engine's runner can give it; None takes the server's.
        """
        return self.mix(self.model(input_ids, positions, intermediate_tensors, inputs_embeds), strength)

    def mix(self, hidden: Tensor, strength: Tensor | float | None = None) -> Tensor:
        """Σ_s c_s h_s (N, H) of the streams' states (S·N, H)."""
        strength = self.policy.settings.strength if strength is None else strength
        if isinstance(strength, Tensor):
            strength = strength.unsqueeze(-1)  # (N, 1)
        coefficients = self.policy.coefficients(strength)
        if coefficients == [1.0]:
            return hidden
        return weighted_sum(coefficients, hidden.view(len(coefficients), -1, hidden.shape[-1]))  # of (S, N, H)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The policy's logits (N, V), on the ranks that vLLM wants them on."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the base, checking that it is the one trained on; with one stream, with the adapter merged in.

        Raises:
            AdapterFormatError: these are another base's weights.
        """
        reader = FingerprintReader(self.tied)
        weights = reader.read(weights)
        for updates in self.policy.updates.values() if self.merges else ():
            weights = merged(weights, updates)
        loaded = AutoWeightsLoader(self).load_weights(weights, mapper=self.top_mapper)
        check_fingerprint(reader.fingerprint(), self.policy, self.config.name_or_path, self.quantisation)
        return loaded

    def process_weights_after_loading(self) -> None:
        """vLLM calls this when everything is in place: the stored probes are computed again.

        Raises:
            AdapterFormatError: base and adapter do not give what they gave when the adapter was saved.
        """
        check_probe(self)

    def get_model_state_cls(self) -> type:
        """What keeps the requests' strengths, for the V2 model runner."""
        from qadapter_vllm.state import StrengthState

        return StrengthState

    @torch.no_grad()
    def probe_logits(self, ids: list[int], coefficients: list[float]) -> Tensor | None:
        """Logits (V,) after `ids` with the given weights of the streams, without a cache."""
        device = next(self.parameters()).device
        tokens = torch.tensor(ids, device=device)
        attention = [layer.self_attn.attn for layer in self.model.layers]
        for wrapper in attention:
            wrapper.without_cache = True
        try:
            # The decoder's own forward: it is not compiled yet, and need not be for this.
            hidden = self.model.forward(tokens, torch.arange(len(ids), device=device))
        finally:
            for wrapper in attention:
                wrapper.without_cache = False
        states = hidden.view(len(coefficients), len(ids), -1)[:, -1]  # (S, H)
        logits = self.compute_logits(weighted_sum(coefficients, states).unsqueeze(0))
        return None if logits is None else logits[0].float()


def weighted_sum(coefficients: Sequence[float | Tensor], states: Tensor) -> Tensor:
    """Σ_s c_s h_s of the streams' states (S, ..., H), in float32: bf16 sums cost 1e-3 in log-probability."""
    mixed = sum(c * block for c, block in zip(coefficients, states.float(), strict=True))
    return mixed.to(states.dtype)
