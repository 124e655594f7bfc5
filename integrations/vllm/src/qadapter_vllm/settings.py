"""What is to be served: the `qadapter` entry of the model's config, and the adapter folders that it names."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadapter.errors import AdapterFormatError, ConfigError
from qadapter.functional import composed_coefficients, mix_coefficients
from qadapter.modeling.hub import local_folder
from qadapter.modeling.loading import StoredAdapter, check_same_origin, read_folder
from qadapter.modeling.lora_files import KEY
from qadapter.modeling.mixing import checked_number, checked_weights

if TYPE_CHECKING:
    from torch import Tensor

KEYS = ("adapter", "adapters", "weights", "strength", "dial", "quantised", "verify")
TARGET = re.compile(r"model\.layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")


@dataclass(frozen=True)
class Settings:
    """The `qadapter` entry of a model's config.

    Args:
        adapter: adapter folder or hub id; None: the model's own folder, as `qadapter export --format vllm` writes it.
        adapters: {name: adapter folder or hub id} of a composition, instead of `adapter`.
        weights: {name: weight}; None: as stored, or 1 each in a composition.
        strength: the dial's default, 1 being the trained policy.
        dial: keep the base's stream even where the default strength needs one stream only, so that requests may
            choose their strength.
        quantised: take a quantised copy of the base trained on: the probe alone tells whether it is one.
        verify: refuse, instead of warn about, another base, tokenizer or adapter than those trained with.
    """

    adapter: str | None = None
    adapters: Mapping[str, str] | None = None
    weights: Mapping[str, float] | None = None
    strength: float = 1.0
    dial: bool = False
    quantised: bool = False
    verify: bool = True

    @classmethod
    def of(cls, hf_config: Any) -> "Settings":
        """The settings in a model's config.

        Raises:
            ConfigError: no such entry, an unknown key or a value of the wrong kind.
        """
        entry = getattr(hf_config, "qadapter", None)
        if not isinstance(entry, Mapping):
            raise ConfigError(
                "the model's config has no `qadapter` entry. Serve a folder that `qadapter export --format vllm` "
                'wrote, or pass --hf-overrides \'{"architectures": ["QAdapter..."], "qadapter": {"adapter": "DIR"}}\'.'
            )
        if unknown := sorted(set(entry) - set(KEYS)):
            raise ConfigError(f"the config's qadapter entry has the unknown keys {unknown}; known are {list(KEYS)}.")
        kinds: dict[str, type] = {"adapter": str, "adapters": Mapping, "weights": Mapping}
        kinds["dial"] = kinds["quantised"] = kinds["verify"] = bool
        for key, kind in kinds.items():
            if entry.get(key) is not None and not isinstance(entry[key], kind):
                raise ConfigError(f"qadapter.{key} = {entry[key]!r}: must be a {kind.__name__}.")
        if entry.get("adapter") is not None and entry.get("adapters") is not None:
            raise ConfigError("qadapter.adapter and qadapter.adapters exclude each other: give one.")
        settings = cls(**{key: value for key, value in entry.items() if value is not None})
        checked_number(settings.strength, "qadapter.strength")
        return settings


@dataclass(frozen=True)
class LoraUpdate:
    """One module's update: scale · B A."""

    lora_a: Any  # (r, in)
    lora_b: Any  # (out, r)
    scale: float


@dataclass(frozen=True)
class Policy:
    """The policy as the engine runs it.

    Args:
        streams: adapters' names in the order of their blocks of rows, None for the base.
        offsets, slopes: stream s has the coefficient offsets[s] + strength · slopes[s].
        updates: {adapter: {module: its update}} of the adapters among the streams.
        stored: all adapters, with their manifests.
    """

    settings: Settings
    streams: tuple[str | None, ...]
    offsets: tuple[float, ...]
    slopes: tuple[float, ...]
    updates: dict[str, dict[str, LoraUpdate]] = field(repr=False)
    stored: dict[str, StoredAdapter] = field(repr=False)

    @property
    def has_dial(self) -> bool:
        """Whether a request can have a strength of its own."""
        return len(self.streams) > 1

    @property
    def first_layer(self) -> int:
        """The lowest adapted layer: below it all streams are the same."""
        modules = [module for updates in self.updates.values() for module in updates]
        return min((layer_of(module) for module in modules), default=0)

    def coefficients(self, strength: "float | Tensor") -> "list[float | Tensor]":
        """The weight of each stream's hidden states at a strength, or at one a token."""
        return [offset + strength * slope for offset, slope in zip(self.offsets, self.slopes, strict=True)]

    def graph(self) -> dict[str, Any]:
        """What shapes the compiled graph, for the key of the compile cache."""
        ranks = {
            f"{name}:{module}": update.lora_a.shape[0]
            for name, updates in self.updates.items()
            for module, update in sorted(updates.items())
        }
        return {"streams": [name or "" for name in self.streams], "ranks": ranks}


