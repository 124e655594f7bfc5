"""Any PEFT LoRA as an adapter folder of ours, without training: dial, composition, audit and server work for it."""

import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qadapter.config import QAdapterConfig
from qadapter.errors import AdapterFormatError
from qadapter.modeling.bases import BaseSource, load_base, load_tokenizer, resolve_base
from qadapter.modeling.hub import TOKENIZER_FILES, may_be_repository, snapshot_of
from qadapter.modeling.loading import load_tensors
from qadapter.modeling.lora_files import CONFIG_NAME, WEIGHTS_NAME, read_foreign_lora
from qadapter.modeling.manifest import MANIFEST_NAME, read_json_object
from qadapter.modeling.policy import DEFAULT_ADAPTER, QAdapterForCausalLM
from qadapter.modeling.rewritten_bases import write_base
from qadapter.new_folders import removed_on_error

SHOWN_TOKENS = 5


def wrap(
    lora: str | os.PathLike[str],
    base_model: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    new_base: str | os.PathLike[str] | None = None,
    **model_kwargs: Any,
) -> tuple[QAdapterForCausalLM, Any]:
    """The policy of a plain LoRA folder (trained by TRL, axolotl, ...), and its tokenizer (None if there is none).

    At strength 1 it is the LoRA itself: the residual form with α₀ = α̃, whose policy logits are z_θ.

    Args:
        lora: folder or hub id with adapter_config.json and adapter_model.safetensors.
        base_model: instead of the base that the LoRA names.
        tokenizer: instead of the LoRA folder's or the base's.
        new_base: folder for a base model that has the weights trained or resized along with the LoRA (embeddings of
            new tokens, say). Written, and wrapped for, only where there are such weights; not left where the LoRA is
            refused.

    Raises:
        AdapterFormatError: the folder is no LoRA that a frozen base can carry.
    """
    folder = Path(lora)
    if not folder.is_dir():
        if not may_be_repository(lora):
            raise AdapterFormatError(f"{folder}: there is no such folder.")
        files = [MANIFEST_NAME, CONFIG_NAME, WEIGHTS_NAME, *TOKENIZER_FILES]
        folder = snapshot_of(lora, files, token=model_kwargs.get("token"))
    if (folder / MANIFEST_NAME).exists():
        raise AdapterFormatError(f"{lora} is an adapter folder of qadapter already: use it as it is.")
    peft_config, tensors, base_weights = read_foreign_lora(folder)
    source = _source_of_base(folder / CONFIG_NAME, base_model)
    if tokenizer is None:
        own = (folder / "tokenizer_config.json").exists()
        has_tokenizer = own or not os.path.isdir(source.path) or (Path(source.path) / "tokenizer_config.json").exists()
        tokenizer = load_tokenizer(folder if own else source, model_kwargs.get("token")) if has_tokenizer else None
    base = load_base(source, **model_kwargs)
    with ExitStack() as on_error:
        if new_base is not None and _trained(base, base_weights, folder):
            there = os.path.exists(new_base)
            source = write_base(source, base_weights, tokenizer, new_base)
            on_error.enter_context(removed_on_error(Path(new_base), keep=there))
            base = load_base(source, **model_kwargs)
        _require_frozen(base, base_weights, folder)
        _warn_of_unknown_tokens(base, tokenizer, folder)
        # What other trainers optimise discounts nothing: DPO's implied reward is the plain sum.
        config = QAdapterConfig.preset("undiscounted")
        model = QAdapterForCausalLM(base, {DEFAULT_ADAPTER: config}, {DEFAULT_ADAPTER: peft_config})
        load_tensors(model, DEFAULT_ADAPTER, tensors, folder)
    model.base_source = source
    return model.eval(), tokenizer


def _source_of_base(config_path: Path, base_model: str | os.PathLike[str] | None) -> BaseSource:
    """Where the base is: the one given, else the one that a LoRA's config names, in the revision it names."""
    config = read_json_object(config_path)
    name = base_model or config.get("base_model_name_or_path")
    if not isinstance(name, str | os.PathLike) or not os.fspath(name):
        raise AdapterFormatError(f"{config_path} does not name the base model: pass it (--base-model).")
    revision = None if base_model else config.get("revision")
    if not isinstance(revision, str | None):
        raise AdapterFormatError(f"{config_path}: revision is {revision!r}, must be a text or null.")
    return resolve_base(name, revision)


def _require_frozen(base: PreTrainedModel, saved: dict[str, Tensor], folder: Path) -> None:
    """Raise AdapterFormatError unless the base weights saved with a LoRA are the base's own."""
    for name in _trained(base, saved, folder):
        raise AdapterFormatError(
            f"{folder}: {name} was trained or resized along with the LoRA, and a frozen base does not follow. "
            "Have a base written that has this weight (qadapter wrap --new-base DIR), or give one with --base-model."
        )


def _warn_of_unknown_tokens(base: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Warn of tokens that the base has no embeddings for: they were added in training, and theirs are lost."""
    rows = base.get_input_embeddings().weight.shape[0]
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    unknown = sorted((index, token) for token, index in vocabulary.items() if index >= rows)
    if unknown:
        names = ", ".join(repr(token) for _, token in unknown[:SHOWN_TOKENS])
        warnings.warn(
            f"{folder}: the tokenizer has {len(unknown)} tokens that the base has no embeddings for ({names}"
            f"{', ...' if len(unknown) > SHOWN_TOKENS else ''}), and texts with them will fail: give a base that has "
            "them (--base-model), or remove the tokenizer's files, for the base's own.",
            stacklevel=3,
        )


def _trained(base: PreTrainedModel, saved: dict[str, Tensor], folder: Path) -> list[str]:
    """Names of the base weights saved with a LoRA that are not the base's own."""
    own, trained = base.state_dict(), []
    for name, weight in saved.items():
        if name not in own:
            raise AdapterFormatError(f"{folder}: tensor {name!r} is neither part of a LoRA adapter nor of the base.")
        dtypes = (own[name].dtype, weight.dtype)  # one of them may have been rounded
        if not any(torch.equal(own[name].to(dtype).cpu(), weight.to(dtype)) for dtype in dtypes):
            trained.append(name)
    return trained
