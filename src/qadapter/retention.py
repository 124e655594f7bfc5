"""The texts on which a trained policy is to stay with its base: a user's, or what the base itself writes."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from qadapter.data.retained import retained_rows, with_retained_rows
from qadapter.data.texts import read_texts
from qadapter.errors import ConfigError, DataError
from qadapter.generation import Sampling, end_tokens, ending_arguments
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.passes import in_eval_mode
from qadapter.training_arguments import OWN_TEXTS

TEXT_TOKENS = 128
# Different texts at most: with more than three times as many pairs each comes more than once an epoch.
MOST_TEXTS = 64
BATCH, SEED = 32, 0


def given_texts(weight: float, source: str, tokenizer: Any, config: Any) -> list[list[int]] | None:
    """Token ids of the texts in a file, of no more than `TEXT_TOKENS` each; None where the base is to write them.

    Args:
        weight: of the retention; without one no texts are needed.
        source: the file, or `OWN_TEXTS`.
        config: the base's.

    Raises:
        ConfigError: a file that would not be used, or no tokenizer.
        DataError: an unreadable file, or no text of two tokens in it.
    """
    if not weight and source != OWN_TEXTS:
        raise ConfigError(
            f"retention_texts = {source!r}, but retention = 0, so they would not be used: set it (QAdapterConfig, "
            "--retention), 1 to begin with."
        )
    if weight and tokenizer is None:
        raise ConfigError("retention needs processing_class, the base model's tokenizer, for its texts.")
    if source == OWN_TEXTS:
        return None
    texts = [tokenizer(text)["input_ids"][: _text_tokens(config)] for text, _ in read_texts(Path(source))]
    if not any(len(ids) > 1 for ids in texts):
        raise DataError(f"{source}: there is no text of at least two tokens in it.")
    return [ids for ids in texts if len(ids) > 1]


def own_texts(
    model: QAdapterForCausalLM,
    tokenizer: Any,
    count: int,
    progress: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """Token ids of texts that the base samples, each after a token drawn from the vocabulary.

    So no data is needed beside the model, as in data-free distillation (arXiv 2305.17888). They are the same texts each
    time on the same machine; the state of torch's generators is left as it was.

    Args:
        count: how many texts.
        progress: is told how many more are written.
    """
    beginning = _beginning(tokenizer)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ordinary = [token for token in _ordinary_tokens(tokenizer) if token < vocabulary]
    openings = [[*beginning, first] for first in random.Random(SEED).choices(ordinary, k=count)]
    ends, texts = end_tokens(model, tokenizer), []
    sampling = Sampling(_text_tokens(model.config) - len(openings[0]), temperature=1.0)
    devices = [model.device] if model.device.type == "cuda" else []
    # Compiled layers (torch_compile) would be compiled for shapes that do not come again.
    eager = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng(devices), torch.no_grad(), eager, in_eval_mode(model):
        torch.manual_seed(SEED)
        for start in range(0, count, BATCH):
            ids = torch.tensor(openings[start : start + BATCH], device=model.device)
            written = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), strength=0.0, num_return_sequences=1,
                return_dict_in_generate=False, **ending_arguments(ends, tokenizer), **sampling.to_kwargs(),
            ).tolist()  # fmt: skip
            texts += [_until_end(text, ends, len(beginning) + 1) for text in written]
            if progress:
                progress(len(written))
    return texts


def with_retained_texts(
    pairs: Any,
    texts: list[list[int]] | None,
    model: QAdapterForCausalLM,
    tokenizer: Any,
    show_progress: bool = True,
) -> Dataset:
    """The tokenised pairs with rows of texts among them.

    Args:
        texts: None lets the base write them.
        show_progress: whether to draw a bar while it writes them.

    Raises:
        ConfigError: a stream, whose length is not known.
    """
    if not isinstance(pairs, Dataset):
        raise ConfigError("retention needs a dataset of known length: leave streaming out.")
    if texts is None:
        count = min(MOST_TEXTS, retained_rows(len(pairs)))
        with tqdm(total=count, unit="text", desc="texts of the base", disable=not show_progress) as bar:
            texts = own_texts(model, tokenizer, count, bar.update)
    return with_retained_rows(pairs, texts)


def _ordinary_tokens(tokenizer: Any) -> list[int]:
    """The ids of the vocabulary but for special and added ones."""
    unusual = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted(set(tokenizer.get_vocab().values()) - unusual)


def _beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token where the tokenizer puts one before a text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def _text_tokens(config: Any) -> int:
    """How long a text may be on a base of this config."""
    return min(
        TEXT_TOKENS, getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or TEXT_TOKENS
    )


def _until_end(ids: list[int], ends: list[int], opening: int) -> list[int]:
    """The ids up to the first of the ends after the opening tokens, which belongs to them."""
    end = next((place for place, token in enumerate(ids[opening:], opening) if token in ends), len(ids))
    return ids[: end + 1]
