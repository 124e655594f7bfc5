"""The families: vLLM's own decoders with the streams mixed in."""

from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.models.gemma import GemmaForCausalLM, GemmaModel
from vllm.model_executor.models.gemma3 import Gemma3Model
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.mistral import MistralDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3Model

from qadapter_vllm.model import QAdapterModel
from qadapter_vllm.streams import StreamDecoder


@support_torch_compile
class LlamaStreams(StreamDecoder, LlamaModel):
    """Llama, and models of its shape such as SmolLM2."""


@support_torch_compile
class MistralStreams(StreamDecoder, LlamaModel):
    """Mistral: Llama with its own layers."""

    def __init__(self, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(**kwargs, layer_type=MistralDecoderLayer)


@support_torch_compile
class Qwen2Streams(StreamDecoder, Qwen2Model):
    """Qwen 2 and 2.5."""


@support_torch_compile
class Qwen3Streams(StreamDecoder, Qwen3Model):
    """Qwen 3."""


@support_torch_compile
class GemmaStreams(StreamDecoder, GemmaModel):
    """Gemma."""


@support_torch_compile
class Gemma3Streams(StreamDecoder, Gemma3Model):
    """Gemma 3, text only."""


class QAdapterLlamaForCausalLM(QAdapterModel):
    """A policy over a Llama."""

    decoder_class = LlamaStreams


class QAdapterMistralForCausalLM(QAdapterModel):
    """A policy over a Mistral."""

    decoder_class = MistralStreams


class QAdapterQwen2ForCausalLM(QAdapterModel):
    """A policy over a Qwen 2."""

    decoder_class = Qwen2Streams


class QAdapterQwen3ForCausalLM(QAdapterModel):
    """A policy over a Qwen 3."""

    decoder_class = Qwen3Streams


class QAdapterGemmaForCausalLM(QAdapterModel):
    """A policy over a Gemma."""

    decoder_class = GemmaStreams
    top_mapper = GemmaForCausalLM.hf_to_vllm_mapper


class QAdapterGemma3ForCausalLM(QAdapterModel):
    """A policy over a Gemma 3."""

    decoder_class = Gemma3Streams
