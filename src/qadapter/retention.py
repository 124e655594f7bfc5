"""The texts on which a trained policy is to stay with its base: a user's, or what the base itself writes."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from qadapter.data.retained import retained_rows, with_retained_rows
from qadapter.errors import ConfigError
from qadapter.evaluation.texts import neutral_texts
from qadapter.generation import end_tokens
from qadapter.modeling import QAdapterForCausalLM
from qadapter.training_arguments import OWN_TEXTS

TEXT_TOKENS = 128
# Different texts at most: with more than three times as many pairs each comes more than once an epoch.
MOST_TEXTS = 64
BATCH = 32


def given_texts(weight: float, source: str, tokenizer: Any) -> list[list[int]] | None:
    """Token ids of the texts in a file, of no more than `TEXT_TOKENS` each; None where the base is to write them.

    Args:
        weight: of the retention; without one no texts are needed.
        source: the file, or `OWN_TEXTS`.

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
    texts = neutral_texts(tokenizer, Path(source), max_length=TEXT_TOKENS)
    return [[*text.context, *text.answer] for text in texts]


def own_texts(
    model: QAdapterForCausalLM,
    tokenizer: Any,
    count: int,
    seed: int,
    progress: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """Token ids of texts that the base samples, each after another ordinary token of the vocabulary.

    So no data is needed beside the model, as in data-free distillation (arXiv 2305.17888). The same seed gives the same
    texts on the same machine; the state of torch's generators is left as it was.

    Args:
        count: how many texts.
        seed: of the first tokens and of the sampling.
        progress: is told how many more are written.
    """
    first = random.Random(seed).choices(_ordinary_tokens(tokenizer), k=count)
    ends, training, texts = end_tokens(model, tokenizer), model.training, []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        for start in range(0, count, BATCH):
            ids = torch.tensor(first[start : start + BATCH], device=model.device).unsqueeze(1)
            written = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), strength=0.0, max_new_tokens=TEXT_TOKENS - 1,
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=ends, pad_token_id=ends[0],
            ).tolist()  # fmt: skip
            texts += [_until_end(text, ends) for text in written]
            if progress:
                progress(len(written))
        model.train(training)
    return texts


def with_retained_texts(
    pairs: Any,
    texts: list[list[int]] | None,
    model: QAdapterForCausalLM,
    tokenizer: Any,
    seed: int,
    show_progress: bool = True,
) -> Dataset:
    """The tokenised pairs with rows of texts among them.

    Args:
        texts: None lets the base write them.
        seed, show_progress: of what the base writes.

    Raises:
        ConfigError: a stream, whose length is not known.
    """
    if not isinstance(pairs, Dataset):
        raise ConfigError("retention needs a dataset of known length: leave streaming out.")
    if texts is None:
        count = min(MOST_TEXTS, retained_rows(len(pairs)))
        with tqdm(total=count, unit="text", desc="texts of the base", disable=not show_progress) as bar:
            texts = own_texts(model, tokenizer, count, seed, bar.update)
    return with_retained_rows(pairs, texts)


def _ordinary_tokens(tokenizer: Any) -> list[int]:
    """The ids of the vocabulary but for special and added ones."""
    unusual = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted(set(tokenizer.get_vocab().values()) - unusual)


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    """The ids up to the first of the ends, which belongs to them."""
    end = next((place for place, token in enumerate(ids[1:], 1) if token in ends), len(ids))
    return ids[: end + 1]
