"""Which texts are run together."""

from collections.abc import Iterable, Sequence


def batches_by_length(texts: Sequence[Sequence[int]], batch_tokens: int) -> Iterable[list[int]]:
    """Indices in batches of similar length whose padded size stays within `batch_tokens`."""
    batch: list[int] = []
    for index in sorted(range(len(texts)), key=lambda index: -len(texts[index])):
        if batch and len(texts[batch[0]]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def batches_by_beginning(texts: Sequence[Sequence[int]], batch_tokens: int) -> Iterable[list[int]]:
    """Indices in batches of at most `batch_tokens` in all, texts that begin alike beside each other."""
    batch: list[int] = []
    held = 0
    for index in sorted(range(len(texts)), key=lambda index: list(texts[index])):
        if batch and held + len(texts[index]) > batch_tokens:
            yield batch
            batch, held = [], 0
        batch.append(index)
        held += len(texts[index])
    if batch:
        yield batch
