"""A base model with weights that were trained along with a LoRA: new tokens' embeddings, a head of its own."""

import os
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapter.errors import AdapterFormatError
from qadapter.modeling.bases import BaseSource, load_base
from qadapter.new_folders import into_new_folder, set_mode_of_weights


def write_base(
    source: BaseSource, weights: dict[str, Tensor], tokenizer: Any, folder: str | os.PathLike[str]
) -> BaseSource:
    """Write the model of `source` with `weights` (by their names in it) in place of its own; where it then lies.

    It is as PEFT's model with the LoRA off, but for `modules_to_save`, which PEFT switches off as well. Its dtype is
    one that holds the source's and the given weights exactly.

    Raises:
        AdapterFormatError: the weights do not fit the model.
        ConfigError: the folder holds something.
    """
    base = load_base(source, dtype="auto")
    base.to(reduce(torch.promote_types, (base.dtype, *(weight.dtype for weight in weights.values()))))
    _resize(base, weights)
    _put(base, weights)

    def write(scratch: Path) -> None:
        base.save_pretrained(scratch)
        set_mode_of_weights(scratch / "config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)

    into_new_folder(Path(folder), write)
    path = os.path.abspath(folder)
    return BaseSource(path, path, None)


def _resize(base: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Give the embeddings as many rows as theirs among `weights` have."""
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    names = [f"{name}.weight" for name, module in base.named_modules() if any(module is layer for layer in layers)]
    rows = {weights[name].shape[0] for name in names if name in weights}
    if rows and rows != {base.get_input_embeddings().weight.shape[0]}:
        base.resize_token_embeddings(max(rows), mean_resizing=False)


def _put(base: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Put `weights` into `base`; a head that was tied to the embeddings stays so only where the two remain equal."""
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head.weight is embeddings.weight
    if tied:
        head.weight = nn.Parameter(embeddings.weight.detach().clone())
    try:
        base.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise AdapterFormatError(f"the weights saved with the LoRA do not fit the base model: {reason}") from error
    if tied and torch.equal(head.weight, embeddings.weight):
        head.weight = embeddings.weight
    elif tied:
        for config in (base.config, base.config.get_text_config(decoder=True)):  # two of a multimodal model
            config.tie_word_embeddings = False
