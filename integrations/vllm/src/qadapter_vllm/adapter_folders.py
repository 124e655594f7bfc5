"""An adapter folder given as the model: vLLM reads the base that it names, and the config names the adapter."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadapter.errors import AdapterFormatError, ConfigError
from qadapter.modeling.bases import resolve_base
from qadapter.modeling.manifest import MANIFEST_NAME, read_manifest
from qadapter_vllm import FAMILIES, PREFIX
from qadapter_vllm.startup import refuse_unread_entry

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs


def take_adapter_folders() -> None:
    """Let `vllm serve` and `LLM` take an adapter folder, and refuse a `qadapter` entry that nobody would read.

    vLLM asks for a config before anything of a plugin's is called, and has no hook before that; it swaps model and
    tokenizer in the same place itself, where the model is a speculator.
    """
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config

    @functools.wraps(create)
    def create_engine_config(self: "EngineArgs", *arguments: Any, **options: Any) -> Any:
        serve_base_of(self)
        read_files_trained_on(self)
        config = create(self, *arguments, **options)
        refuse_unread_entry(config)
        return config

    EngineArgs.create_engine_config = create_engine_config


def serve_base_of(arguments: "EngineArgs") -> None:
    """Where the model is an adapter folder, take its base as the model, and name the folder in the config.

    Raises:
        AdapterFormatError: a damaged manifest, or a plain PEFT adapter.
        ConfigError: a base that cannot be served, or options that do not go with an adapter folder.
    """
    folder = Path(arguments.model)
    if (folder / "config.json").exists() or not any(
        (folder / name).is_file() for name in (MANIFEST_NAME, "adapter_config.json")
    ):
        return
    base = read_manifest(folder).base
    name = base["name"]
    if not name:
        raise AdapterFormatError(
            f"{folder}: the adapter does not know its base model's name: give the base as the model, and the adapter "
            "with --hf-overrides."
        )
    _refuse(folder, base, arguments.trust_remote_code)
    overrides = _overrides(folder, arguments.hf_overrides or {})
    source = resolve_base(name, base["revision"])
    arguments.served_model_name = arguments.served_model_name or arguments.model
    arguments.model, arguments.revision = source.path, arguments.revision or source.hub_revision
    if arguments.tokenizer is None and (folder / "tokenizer_config.json").exists():
        arguments.tokenizer = str(folder)
    # The user's own overrides win.
    entry = dict(overrides.get("qadapter", {}))
    if not entry.get("adapters"):
        entry = {"adapter": str(folder), **entry}
    arguments.hf_overrides = {"architectures": [f"{PREFIX}{base['architecture']}"], **overrides, "qadapter": entry}


def read_files_trained_on(arguments: "EngineArgs") -> None:
    """Take config, weights and tokenizer as transformers has them, unless the user chose others.

    vLLM prefers the files in Mistral's own format where a repository holds both: other names, another chat template.
    """
    overrides = arguments.hf_overrides
    named = overrides.get("architectures") if isinstance(overrides, Mapping) else None
    if f"{PREFIX}MistralForCausalLM" not in (named or ()):
        return
    for format_of in ("config_format", "load_format", "tokenizer_mode"):
        if getattr(arguments, format_of) == "auto":
            setattr(arguments, format_of, "hf")


def _overrides(folder: Path, given: Any) -> dict[str, Any]:
    """The user's overrides; raises ConfigError unless they and their qadapter entry are dictionaries."""
    if not isinstance(given, Mapping) or not isinstance(given.get("qadapter", {}), Mapping):
        raise ConfigError(
            f"{folder}: hf_overrides and its qadapter entry must be dictionaries where the model is an adapter folder."
        )
    return dict(given)


def _refuse(folder: Path, base: dict[str, Any], trust_remote_code: bool) -> None:
    if base["architecture"] not in FAMILIES:
        raise ConfigError(
            f"{folder}: trained on a {base['architecture']!r}, which cannot be served on vLLM; served are "
            f"{', '.join(FAMILIES)}. Use `qadapter serve`."
        )
    if trust_remote_code:
        raise ConfigError(
            f"{folder} names its own base ({base['name']!r}), whose code --trust-remote-code would run. Give the base "
            "as the model, and the adapter with --hf-overrides."
        )
