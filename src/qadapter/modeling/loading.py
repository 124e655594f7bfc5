"""Loading adapter folders: one alone, or several on one base, each checked against what it was trained with."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from qadapter.config import QAdapterConfig
from qadapter.errors import AdapterFormatError, ConfigError
from qadapter.modeling.bases import BaseSource, load_base, load_tokenizer, resolve_base, source_of
from qadapter.modeling.fingerprints import tokenizer_fingerprint, weight_fingerprint
from qadapter.modeling.hub import local_folder
from qadapter.modeling.lora_files import WEIGHTS_NAME, read_adapter
from qadapter.modeling.manifest import ADAPTER_NAME, Manifest, read_manifest
from qadapter.modeling.mixing import checked_number, checked_weights
from qadapter.modeling.policy import QAdapterForCausalLM
from qadapter.modeling.probe import check_probe
from qadapter.modeling.quantised import described, quantisation_of, quantised_again
from qadapter.modeling.streams import narrow_adapters
from qadapter.new_folders import file_digest


@dataclass(frozen=True)
class StoredAdapter:
    """One adapter of a folder, read but not yet on a model."""

    root: Path
    manifest: Manifest
    stored_name: str
    peft_config: LoraConfig
    tensors: dict[str, Tensor]

    @property
    def config(self) -> QAdapterConfig:
        """Its settings."""
        return QAdapterConfig.from_dict(self.manifest.configs[self.stored_name])


def load(
    folder: str | os.PathLike[str] | PreTrainedModel,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    adapter_weights: Mapping[str, float] | None = None,
    base_model: str | os.PathLike[str] | PreTrainedModel | None = None,
    tokenizer: Any = None,
    verify: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    interpolation: str = "logits",
    **model_kwargs: Any,
) -> QAdapterForCausalLM:
    """The policy stored in an adapter folder, or composed of several folders, in eval mode.

    Args:
        folder: adapter folder or hub id; with `adapters`, the base model: folder, hub id or loaded model (the policy's
            layers are put into it: from then on it is part of the policy). It is what `revision` is of.
        adapters: {name: adapter folder or hub id}, each holding one adapter, all trained on one base and template.
        adapter_weights: default weights of the composition; those not named get 0. None: as stored, which is 1 unless
            it was saved otherwise.
        base_model: instead of the base that the folder names: id, folder or loaded model.
        tokenizer: instead of the one in the folder or the base; only checked, not kept.
        verify: refuse another base, chat template or adapter than the ones trained with. Without it, a warning
            is given instead.
        token: of the hub, for adapters, base and tokenizer.
        interpolation: the model's own, "logits" or "weights", as of `QAdapterForCausalLM.forward`.
        model_kwargs: passed to AutoModelForCausalLM.from_pretrained for the base (dtype, device_map, ...). A base that
            was quantised for the training is quantised in the same way; quantization_config=None loads it unquantised.

    Raises:
        AdapterFormatError: a folder is no adapter, is damaged, or belongs to another base or chat template.
        ConfigError: settings that exclude each other, weights of unknown adapters or that are no finite numbers.
    """
    for name in ("strength", "max_kl", "min_kl", "decay"):
        if name in model_kwargs:
            raise ConfigError(f"{name} is of calls: give it to generate, or set it for all, policy.{name} = ...")
    base_revision = None
    if adapters is None:
        if isinstance(folder, PreTrainedModel):
            raise ConfigError("a loaded base model was given without adapters: pass adapters={name: folder}.")
        stored = read_folder(local_folder(folder, revision, token), verify)
    else:
        if base_model is not None or not adapters:
            raise ConfigError("with adapters={name: folder, ...} the first argument is the base model.")
        if not isinstance(adapters, Mapping):
            raise ConfigError(f"adapters is a {type(adapters).__name__}: give {{name: folder, ...}}.")
        stored = {name: _only_adapter(name, path, verify, token) for name, path in adapters.items()}
        base_model, base_revision = folder, revision
    weights = {
        name: checked_number(weight, f"adapter_weights[{name!r}]")
        for name, weight in checked_weights(adapter_weights, dict.fromkeys(stored, 0.0)).items()
    }
    if token is not None:
        model_kwargs["token"] = token
    model = _assemble(stored, base_model, base_revision, tokenizer, verify, model_kwargs)
    model.interpolation = model.checked_interpolation(interpolation)
    if adapter_weights is not None:
        model.adapter_weights = weights
    else:
        model.adapter_weights = {name: entry.manifest.weights[entry.stored_name] for name, entry in stored.items()}
    return model


def read_folder(root: Path, verify: bool = True) -> dict[str, StoredAdapter]:
    """The adapters of a folder by name, checked as far as that goes without a model."""
    manifest = read_manifest(root)
    stored = {}
    for name in manifest.configs:
        peft_config, tensors = read_adapter(root, name)
        if file_digest(root / "adapters" / name / WEIGHTS_NAME) != manifest.digests[name]:
            _refuse(f"{root}: the weights of adapter {name!r} have changed since they were saved.", verify)
        stored[name] = StoredAdapter(root, manifest, name, peft_config, tensors)
    return stored


def _only_adapter(name: str, path: str | os.PathLike[str], verify: bool, token: str | bool | None) -> StoredAdapter:
    if not ADAPTER_NAME.fullmatch(name):
        raise ConfigError(f"adapter name {name!r}: letters, digits, '-' and '_' are allowed.")
    stored = read_folder(local_folder(path, token=token), verify)
    if len(stored) != 1:
        raise ConfigError(
            f"{path} holds {len(stored)} adapters {sorted(stored)}: a composition takes one of each folder."
        )
    return next(iter(stored.values()))


def _assemble(
    stored: Mapping[str, StoredAdapter],
    base_model: Any,
    revision: str | None,
    tokenizer: Any,
    verify: bool,
    model_kwargs: dict[str, Any],
) -> QAdapterForCausalLM:
    """The model of all stored adapters on one base, each checked against it."""
    first = next(iter(stored.values()))
    check_same_origin(stored)
    base, source = load_base_of(first.manifest, base_model, model_kwargs, revision)
    _check_base(stored, base, source, tokenizer, verify, model_kwargs.get("token"))
    model = QAdapterForCausalLM(
        base,
        {name: entry.config for name, entry in stored.items()},
        {name: entry.peft_config for name, entry in stored.items()},
    )
    for name, entry in stored.items():
        load_tensors(model, name, entry.tensors, entry.root)
    model.base_source, model.tokenizer_fingerprint = source, first.manifest.tokenizer
    model.requires_grad_(False)
    model.eval()
    narrow_adapters(model.base)
    _check_numbers(model, stored)
    if verify:
        _check_probes(model, stored)
    return model


def _check_base(
    stored: Mapping[str, StoredAdapter],
    base: PreTrainedModel,
    source: BaseSource,
    tokenizer: Any,
    verify: bool,
    token: str | bool | None,
) -> None:
    """Refuse a base, a vocabulary or a chat template that the adapters were not trained with."""
    quantisation = next(iter(stored.values())).manifest.base["quantization"]
    fingerprint = weight_fingerprint(base, linear=quantisation is None)
    hint = ""
    if quantisation_of(base) != quantisation:
        now, then = described(quantisation_of(base)), described(quantisation)
        hint = f" Here it is {now}, then it was {then}, which changes the weights."
    elif base.dtype == torch.float16:  # the fingerprint is one for float32 and bfloat16; float16 holds other numbers
        hint = " In float16 the same weights differ: try bfloat16 or float32 first."
    for entry in stored.values():
        if fingerprint != entry.manifest.base["fingerprint"]:
            _refuse(
                f"{entry.root}: the base model differs: trained on {entry.manifest.base['name']!r} "
                f"(revision {entry.manifest.base['revision'] or 'main'}), but {source.name!r} has other weights. "
                f"Pass the original with base_model= (--base-model).{hint}",
                verify,
            )
        if entry.manifest.tokenizer is not None:
            known = tokenizer or tokenizer_of(entry.root, source, token)
            _check_tokenizer(entry.manifest.tokenizer, entry.root, known, verify)


def _check_numbers(model: QAdapterForCausalLM, stored: Mapping[str, StoredAdapter]) -> None:
    """Refuse an adapter's numbers beyond the base's dtype: half precision computes with copies of them in that."""
    for name, entry in stored.items():
        weights = model.adapter_parameters(name).values()
        if not all(bool(weight.to(model.dtype).isfinite().all()) for weight in weights):
            raise AdapterFormatError(
                f"{entry.root}: the adapter holds numbers beyond {model.dtype}: load it with dtype=bfloat16 or float32."
            )


def _check_probes(model: QAdapterForCausalLM, stored: Mapping[str, StoredAdapter]) -> None:
    """Refuse adapters that say something else than when they were saved.

    In another form of the base the probe tells nothing: 4 bits moved it by 6.7 nats on SmolLM2-135M.
    """
    for root in dict.fromkeys(entry.root for entry in stored.values()):
        names = {entry.stored_name: name for name, entry in stored.items() if entry.root == root}
        manifest = next(entry.manifest for entry in stored.values() if entry.root == root)
        if manifest.base["quantization"] in (None, quantisation_of(model.base)):
            check_probe(model, manifest.probe, root, names)


def check_same_origin(stored: Mapping[str, StoredAdapter]) -> None:
    """Raise AdapterFormatError unless all adapters were trained on one base, vocabulary and chat template."""
    first, *others = stored.values()
    for entry in others:
        # By their folders: the names of a served adapter are none that the user gave.
        both = f"{first.root} and {entry.root}"
        if entry.manifest.base["fingerprint"] != first.manifest.base["fingerprint"]:
            raise AdapterFormatError(
                f"{both} were trained on different base models "
                f"({first.manifest.base['name']!r} and {entry.manifest.base['name']!r}): they cannot be composed."
            )
        if entry.manifest.base["quantization"] != first.manifest.base["quantization"]:
            raise AdapterFormatError(
                f"{both} were trained on one base that was quantised in different ways: they cannot be composed."
            )
        mine, theirs = first.manifest.tokenizer or {}, entry.manifest.tokenizer or {}
        for part in ("vocabulary", "chat_template"):
            if part in mine and part in theirs and mine[part] != theirs[part]:
                raise AdapterFormatError(
                    f"{both} were trained with a different {part.replace('_', ' ')}: they cannot be composed."
                )


def load_base_of(
    manifest: Manifest, base_model: Any, model_kwargs: Mapping[str, Any], base_revision: str | None = None
) -> tuple[PreTrainedModel, BaseSource]:
    """The base that an adapter was trained on, quantised as it was unless `model_kwargs` say otherwise.

    Args:
        base_model: instead of the one that the manifest names: id (`base_revision` is of it), folder, or a loaded
            model, which is given back.

    Raises:
        AdapterFormatError, ConfigError: the base has no name, cannot be loaded or cannot be quantised here.
    """
    if isinstance(base_model, PreTrainedModel):
        return base_model, source_of(base_model)
    name, revision = manifest.base["name"], manifest.base["revision"]
    if base_model is not None:
        name, revision = base_model, base_revision
    if not name:
        raise AdapterFormatError("the adapter does not know its base model's name: pass base_model=.")
    source = resolve_base(name, revision)
    options, stored = dict(model_kwargs), manifest.base["quantization"]
    if stored is not None and "quantization_config" not in options:
        options["quantization_config"] = quantised_again(stored, options.get("dtype"))
    return load_base(source, **options), source


def tokenizer_of(folder: str | os.PathLike[str], source: BaseSource, token: str | bool | None = None) -> Any:
    """The tokenizer that an adapter was trained with: the folder's own, else the base's."""
    root = local_folder(folder, token=token)
    return load_tokenizer(root if (root / "tokenizer_config.json").exists() else source, token)


def _check_tokenizer(trained_with: Mapping[str, str], root: Path, tokenizer: Any, verify: bool) -> None:
    actual = tokenizer_fingerprint(tokenizer)
    for part, name in (("vocabulary", "tokenizer's vocabulary"), ("chat_template", "chat template")):
        if actual[part] != trained_with[part]:
            _refuse(
                f"{root}: the {name} differs from the one the adapter was trained with. Restore it, or pass the "
                "original with tokenizer=.",
                verify,
            )


def load_tensors(model: QAdapterForCausalLM, adapter: str, tensors: dict[str, Tensor], root: Path) -> None:
    """Put an adapter's tensors on the model.

    Raises:
        AdapterFormatError: they are not exactly the tensors that the adapter's config asks for on this base.
    """
    own = get_peft_model_state_dict(model.peft_model, adapter_name=adapter, save_embedding_layers=False)
    wrong = sorted(set(own) ^ set(tensors)) or sorted(
        name for name, tensor in own.items() if tensors[name].shape != tensor.shape
    )
    if wrong:
        raise AdapterFormatError(
            f"{root}: adapter {adapter!r} does not fit the base model or its own config: {len(wrong)} tensors are "
            f"missing, unknown or of another shape, first {wrong[0]!r}."
        )
    # PEFT's own way back renames keys as checkpoints of some bases are renamed (Laguna), and leaves those out unsaid.
    with torch.no_grad():
        for name, tensor in own.items():  # these are the parameters' own memory
            tensor.copy_(tensors[name])


def _refuse(message: str, verify: bool) -> None:
    if verify:
        raise AdapterFormatError(f"{message} (verify=False, --no-verify, loads it anyway.)")
    warnings.warn(message, stacklevel=3)
