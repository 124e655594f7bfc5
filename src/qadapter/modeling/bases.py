"""Base models and their tokenizers: where they come from, and how they are loaded."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from qadapter.errors import ConfigError, first_line
from qadapter.modeling.builtin_model import BUILTIN_MODEL, GGUF_REVISION, converted_builtin

HUB_TIMEOUT_SECONDS = 5.0
# Arguments of from_pretrained that have one value here, and why.
FIXED_LOADING = {
    "trust_remote_code": (False, "code from the hub is never run"),
    "use_safetensors": (True, "pickled weights are never read"),
    "output_loading_info": (False, "a policy comes back, and missing weights are an error"),
}


class BaseSource(NamedTuple):
    """Where to load a base model from, and the name and revision by which adapters remember it."""

    path: str
    name: str
    revision: str | None

    @property
    def hub_revision(self) -> str | None:
        """The revision to ask the hub for; None for local folders."""
        return None if os.path.isdir(self.path) else self.revision


def resolve_base(name: str | os.PathLike[str], revision: str | None = None) -> BaseSource:
    """Where `name` (a folder, a hub id, or "builtin") is found on this machine.

    Raises:
        ConfigError: a path that leads to no folder, or to an adapter's; the built-in model is neither on the hub nor
            installed as a package.
    """
    name = remembered_name(name)
    if os.path.isdir(name):
        if not _has_any(name, "config.json") and _has_any(name, "qadapter_config.json", "adapter_config.json"):
            raise ConfigError(f"base model {name!r} is an adapter's folder: give the model that it was trained on.")
        return BaseSource(name, name, None)
    if os.path.isfile(name) or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ConfigError(
            f"base model {name!r}: there is no such folder. Give a folder with config.json and safetensors, a hub id, "
            "or builtin; for an adapter whose base has moved, with --base-model (base_model=)."
        )
    if name == "builtin":
        name = BUILTIN_MODEL
    if name != BUILTIN_MODEL:
        return BaseSource(name, name, revision)
    if revision != GGUF_REVISION and hub_has(name, revision):
        return BaseSource(name, name, revision)
    return BaseSource(str(converted_builtin()), name, GGUF_REVISION)


def remembered_name(name: str | os.PathLike[str]) -> str:
    """The name by which an adapter remembers its base: for a folder its absolute path, which holds everywhere."""
    return os.path.abspath(name) if os.path.isdir(name) else os.fspath(name)


def source_of(base: PreTrainedModel) -> BaseSource:
    """Where a loaded base model came from; without a name if nothing says so."""
    name = remembered_name(base.name_or_path)
    return BaseSource(name, name, None)


def _has_any(folder: str, *files: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, file)) for file in files)


def hub_has(name: str, revision: str | None = None) -> bool:
    """Whether a hub model is in the local cache or reachable within a few seconds."""
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return True
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except Exception:  # whatever the network does, the answer is no
        return False
    return True


def load_config(source: BaseSource, token: str | bool | None = None) -> Any:
    """The config of a base model; None where none can be read."""
    revision = source.hub_revision or "main"
    try:
        return AutoConfig.from_pretrained(source.path, revision=revision, token=token, trust_remote_code=False)
    except Exception:  # of any kind, by the file: whoever loads the base says what is wrong with it
        return None


def loading_class(config: Any, name: str) -> Any:
    """The class of transformers that loads a base with this config: some that read images, too, have one of their own.

    Raises:
        ConfigError: the model, called `name`, is of no kind that writes on from a text.
    """
    if config is None or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:  # without a config, to say what is wrong with it
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not config.is_encoder_decoder:
        return AutoModelForImageTextToText
    kind = (config.architectures or [type(config).__name__])[0]
    raise ConfigError(f"base model {name!r} is a {kind}, which is no causal language model: give one that is.")


def load_base(source: BaseSource, **model_kwargs: Any) -> PreTrainedModel:
    """The base model from safetensors in a folder or hub repository; remote code is never run.

    Raises:
        ConfigError: nothing loadable is there, it is no causal language model, or a package that reads its weights is
            missing.
    """
    if model_kwargs.get("quantization_config", ...) is None:  # it would overwrite what quantised files state
        del model_kwargs["quantization_config"]
    for name, (fixed, reason) in FIXED_LOADING.items():
        if model_kwargs.pop(name, fixed) not in (fixed, None):
            raise ConfigError(f"{name} is {fixed} for every base: {reason}. Leave it out.")
    kind = loading_class(load_config(source, model_kwargs.get("token")), source.name)
    try:
        model, loading = kind.from_pretrained(
            source.path,
            revision=source.hub_revision or "main",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **model_kwargs,
        )
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"base model {source.name!r} cannot be loaded: {reason} "
            "Give a folder with config.json and safetensors, or a hub id that is cached or reachable."
        ) from error
    except (SafetensorError, StrictDataclassError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "mismatched_sizes" not in str(error):
            raise  # of memory or a device: nothing is wrong with the files
        raise ConfigError(
            f"base model {source.name!r} cannot be loaded: its files are damaged or belong to different models "
            f"({first_line(error)}). Download it again."
        ) from error
    except ImportError as error:  # of a quantisation
        raise ConfigError(f"base model {source.name!r} cannot be loaded: {first_line(error)}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ConfigError(
            f"base model {source.name!r}: {len(missing)} weights are missing from its files, first {missing[0]!r}: "
            "it would run with random numbers there. Download it again."
        )
    return model


def context_limit(config: Any) -> int | None:
    """Tokens that a text of this base may have, prompt and answer together; None if its config does not say.

    With LongRoPE, what it was first trained with: beyond, all positions of a batch change with its longest row.
    """
    config = config.get_text_config(decoder=True)
    scalings = getattr(config, "rope_parameters", None) or {}
    # One for all layers, or one for each kind of layer.
    of_kinds = [scaling for scaling in scalings.values() if isinstance(scaling, Mapping)] or [scalings]
    limits = [getattr(config, "max_position_embeddings", None)]
    for scaling in of_kinds:
        if scaling.get("rope_type") == "longrope":
            limits.append(scaling.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit is not None), default=None)


def load_tokenizer(source: BaseSource | str | os.PathLike[str], token: str | bool | None = None) -> Any:
    """The tokenizer of a base model or folder; with the token of the hub, where it is to be had there only.

    Raises:
        ConfigError: there is none.
    """
    path, revision = (source.path, source.hub_revision) if isinstance(source, BaseSource) else (source, None)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision or "main", token=token, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"no tokenizer can be loaded from {os.fspath(path)!r}: {reason.rstrip('.:')}. "
            "Give a folder that has the tokenizer's files, too, or a hub id that is cached or reachable."
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
