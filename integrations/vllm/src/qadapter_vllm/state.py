"""Each request's strength on its way to the model, for vLLM's V2 model runner."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState

from qadapter_vllm.admission import requested_strength

if TYPE_CHECKING:
    from qadapter_vllm.model import QAdapterModel


class StrengthState(DefaultModelState):
    """Keeps the strength of each running request and gives the model one a token.

    The tensor given to the model is always the same memory, because CUDA graphs replay on its address.
    """

    def __init__(
        self, vllm_config: VllmConfig, model: "QAdapterModel", encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.has_dial = model.policy.has_dial
        self.default = model.policy.settings.strength
        self.of_requests = torch.full((self.max_num_reqs,), self.default)
        self.on_device = self.of_requests.to(device)
        self.of_tokens = torch.full((self.max_num_tokens,), self.default, device=device)
        self.positions = torch.arange(self.max_num_tokens, device=device)
        self.stale = False

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Remember a request's strength; slots are used again, so each request sets its own."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        strength = None if params is None else requested_strength(params)
        self.of_requests[req_index] = self.default if strength is None else strength
        self.stale = True

    def apply_staged_writes(self) -> None:
        """Bring new requests' strengths to the device, once a step."""
        super().apply_staged_writes()
        if self.stale:
            self.on_device.copy_(self.of_requests)
            self.stale = False

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """The model's inputs of a step, with the strength of each token's request (N,)."""
        inputs = super().prepare_inputs(input_batch, req_states)
        if not self.has_dial:
            return inputs
        tokens, requests = input_batch.num_tokens_after_padding, input_batch.num_reqs
        ends = input_batch.query_start_loc[1 : requests + 1]
        # Padding behind the last request takes that request's strength; nobody reads it.
        owner = torch.bucketize(self.positions[:tokens], ends, right=True).clamp_(max=requests - 1)
        strength = self.of_tokens[:tokens]
        strength.copy_(self.on_device[input_batch.idx_mapping[:requests].long()[owner]])
        return {**inputs, "strength": strength}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """The same for warming up and capturing."""
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "strength": self.of_tokens[:num_tokens]} if self.has_dial else inputs
