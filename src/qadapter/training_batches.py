"""From pairs to the batches of training: tokens by the arguments' limits, and the cheapest collator for the model."""

import functools
import logging
from collections.abc import Callable
from typing import Any

from qadapter.base_states import BaseStatesCollator
from qadapter.data import PackedCollator, PreferenceCollator, tokenise_preferences
from qadapter.data.micro_batches import MicroBatchCollator
from qadapter.data.token_cache import cacheable, tokenise_cached
from qadapter.errors import ConfigError
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.fingerprints import tokenizer_fingerprint
from qadapter.modeling.packed import enable_packing
from qadapter.training_arguments import QAdapterTrainingArguments

logger = logging.getLogger(__name__)

UNPACKED = "with this attention cannot run packed rows"


def tokenised_pairs(name: str, dataset: Any, tokenizer: Any, args: QAdapterTrainingArguments) -> Any:
    """The tokenised pairs, as the arguments say; large datasets through the cache of tokens.

    Warns of pairs that were left out or cut, and of what is odd about them, under the dataset's `name`.
    """
    tokenise: Callable[..., Any] = tokenise_preferences
    if args.cache_tokens and cacheable(dataset, tokenizer):
        tokenise = functools.partial(tokenise_cached, fingerprint=tokenizer_fingerprint(tokenizer))
    pairs, report = tokenise(dataset, tokenizer, max_length=args.max_length, max_prompt_length=args.max_prompt_length)
    if report.dropped or report.truncated_prompts:
        logger.warning("%s: %s", name, report.summary())
    for reason, text in report.why.items():
        logger.warning("%s: %s, row %d: %s.", name, reason, report.dropped[reason][0], text)
    if report.unspaced_warning is not None:
        logger.warning("%s: %s.", name, report.unspaced_warning)
    return pairs


def collator_for(model: QAdapterForCausalLM, pad_token_id: int, packing: bool) -> PackedCollator | PreferenceCollator:
    """The collator of the cheapest batches that the model can run: packed rows, else padded ones."""
    if packing and enable_packing(model.base):
        return PackedCollator()
    if packing:
        logger.info("%s %s: batches are padded.", type(model.base).__name__, UNPACKED)
    return PreferenceCollator(pad_token_id=pad_token_id)


def require_packing(collator: Any, model: QAdapterForCausalLM) -> Any:
    """The user's collator, once the model can run what it makes.

    Raises:
        ConfigError: it makes packed rows, which the model cannot run.
    """
    if isinstance(collator, PackedCollator) and not enable_packing(model.base):
        raise ConfigError(f"{type(model.base).__name__} {UNPACKED}: leave data_collator out.")
    return collator


def with_options(collator: Any, args: QAdapterTrainingArguments) -> Any:
    """The collator with what the arguments ask for: kept states of the base, parts of a token budget."""
    packed = isinstance(collator, PackedCollator)
    if args.cache_base_states:
        collator = BaseStatesCollator(collator)
    if args.micro_batch_tokens is not None:
        collator = MicroBatchCollator(collator, args.micro_batch_tokens, packed)
    return collator


def padding_token(tokenizer: Any, model: QAdapterForCausalLM) -> int:
    """The id to pad with; padding is masked everywhere, so any id will do where no pad token is defined."""
    for owner in (tokenizer, model.config.get_text_config(decoder=True)):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return 0
