"""Whether tokens are pairs, and fit the base model: its embeddings need a row for each, its positions must reach."""

import warnings
from functools import partial
from typing import Any, NamedTuple

from qadapter.data.rows import TOKEN_COLUMNS
from qadapter.errors import DataError

RETAINED = "qadapter_retained"  # marks texts among pairs: a name that no data of a user's has
# Kinds of models whose positions are rows of a table: beyond its end nothing can be computed.
POSITION_TABLES = ("biogpt", "codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt", "opt")


class Extent(NamedTuple):
    """The largest id of a dataset's pairs, and the tokens of each pair: prompt and longer answer."""

    largest_id: int
    lengths: list[int]


def require_fit(tokenised: Any, config: Any) -> Any:
    """The pairs, once they are known to fit the base of this config; a stream's are looked at as they are read.

    Warns of pairs that the base was not made for.

    Raises:
        DataError: a row is no pair, or as `beyond_context`; for a stream, where the pair is read.
    """
    from datasets import Dataset, IterableDataset

    if isinstance(tokenised, IterableDataset):
        return tokenised.map(partial(_fitting, config=config), with_indices=True, features=tokenised.features)
    if isinstance(tokenised, Dataset):
        require_pairs(tokenised)
    if warning := beyond_context(tokenised, config):
        warnings.warn(warning, stacklevel=1)  # here, so that the same words are shown once
    return tokenised


def require_pairs(tokenised: Any) -> None:
    """Raise DataError for the first row that is no pair."""
    import pyarrow.compute as pc

    names = [name for name in (*TOKEN_COLUMNS, RETAINED) if name in tokenised.column_names]
    row = 0
    for table in tokenised.select_columns(names).with_format("arrow").iter(batch_size=1000):
        sides = [table[name] for name in TOKEN_COLUMNS]
        negative = any((pc.min(pc.list_flatten(side)).as_py() or 0) < 0 for side in sides)
        lengths = zip(*(pc.list_value_length(side).to_pylist() for side in sides), strict=True)
        for index, (prompt, chosen, rejected) in enumerate(lengths):
            row += 1
            if negative or not (prompt and chosen and rejected) or chosen == rejected:  # others are pairs for certain
                _require_pair(table.slice(index, 1).to_pylist()[0], row)


def _require_pair(pair: dict[str, Any], row: int) -> None:
    if pair.get(RETAINED):  # a text, which has no answer to reject
        return
    for name in TOKEN_COLUMNS:
        if pair[name] is None or not len(pair[name]):
            raise DataError(f"row {row}: {name} holds no token")
        if (lowest := min(pair[name])) < 0:
            raise DataError(f"row {row}: {name} holds the token {lowest}; ids are 0 or above")
    if list(pair["chosen_ids"]) == list(pair["rejected_ids"]):
        raise DataError(f"row {row}: both answers are the same tokens, so nothing can be learnt from them")


def _fitting(pair: dict[str, Any], index: int, config: Any) -> dict[str, Any]:
    _require_pair(pair, index + 1)
    prompt, *sides = (pair[name] for name in TOKEN_COLUMNS)
    ids = (token for side in (prompt, *sides) for token in side)
    found = Extent(max(ids, default=0), [len(prompt) + max(map(len, sides))])
    if _warning(found, config):
        positions = config.get_text_config(decoder=True).max_position_embeddings
        warnings.warn(  # the same words for all, so that they are shown once
            f"the stream holds pairs longer than the base's {positions:,} positions (max_position_embeddings), so "
            f"expect nonsense of these: give --max-length {positions}",
            stacklevel=1,
        )
    return pair


def beyond_context(tokenised: Any, config: Any) -> str | None:
    """What to warn of where pairs are longer than the base's context; None where all fit, and of streams.

    Raises:
        DataError: a token without a row in the embeddings, or a pair longer than a table of positions.
    """
    from datasets import Dataset

    if not isinstance(tokenised, Dataset) or not len(tokenised):
        return None
    return _warning(extent(tokenised), config)


def _warning(found: Extent, config: Any) -> str | None:
    config = config.get_text_config(decoder=True)
    rows, positions = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    if rows is not None and found.largest_id >= rows:
        raise DataError(
            f"the pairs hold token {found.largest_id}, but the base's embeddings have {rows} rows (vocab_size): use "
            "the tokenizer that belongs to the base, or resize_token_embeddings and save the base first"
        )
    too_long = sum(length > positions for length in found.lengths) if positions is not None else 0
    if not too_long:
        return None
    limit = f"the base's {positions:,} positions (max_position_embeddings)"
    if len(found.lengths) == 1:
        text = f"a pair of {found.lengths[0]:,} tokens is longer than {limit}"
    else:
        pairs = f"{too_long:,} of {len(found.lengths):,} pairs"
        text = f"{pairs} are longer than {limit}, up to {max(found.lengths):,} tokens"
    if config.model_type in POSITION_TABLES:
        raise DataError(f"{text}: give --max-length {positions}, which cuts prompts and drops longer answers")
    return f"{text}, so expect nonsense of these: give --max-length {positions}"


def extent(tokenised: Any) -> Extent:
    """How far the pairs reach."""
    import pyarrow.compute as pc

    largest_id, lengths = 0, []
    for table in tokenised.select_columns(list(TOKEN_COLUMNS)).with_format("arrow").iter(batch_size=1000):
        largest_id = max(largest_id, *(pc.max(pc.list_flatten(column)).as_py() or 0 for column in table.columns))
        prompts, *sides = (pc.list_value_length(column) for column in table.columns)
        lengths += pc.add(prompts, pc.max_element_wise(*sides)).to_pylist()
    return Extent(largest_id, lengths)
