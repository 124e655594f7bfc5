"""Training with the model sharded over processes: settings of FSDP and DeepSpeed that fit, or are refused."""

from dataclasses import replace
from typing import Any

from qadapter.errors import ConfigError
from qadapter.training_arguments import QAdapterTrainingArguments


def fit_sharding(args: QAdapterTrainingArguments, fsdp: Any, deepspeed: Any) -> None:
    """Let accelerate's plugin, of which one is None, run the policy as it needs it.

    Raises:
        ConfigError: an option that does not work with either, or a setting with which the adapter cannot be saved.
    """
    for name in ("cache_base_states", "micro_batch_tokens"):
        if value := getattr(args, name):
            raise ConfigError(f"{name} = {value!r}: not with FSDP or DeepSpeed. Leave it out.")
    if fsdp is not None:
        _fit_fsdp(fsdp)
    if deepspeed is not None and deepspeed.zero_stage == 3 and not deepspeed.zero3_save_16bit_model:
        raise ConfigError(
            "zero3_save_16bit_model = false: the adapter could not be saved. Set it to true, or "
            "stage3_gather_16bit_weights_on_model_save in a file of DeepSpeed's own."
        )


def _fit_fsdp(plugin: Any) -> None:
    if plugin.activation_checkpointing:
        raise ConfigError(
            "fsdp_activation_checkpointing = true: PEFT finds no adapter in the layers that it wraps, so none would be "
            "saved. Set it to false, and gradient_checkpointing = true."
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ConfigError(
            f"fsdp_state_dict_type = {plugin.state_dict_type}: the adapter would not be saved. Set FULL_STATE_DICT."
        )
    if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        # The statistics of tokens, which the model returns, would be rounded; they differ by little and are summed.
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
