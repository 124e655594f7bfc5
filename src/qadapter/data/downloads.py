"""Files of known size and kind from an address, kept in a folder of the cache of `datasets`."""

from pathlib import Path

from qadapter.data.files import parse_json
from qadapter.errors import DataError, first_line
from qadapter.new_folders import whole_file

TIMEOUT_SECONDS = 30


def downloaded_list(address: str, most_bytes: int) -> Path:
    """The JSON list at an address: kept from an earlier call, else fetched, and kept once it has been parsed.

    Of an answer no more than `most_bytes` are read, whatever length it states.

    Raises:
        DataError: it cannot be had or kept, is larger, or is no JSON list (a page of a proxy, say, or half a file).
    """
    path = download_folder() / address.rpartition("/")[2]
    if not path.exists():
        data = fetched(address, most_bytes)
        try:
            is_list = isinstance(parse_json(data), list)
        except DataError as error:
            raise DataError(f"{address}: {error}") from None
        if not is_list:
            raise DataError(f"{address}: the file holds no list of rows")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as scratch:
                scratch.write_bytes(data)
        except OSError as error:
            raise DataError(f"{address}: the file cannot be kept in {path.parent} ({error})") from error
    return path


def download_folder() -> Path:
    """Where the files are: HF_DATASETS_CACHE/qadapter-downloads."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "qadapter-downloads"


def fetched(address: str, most_bytes: int) -> bytes:
    """What an address answers, of at most so many bytes; by the hub's client, which knows proxies and HF_HUB_OFFLINE.

    Raises:
        DataError: there is no answer, or a larger one.
    """
    from huggingface_hub.utils import get_session

    data = bytearray()
    try:
        with get_session().stream("GET", address, timeout=TIMEOUT_SECONDS) as response:
            response.raise_for_status()
            for part in response.iter_bytes():
                data += part
                if len(data) > most_bytes:
                    break
    except Exception as error:  # the client and the network raise a dozen unrelated types
        reason = first_line(error)
        raise DataError(f"{address}: the file cannot be fetched: {reason}") from error
    if len(data) > most_bytes:
        raise DataError(f"{address}: the file has more than {most_bytes} bytes, the most that are fetched")
    return bytes(data)
