"""A policy for tools that know nothing of streams: merged checkpoint, plain LoRA, distilled LoRA, GGUF, vLLM."""

from qadapter.export.distil import DistilledLora, distil
from qadapter.export.gguf import export_gguf_ready
from qadapter.export.merged import export_lora, export_merged
from qadapter.export.vllm import export_vllm

__all__ = ["DistilledLora", "distil", "export_gguf_ready", "export_lora", "export_merged", "export_vllm"]