def layer_of(module: str) -> int:
    """The layer's number in a module's name."""
    return int(TARGET.fullmatch(module).group(1))  # type: ignore[union-attr]


def read_policy(hf_config: Any, model: str, revision: str | None = None) -> Policy:
    """The policy that a model's config asks for, its files read and checked as far as that goes without the base.

    Args:
        model: the model's folder or hub id, where the adapter is unless the config names one.
        revision: of the model on the hub.

    Raises:
        AdapterFormatError: a folder is no adapter, or is damaged.
        ConfigError: settings that cannot be served.
    """
    settings = Settings.of(hf_config)
    stored = _stored_adapters(settings, model, revision)
    defaults = {name: entry.manifest.weights[entry.stored_name] for name, entry in stored.items()}
    if settings.adapters is not None:
        defaults = dict.fromkeys(stored, 1.0)
    weights = checked_weights(settings.weights, defaults)
    configs = {name: entry.config for name, entry in stored.items()}
    trained = {name: mix_coefficients(c.parametrisation, c.alpha_tilde, c.alpha_0) for name, c in configs.items()}
    _, offset = composed_coefficients(trained, dict.fromkeys(weights, 0.0))
    slopes, base_at_one = composed_coefficients(trained, weights)
    table: dict[str | None, tuple[float, float]] = {
        name: (0.0, float(slope)) for name, slope in slopes.items() if slope
    }
    table[None] = (float(offset), float(base_at_one) - float(offset))
    if not settings.dial:
        needed = {stream: row for stream, row in table.items() if row[0] + settings.strength * row[1]}
        table = needed if len(needed) == 1 else table
    updates = {name: lora_updates(stored[name]) for name in table if name is not None}
    offsets, table_slopes = zip(*table.values(), strict=True)
    return Policy(settings, tuple(table), offsets, table_slopes, updates, stored)


def _stored_adapters(settings: Settings, model: str, revision: str | None) -> dict[str, StoredAdapter]:
    if settings.adapters is None:
        # Without a name base and adapter are in one repository, and of one revision.
        folder = _folder(settings.adapter) if settings.adapter else _folder(model, revision)
        return read_folder(folder, settings.verify)
    result = {}
    for name, source in settings.adapters.items():
        stored = read_folder(_folder(source), settings.verify)
        if len(stored) != 1:
            raise ConfigError(f"{source} holds {len(stored)} adapters {sorted(stored)}: a composition takes one each.")
        (result[name],) = stored.values()
    if not result:
        raise ConfigError("qadapter.adapters names no adapter.")
    check_same_origin(result)
    return result


def _folder(name: Any, revision: str | None = None) -> Path:
    if not isinstance(name, str | os.PathLike):
        raise ConfigError(f"qadapter: {name!r} is no adapter folder.")
    return local_folder(name, revision)


def lora_updates(entry: StoredAdapter) -> dict[str, LoraUpdate]:
    """The adapter's updates by module.

    Raises:
        ConfigError: an update that cannot run as a stream here (DoRA), or on a module that has none (head, embedding).
    """
    if entry.peft_config.use_dora:
        raise ConfigError(
            f"{entry.root}: a DoRA adapter rescales the base's own output, which is not supported on vLLM. Serve it "
            "with `qadapter serve`, or merge it (`qadapter export --format merged`)."
        )
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in entry.tensors.items():
        match = KEY.fullmatch(name)
        if match is None:
            raise AdapterFormatError(f"{entry.root}: tensor {name!r} is not part of a LoRA adapter.")
        parts.setdefault(match.group(1), {})[match.group(2)] = tensor
    if wrong := sorted(module for module in parts if not TARGET.fullmatch(module)):
        raise ConfigError(
            f"{entry.root}: LoRA on {wrong[0]!r} cannot be served on vLLM: only the attention's and the MLP's linear "
            "layers can (no head, no embedding). Serve it with `qadapter serve`, or train without that target."
        )
    return {module: _update(entry, module, tensors) for module, tensors in parts.items()}


def _update(entry: StoredAdapter, module: str, tensors: dict[str, Any]) -> LoraUpdate:
    config, rank = entry.peft_config, tensors["A.weight"].shape[0]
    alpha = (config.alpha_pattern or {}).get(re.escape(module), config.lora_alpha)
    return LoraUpdate(tensors["A.weight"], tensors["B.weight"], alpha / (rank**0.5 if config.use_rslora else rank))
