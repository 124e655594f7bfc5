"""Rows of a dataset on the Hugging Face hub (or in its local cache)."""

import re
from collections.abc import Iterator

from qadapter.data.rows import RawRow
from qadapter.errors import DataError, first_line

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")


def is_hub_id(name: str) -> bool:
    """Whether the name has the form "org/name" or "org/name:config"."""
    return HUB_ID.fullmatch(name) is not None


def hub_rows(
    hub_id: str, split: str, streaming: bool, config: str | None = None, data_dir: str | None = None
) -> Iterator[RawRow]:
    """The rows of one split; raises DataError when the hub has no such dataset or cannot be reached."""
    from datasets import load_dataset

    try:
        dataset = load_dataset(hub_id, config, data_dir=data_dir, split=split, streaming=streaming)
        for number, row in enumerate(dataset, start=1):
            yield RawRow(number, f"{hub_id}, row {number}", row)
    except Exception as error:  # the hub client, the builders and the network raise a dozen unrelated types
        raise DataError(
            f"{hub_id}: the dataset cannot be loaded from the hub: {_first_line(error)}. Check the name (and its "
            "config, 'org/name:config') and the network, log in with `hf auth login` if it is private, or give the "
            "path of a local file"
        ) from error


def _first_line(error: BaseException) -> str:
    """What went wrong in a line; the builders' own errors say it in their cause."""
    from datasets.exceptions import DatasetGenerationError

    if isinstance(error, StopIteration):
        return "there are no rows"
    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        return _first_line(error.__cause__)
    return first_line(error)
