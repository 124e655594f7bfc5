"""Q-Adapter policies on vLLM: the plugin that vLLM loads in each of its processes."""

# Architectures of base models that can be customised here; identity 4 of docs/method.md must hold for each.
FAMILIES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma3ForCausalLM",
)
PREFIX = "QAdapter"
TESTED_VLLM = "0.32"


def register() -> None:
    """Make `QAdapter<architecture>` known to vLLM; nothing heavy is imported before such a model is asked for."""
    from vllm import ModelRegistry, __version__
    from vllm.logger import init_logger
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from qadapter_vllm.adapter_folders import take_adapter_folders
    from qadapter_vllm.startup import StartupChecks

    if not __version__.startswith(f"{TESTED_VLLM}."):
        init_logger(__name__).warning(
            "qadapter-vllm was tested with vLLM %s, this is %s: run its parity suite before you rely on it.",
            TESTED_VLLM,
            __version__,
        )
    for family in FAMILIES:
        ModelRegistry.register_model(PREFIX + family, f"qadapter_vllm.models:{PREFIX}{family}")
        # vLLM has no public hook for checks of an out-of-tree model's configuration; this is where its own are.
        MODELS_CONFIG_MAP[PREFIX + family] = StartupChecks
    take_adapter_folders()
