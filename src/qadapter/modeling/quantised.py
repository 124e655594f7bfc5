"""Bases with quantised weights: on which an adapter can be trained.

Through bitsandbytes' layers gradients reach the adapter. Kernels of other formats have no backward, or PEFT puts layers
of its own above them, which cannot run beside the base in one batch; transformers can unpack most to floats instead.
"""

from typing import Any, NoReturn

from transformers import PreTrainedModel

from qadapter.errors import ConfigError
from qadapter.modeling.bases import BaseSource, load_config

TRAINABLE = ("bitsandbytes",)
# transformers unpacks these by itself where their kernels cannot run: only the loaded model tells.
UNPACKED_AT_NEED = ("fp8", "mxfp8", "mxfp4", "metal")


def check_trainable_files(source: BaseSource, quantization_config: Any = None) -> None:
    """Refuse a base whose files no adapter can be trained on, before they are loaded (or another package is asked for).

    Args:
        quantization_config: with which the base will be loaded; one that unpacks the weights makes any trainable.

    Raises:
        ConfigError: the files are quantised.
    """
    config = load_config(source)
    stated = None if config is None else _stated(config)
    if stated is None or _setting(stated, "dequantize") or _setting(quantization_config, "dequantize"):
        return
    if _method(stated) not in (*TRAINABLE, *UNPACKED_AT_NEED):
        _refuse(source.name, _method(stated))


def check_trainable(base: PreTrainedModel, name: str) -> None:
    """Refuse a loaded base whose weights are quantised so that no adapter can be trained on it.

    Raises:
        ConfigError: they are.
    """
    quantiser = getattr(base, "hf_quantizer", None)
    if quantiser is not None and _method(quantiser.quantization_config) not in TRAINABLE:
        _refuse(name, _method(quantiser.quantization_config))


def _stated(config: Any) -> Any:
    """How the files are quantised, by their config; None if they are not."""
    parts = (config, config.get_text_config(decoder=True))
    return next((part.quantization_config for part in parts if getattr(part, "quantization_config", None)), None)


def _setting(stated: Any, name: str) -> Any:
    return stated.get(name) if isinstance(stated, dict) else getattr(stated, name, None)


def _method(stated: Any) -> str:
    if _setting(stated, "load_in_4bit") or _setting(stated, "load_in_8bit"):
        return "bitsandbytes"  # old files do not name it
    method = _setting(stated, "quant_method")
    return str(getattr(method, "value", method))


def _refuse(name: str, method: str) -> NoReturn:
    raise ConfigError(
        f"base model {name!r} is quantised ({method}), and no adapter can be trained on that. Train on the model "
        "that it was made from (--load-in-4bit and --load-in-8bit quantise it as it is loaded), or from Python unpack "
        "it: from_base(..., quantization_config=) with dequantize=True."
    )
