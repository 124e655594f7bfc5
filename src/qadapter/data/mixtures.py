"""Mix datasets of pairs by weight: shares of the result, drawn without replacement."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

from qadapter.errors import DataError


def parse_mixture(source: Iterable[str] | Mapping[str, float]) -> dict[str, float | None]:
    """{source: weight}; all weights are None for a list that gives none. Raises DataError."""
    if isinstance(source, Mapping) and any(hasattr(part, "column_names") for part in source.values()):
        raise DataError(f"the source has the splits {', '.join(map(repr, source))} already loaded; give one of them")
    named = list(source.items()) if isinstance(source, Mapping) else [split_weight(text) for text in source]
    weights = dict(named)
    if not weights:
        raise DataError("the mixture names no source; give at least one")
    if len(weights) < len(named):
        raise DataError(f"the mixture names a source twice: {', '.join(name for name, _ in named)}")
    given = [weight for weight in weights.values() if weight is not None]
    if given and len(given) < len(weights):
        raise DataError("the mixture gives a weight to some sources only; give one to each ('path=weight') or to none")
    for name, weight in weights.items():
        if weight is not None and not (isinstance(weight, int | float) and math.isfinite(weight) and weight > 0):
            raise DataError(f"the weight of {name} is {weight!r}; it has to be a number above 0")
    return weights


def split_weight(text: str) -> tuple[str, float | None]:
    """("pairs.jsonl", 0.7) from "pairs.jsonl=0.7"; only a number after the last '=' counts as a weight."""
    if not isinstance(text, str | PathLike):
        raise DataError(
            f"a source is a {type(text).__name__}; give paths or hub ids. A Dataset, or Dataset.from_list(rows), goes "
            "to QAdapterTrainer as it is (columns of other names after rename_columns)"
        )
    name, separator, weight = str(text).rpartition("=")
    try:
        return (name, float(weight)) if separator else (str(text), None)
    except ValueError:
        return str(text), None


def mix(parts: Sequence[Any], weights: Mapping[str, float], max_rows: int | None, seed: int) -> Any:
    """A shuffled Dataset in which part k holds the share weights[k], as many rows as the parts allow."""
    from datasets import concatenate_datasets

    counts = mixture_counts([len(part) for part in parts], list(weights.values()), max_rows)
    for name, count in zip(weights, counts, strict=True):
        if count == 0:
            raise DataError(f"the mixture would take no row of {name}; raise its weight or max_rows, or leave it out")
    order = random.Random(seed)
    starts = [sum(len(part) for part in parts[:index]) for index in range(len(parts))]
    chosen = [
        start + index
        for start, part, count in zip(starts, parts, counts, strict=True)
        for index in order.sample(range(len(part)), count)
    ]
    order.shuffle(chosen)
    return concatenate_datasets(list(parts)).select(chosen, keep_in_memory=True)


def mixture_counts(sizes: Sequence[int], weights: Sequence[float], max_rows: int | None) -> list[int]:
    """How many rows each part gives: shares rounded by largest remainder, never more than the part has."""
    shares = [weight / math.fsum(weights) for weight in weights]
    # 1e-9: 7 rows with the share 0.7 are ten rows in all, although 7 / 0.7 may come out below 10.
    total = math.floor(min(size / share for size, share in zip(sizes, shares, strict=True)) + 1e-9)
    total = total if max_rows is None else min(total, max_rows)
    exact = [share * total for share in shares]
    counts = [min(math.floor(value + 1e-9), size) for value, size in zip(exact, sizes, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda index: counts[index] - exact[index])
    open_parts = [index for index in by_remainder if counts[index] < sizes[index]]
    for index in open_parts[: total - sum(counts)]:
        counts[index] += 1
    return counts


def interleave(parts: Sequence[Any], weights: Mapping[str, float], max_rows: int | None, seed: int) -> Any:
    """A stream that draws its next row from part k with probability weights[k], until one part runs out."""
    from datasets import interleave_datasets

    total = math.fsum(weights.values())
    shares = [weight / total for weight in weights.values()]
    stream = interleave_datasets(list(parts), probabilities=shares, seed=seed, stopping_strategy="first_exhausted")
    return stream if max_rows is None else stream.take(max_rows)


def join(parts: Sequence[Any], max_rows: int | None) -> Any:
    """All rows of all parts, in the order in which they are named."""
    from datasets import concatenate_datasets

    joined = concatenate_datasets(list(parts))
    if max_rows is None:
        return joined
    return joined.take(max_rows)
