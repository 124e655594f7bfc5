"""Rows of a dataset on the Hugging Face hub (or in its local cache)."""

import functools
import re
from collections.abc import Iterator

from qadapter.data.rows import RawRow
from qadapter.errors import DataError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")


def is_hub_id(name: str) -> bool:
    """Whether the name has the form "org/name" or "org/name:config"."""
    return HUB_ID.fullmatch(name) is not None


def hub_rows(
    hub_id: str,
    split: str,
    streaming: bool,
    config: str | None = None,
    data_dir: str | None = None,
    data_files: str | None = None,
) -> Iterator[RawRow]:
    """The rows of one split; raises DataError when the hub has no such dataset or cannot be reached.

    Args:
        data_files: the address of a file elsewhere, which `hub_id`, then a kind of file ("json"), can read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    name = data_files or hub_id
    way_out = (
        "Check the name (and its config, 'org/name:config') and the network, log in with `hf auth login` if it is "
        "private, or give the path of a local file"
        if data_files is None
        else "Check the network, or download the file by other means and name it as 'dsp/academy:FILE'"
    )
    places = {"data_dir": data_dir} if data_files is None else {"data_files": data_files}
    load = functools.partial(load_dataset, hub_id, config, **places, split=split, streaming=streaming)
    try:
        try:
            dataset = load()
        except DatasetGenerationError:
            if data_files is None:
                raise
            # A page of a proxy or half a file, say, that an earlier call left in the cache: it would stay there.
            dataset = load(download_mode="force_redownload")
        for number, row in enumerate(dataset, start=1):
            yield RawRow(number, f"{name}, row {number}", row)
    except Exception as error:  # the hub client, the builders and the network raise a dozen unrelated types
        raise DataError(
            f"{name}: the dataset cannot be {'loaded from the hub' if data_files is None else 'read'}: "
            f"{_first_line(error)}. {way_out}"
        ) from error


def _first_line(error: BaseException) -> str:
    """What went wrong in a line; the builders' own errors say it in their cause."""
    from datasets.exceptions import DatasetGenerationError

    if isinstance(error, StopIteration):
        return "there are no rows"
    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        return _first_line(error.__cause__)
    return (str(error).strip() or type(error).__name__).splitlines()[0]
