"""Adapter folders on the hub: which names can be there, and the files that are fetched."""

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from qadapter.errors import AdapterFormatError, first_line
from qadapter.modeling.lora_files import CONFIG_NAME, WEIGHTS_NAME
from qadapter.modeling.manifest import MANIFEST_NAME

TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.jinja")


def local_folder(folder: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder itself if it exists, else a snapshot of the hub repository of that name."""
    if Path(folder).is_dir():
        return Path(folder)
    if not may_be_repository(folder):
        raise AdapterFormatError(f"{folder}: there is no such adapter folder. Train one with `qadapter train`.")
    files = [MANIFEST_NAME, f"adapters/*/{CONFIG_NAME}", f"adapters/*/{WEIGHTS_NAME}", *TOKENIZER_FILES, "*.md"]
    return snapshot_of(folder, files, revision, token)


def may_be_repository(name: str | os.PathLike[str]) -> bool:
    """Whether the name of no folder can be that of a hub repository."""
    return not Path(name).exists() and str(name).count("/") == 1 and not str(name).startswith((".", "/", "~"))


def snapshot_of(
    folder: str | os.PathLike[str],
    files: Sequence[str],
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder of a hub repository's files of such names, from the cache or downloaded.

    Raises:
        AdapterFormatError: they are not to be had.
    """
    try:
        snapshot = snapshot_download(str(folder), revision=revision, token=token, allow_patterns=list(files))
    except Exception as error:  # the hub client raises a dozen types; all mean: not to be had
        reason = first_line(error)
        raise AdapterFormatError(
            f"{folder}: no such folder here, and the hub has no readable repository of that name ({reason})."
        ) from error
    return Path(snapshot)
