"""Texts that no pair speaks of, as rows among the pairs: on them the policy is to stay with the base.

Such a row is a pair whose prompt is the text's first token, whose chosen answer is the rest and whose rejected answer
is empty, with True in a column of its own. So whatever batches, packs and counts pairs has them, too.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, List, Value, concatenate_datasets

from qadapter.data.base_limits import RETAINED
from qadapter.data.rows import TOKEN_COLUMNS

# Pairs to a text: more texts make an epoch dearer, and the retention's weight does the rest.
PAIRS_A_TEXT = 3


def with_retained_rows(pairs: Dataset, texts: Sequence[Sequence[int]]) -> Dataset:
    """The tokenised pairs with a text after every `PAIRS_A_TEXT` of them, as often as it takes.

    Args:
        texts: token ids of each, at least two.
    """
    for name in TOKEN_COLUMNS:  # some hold no token of a large vocabulary
        if pairs.features[name] not in (List(Value("int32")), List(Value("int64"))):
            pairs = pairs.cast_column(name, List(Value("int64")))
    names = pairs.column_names
    rows = [
        dict.fromkeys(names) | {"prompt_ids": list(ids[:1]), "chosen_ids": list(ids[1:]), "rejected_ids": []}
        for ids in itertools.islice(itertools.cycle(texts), retained_rows(len(pairs)))
    ]
    parts = (pairs, False), (Dataset.from_list(rows, features=pairs.features), True)
    both = concatenate_datasets([part.add_column(RETAINED, [is_text] * len(part)) for part, is_text in parts])
    # Pairs by pairs where the order of the data is kept, too.
    places = [*range(len(pairs)), *((number + 1) * PAIRS_A_TEXT - 0.5 for number in range(len(rows)))]
    return both.select(sorted(range(len(both)), key=places.__getitem__))


def retained_rows(pairs: int) -> int:
    """How many rows of texts come to so many pairs."""
    return -(-pairs // PAIRS_A_TEXT)


def retained_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[bool]]:
    """What a batch says of its rows: which are texts, if any is. It stays on the host, where it costs no wait."""
    flags = [bool(row.get(RETAINED)) for row in rows]
    return {RETAINED: flags} if any(flags) else {}
