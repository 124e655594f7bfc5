"""qadapter_config.json: what an adapter folder says of itself, checked before anything else is touched."""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qadapter.config import QAdapterConfig
from qadapter.errors import AdapterFormatError, ConfigError
from qadapter.modeling.quantised import checked_quantisation

MANIFEST_NAME = "qadapter_config.json"
FORMAT_VERSION = 1
MAX_JSON_BYTES = 2**20
MAX_ADAPTERS = 64
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass
class Manifest:
    """The contents of qadapter_config.json.

    Args:
        configs: {adapter: settings of `QAdapterConfig`}.
        weights: {adapter: default weight in the composition}.
        digests: {adapter: SHA-256 of adapter_model.safetensors}.
        base: name, revision, fingerprint (`weight_fingerprint`) and architecture of the base model, and, where it was
            quantised as it was loaded, `quantization`; the fingerprint is then without the linear layers.
        tokenizer: fingerprints of vocabulary and chat template, or None if none was known.
        probe: input_ids, dtype and logps {"" or adapter: {token id: log-probability}}.
    """

    configs: dict[str, dict[str, Any]]
    weights: dict[str, float]
    digests: dict[str, str]
    base: dict[str, Any]
    tokenizer: dict[str, str] | None
    probe: dict[str, Any]
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, with each adapter's settings, weight, path and digest together."""
        adapters = {
            name: {
                "path": f"adapters/{name}",
                "weight": self.weights[name],
                "sha256": self.digests[name],
                **self.configs[name],
            }
            for name in self.configs
        }
        fields = asdict(self)
        kept = {name: fields[name] for name in ("format_version", "base", "tokenizer", "probe")}
        return {**kept, "adapters": adapters}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an adapter folder.

    Raises:
        AdapterFormatError: there is none, it is of a newer format, or something in it is not as it must be.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise AdapterFormatError(_why_no_manifest(folder))
    values = read_json_object(path)
    if values.get("format_version") != FORMAT_VERSION:
        raise AdapterFormatError(
            f"{path}: format_version is {values.get('format_version')!r}, this version of qadapter reads "
            f"{FORMAT_VERSION}. Upgrade qadapter, or save the adapter again with a matching version."
        )
    try:
        return _parse(values)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise AdapterFormatError(f"{path} is damaged: {reason} Save the adapter again.") from error


def own_adapters(folder: Path) -> list[Path]:
    """The folders of the adapters that the manifest of `folder` lists; none where it cannot be read.

    Whatever else lies in `adapters` is somebody's own.

    Raises:
        ConfigError: `adapters` is a link or a file: what it leads to is not the folder's.
    """
    adapters = folder / "adapters"
    if adapters.is_symlink() or adapters.is_file():
        raise ConfigError(f"{adapters} is a link or a file, and an adapter is written there: choose another folder.")
    try:
        names = read_manifest(folder).configs
    except AdapterFormatError:
        return []
    return [path for name in names if (path := adapters / name).is_dir() and not path.is_symlink()]


def _why_no_manifest(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return (
            f"{folder} is a plain PEFT adapter: {MANIFEST_NAME} is missing, so alpha_tilde and alpha_0 are unknown. "
            f"Use `qadapter wrap {folder} --output-dir NEW`, or train one with `qadapter train`."
        )
    return (
        f"{folder} is not an adapter folder: {MANIFEST_NAME} is missing. Give a folder that `qadapter train` wrote; "
        "after an interrupted run, take one of its checkpoint-* folders."
    )


def _parse(values: dict[str, Any]) -> Manifest:
    adapters = _require(values["adapters"], dict, "adapters")
    if not 0 < len(adapters) <= MAX_ADAPTERS:
        raise ValueError(f"adapters has {len(adapters)} entries, 1 to {MAX_ADAPTERS} are allowed.")
    configs, weights, digests = {}, {}, {}
    for name, entry in adapters.items():
        if not ADAPTER_NAME.fullmatch(name):
            raise ValueError(f"adapter name {name!r}: letters, digits, '-' and '_' are allowed.")
        entry = dict(_require(entry, dict, f"adapters.{name}"))
        if entry.pop("path") != f"adapters/{name}":
            raise ValueError(f"adapters.{name}.path must be 'adapters/{name}'.")
        weights[name] = _finite(entry.pop("weight"), f"adapters.{name}.weight")
        digests[name] = _require(entry.pop("sha256"), str, f"adapters.{name}.sha256")
        configs[name] = QAdapterConfig.from_dict(entry).to_dict()
    base = _require(values["base"], dict, "base")
    for key in ("name", "fingerprint", "architecture"):
        _require(base[key], str, f"base.{key}")
    if base.setdefault("revision", None) is not None:
        _require(base["revision"], str, "base.revision")
    if base.setdefault("quantization", None) is not None:
        checked_quantisation(base["quantization"])
    tokenizer = values["tokenizer"]
    if tokenizer is not None:
        for key in ("vocabulary", "chat_template"):
            _require(_require(tokenizer, dict, "tokenizer")[key], str, f"tokenizer.{key}")
    return Manifest(configs, weights, digests, base, tokenizer, _parse_probe(values["probe"], configs))


def _parse_probe(probe: Any, configs: dict[str, Any]) -> dict[str, Any]:
    _require(probe, dict, "probe")
    ids = _require(probe["input_ids"], list, "probe.input_ids")
    if not 0 < len(ids) <= 64 or not all(isinstance(i, int) and 0 <= i < 2**24 for i in ids):
        raise ValueError("probe.input_ids must be 1 to 64 token ids.")
    _require(probe["dtype"], str, "probe.dtype")
    logps = _require(probe["logps"], dict, "probe.logps")
    if set(logps) != {"", *configs}:
        raise ValueError("probe.logps must cover the base and every adapter.")
    for name, entries in logps.items():
        if not _require(entries, dict, f"probe.logps.{name}"):
            raise ValueError(f"probe.logps.{name} is empty.")
        for index, value in entries.items():
            if not index.isdecimal() or len(index) > 8:
                raise ValueError(f"probe.logps.{name} has the key {index!r}, which is no token id.")
            _finite(value, f"probe.logps.{name}.{index}")
    return probe


def _require(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}, must be a {kind.__name__}.")
    return value


def _finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} = {value!r} is not a finite number.")
    return float(value)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        AdapterFormatError: too large, not UTF-8, not JSON, or not an object.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise AdapterFormatError(f"{path} has {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: neither UTF-8 nor JSON, or a huge integer
        raise AdapterFormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise AdapterFormatError(f"{path} holds a {type(values).__name__}, must be a JSON object.")
    return values
