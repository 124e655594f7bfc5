"""Bases with quantised weights: on which an adapter can be trained, and how its folder remembers the quantisation.

Through bitsandbytes' layers gradients reach the adapter. Kernels of other formats have no backward, or PEFT puts layers
of its own above them, which cannot run beside the base in one batch; transformers can unpack most to floats instead.

bitsandbytes quantises a base as it is loaded, so an adapter that was trained on one needs the same once more.
"""

from importlib import import_module
from typing import Any, NoReturn

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from qadapter.errors import ConfigError
from qadapter.modeling.bases import BaseSource, load_config

TRAINABLE = ("bitsandbytes",)
# transformers unpacks these by itself where their kernels cannot run: only the loaded model tells.
UNPACKED_AT_NEED = ("fp8", "mxfp8", "mxfp4", "metal")
UNQUANTISED = "--unquantised, in Python quantization_config=None"
# What of a `BitsAndBytesConfig` decides on the numbers, and of which types it may be in a folder's manifest.
SETTINGS = {
    "load_in_4bit": bool,
    "load_in_8bit": bool,
    "bnb_4bit_quant_type": str,
    "bnb_4bit_use_double_quant": bool,
    "llm_int8_threshold": float,
    "llm_int8_skip_modules": list | None,
}


def check_trainable_files(source: BaseSource, quantization_config: Any = None, token: str | bool | None = None) -> None:
    """Refuse a base whose files no adapter can be trained on, before they are loaded (or another package is asked for).

    Args:
        quantization_config: with which the base will be loaded; one that unpacks the weights makes any trainable.
        token: of the hub.

    Raises:
        ConfigError: the files are quantised.
    """
    config = load_config(source, token)
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


def keep_layout(base: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking the base's 4-bit weights at their first pass in evaluation.

    It does so on CPUs with bfloat16 instructions, for a kernel that has no backward: from then on no gradient comes
    through those layers (0.50.2).
    """
    for module in base.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def quantisation_of(base: PreTrainedModel) -> dict[str, Any] | None:
    """The SETTINGS with which bitsandbytes quantised a base as it was loaded.

    None for any other base, also for one whose files hold quantised weights: those files are the base.
    """
    quantiser = getattr(base, "hf_quantizer", None)
    if (
        quantiser is None
        or getattr(quantiser, "pre_quantized", True)
        or _method(quantiser.quantization_config) not in TRAINABLE
    ):
        return None
    settings = quantiser.quantization_config.to_dict()
    return {name: settings[name] for name in SETTINGS}


def quantised_again(settings: dict[str, Any], dtype: Any = None) -> BitsAndBytesConfig:
    """What quantises a base as an adapter's was, for `from_pretrained(quantization_config=)`.

    Args:
        settings: as `quantisation_of` gave them.
        dtype: to compute in, where it is a dtype.

    Raises:
        ConfigError: bitsandbytes cannot be used here.
    """
    require_bitsandbytes("the adapter was trained on a quantised base", f"load it unquantised: {UNQUANTISED}")
    computing = {"bnb_4bit_compute_dtype": dtype} if isinstance(dtype, torch.dtype) else {}
    return BitsAndBytesConfig(**settings, **computing)


def described(settings: dict[str, Any] | None) -> str:
    """Settings in words: "in 4 bits"."""
    return "unquantised" if settings is None else f"in {4 if settings['load_in_4bit'] else 8} bits"


def require_unquantised(base: PreTrainedModel, reason: str) -> None:
    """Raise ConfigError for a base with quantised weights."""
    if getattr(base, "is_quantized", False):
        way_out = (
            f"Load it unquantised: {UNQUANTISED}"
            if quantisation_of(base)
            else "Its files are: train on the model that they were made from"
        )
        raise ConfigError(f"the base is quantised: {reason}. {way_out}.")


def require_bitsandbytes(need: str, way_out: str) -> None:
    """Raise ConfigError unless the package bitsandbytes works here."""
    try:
        import_module("bitsandbytes")
    except Exception as error:  # a broken binary raises many types
        raise ConfigError(
            f"{need}, and bitsandbytes cannot be used here ({type(error).__name__}): "
            f"pip install 'qadapter[quantised]', or {way_out}."
        ) from error


def checked_quantisation(value: Any) -> dict[str, Any]:
    """The settings from a manifest.

    Raises:
        ValueError: they are not SETTINGS, each of its type.
    """
    if not isinstance(value, dict) or set(value) != set(SETTINGS):
        raise ValueError(f"base.quantization must have {', '.join(SETTINGS)}.")
    for name, kind in SETTINGS.items():
        if not isinstance(value[name], kind):
            raise ValueError(f"base.quantization.{name} is {value[name]!r}.")
    if value["load_in_4bit"] == value["load_in_8bit"]:
        raise ValueError("base.quantization must be in 4 bits or in 8.")
    if not all(isinstance(module, str) for module in value["llm_int8_skip_modules"] or ()):
        raise ValueError("base.quantization.llm_int8_skip_modules must be names.")
    return value


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
