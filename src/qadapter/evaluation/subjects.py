"""What is evaluated: an adapter folder of ours, or a plain LoRA folder that is wrapped in memory."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qadapter.errors import ConfigError
from qadapter.evaluation.columns import Column
from qadapter.evaluation.preferences import Temperatures
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.fingerprints import tokenizer_fingerprint, weight_fingerprint
from qadapter.modeling.loading import tokenizer_of
from qadapter.modeling.lora_files import is_plain_lora
from qadapter.modeling.wrapping import wrap

# Of a configuration, what changes no figure: where it came from, and what is stated beside its digest.
PROVENANCE = ("_name_or_path", "_commit_hash", "_from_model_config", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Subject:
    """An opened adapter."""

    path: str
    model: QAdapterForCausalLM
    tokenizer: Any

    def temperatures(self, column: Column) -> Temperatures | None:
        """Those of the only adapter with a weight in a column; None for a composition and for none."""
        adapters = list(column.weights(self.model))
        if len(adapters) != 1:
            return None
        config = self.model.configs[adapters[0]]
        return Temperatures(
            config.alpha_tilde, config.alpha_0, config.gamma, config.discount_floor, config.length_normalised
        )

    def base_identity(self) -> dict[str, Any]:
        """What the base's numbers depend on."""
        return {
            "name": self.model.base_source.name,
            "revision": self.model.base_source.revision,
            "fingerprint": weight_fingerprint(self.model.base),
            "config": settings_digest(self.model.base.config),
            "generation_config": settings_digest(self.model.generation_config),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
        }

    def identity(self) -> dict[str, Any]:
        """What the policy's numbers depend on, besides the base's: weights, kind of LoRA, settings."""
        adapters = {
            name: {
                "sha256": adapter_digest(self.model, name),
                "weight": self.model.adapter_weights.get(name, 0.0),
                **config.to_dict(),
            }
            for name, config in self.model.configs.items()
        }
        return {"base": self.base_identity(), "adapters": adapters}

    def longest_text(self, max_length: int | None) -> int | None:
        """`max_length`, or less where the base has fewer positions."""
        positions = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        limits = [limit for limit in (max_length, positions) if limit]
        return min(limits) if limits else None


def open_subject(
    path: str, base_model: str | None, dtype: torch.dtype, device: str, verify: bool = True, **model_kwargs: Any
) -> Subject:
    """The policy and tokenizer in an adapter folder, a hub repository of one, or a plain LoRA folder.

    Raises:
        AdapterFormatError: it is neither, or damaged.
        ConfigError: there is no tokenizer.
    """
    if is_plain_lora(Path(path)):
        model, tokenizer = wrap(path, base_model, dtype=dtype, **model_kwargs)
        if tokenizer is None:
            raise ConfigError(f"{path}: neither the LoRA's folder nor its base has a tokenizer: add one to it.")
    else:
        model = QAdapterForCausalLM.from_pretrained(
            path, base_model=base_model, verify=verify, dtype=dtype, **model_kwargs
        )
        tokenizer = tokenizer_of(path, model.base_source)
    return Subject(path, model.to(device).eval(), tokenizer)  # type: ignore[arg-type]


def adapter_digest(model: QAdapterForCausalLM, adapter: str) -> str:
    """SHA-256 of an adapter's weights and of the LoRA settings that change what they do."""
    config = model.peft_model.peft_config[adapter]
    kind = {name: getattr(config, name) for name in ("r", "lora_alpha", "use_rslora", "use_dora", "alpha_pattern")}
    result = hashlib.sha256(json.dumps(kind, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.adapter_parameters(adapter).items()):
        result.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        result.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def settings_digest(config: Any) -> str:
    """SHA-256 of a model's or a generation's settings; of none if there are none."""

    def stated(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {str(key): stated(item) for key, item in value.items() if key not in PROVENANCE}

    settings = {} if config is None else stated(config.to_dict())
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def require_same_base(path: str, base: dict[str, Any], other_path: str, other: dict[str, Any]) -> None:
    """Raise ConfigError unless both (`Subject.base_identity`) are one base, with its settings, and one tokenizer."""
    parts = {
        "fingerprint": "base model",
        "config": "config.json of the base",
        "generation_config": "generation_config.json of the base",
        "tokenizer": "tokenizer or chat template",
    }
    for part, name in parts.items():
        if base[part] != other[part]:
            raise ConfigError(
                f"{path} and {other_path} have a different {name} ({base['name']} and {other['name']}): "
                "compare adapters of one base."
            )
