"""Folders and files to write: the cache, what can be written to, and new ones, whole or not there; their digests."""

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from qadapter.errors import ConfigError

Result = TypeVar("Result")


def cache_folder() -> Path:
    """The folder for what is kept between runs: $QADAPTER_CACHE, else qadapter in the user's cache directory."""
    root = os.environ.get("QADAPTER_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qadapter"


def require_new_folder(folder: Path) -> None:
    """Refuse a folder that holds something, or cannot be made: nothing is overwritten.

    Raises:
        ConfigError: `folder` exists and is not empty, or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output folder {folder} exists and is not empty: choose another one.")
    require_writable(folder)


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, or cannot be made where it is to lie: before hours of work.

    Raises:
        ConfigError: it, or what is there of the path to it, is a file or read-only.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"output folder {folder}: {nearest} is a file. Choose another one.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output folder {folder}: {nearest} cannot be written to. Choose another one.")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Within the context, a scratch file beside `path` to write to; at its end it becomes `path`, after an error none.

    Whoever reads `path` meanwhile finds the old file or none. Several may write it at once: the last one's stays.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # nobody else's
    try:
        yield scratch
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all, and the folder that it is in; text in UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, values: Any) -> None:
    """Write `values` as JSON, whole or not at all, in ASCII with sorted keys."""
    write_whole(path, json.dumps(values, indent=2, sort_keys=True, default=str) + "\n")


def write_ordered_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all, keys in their own order: columns have one."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def into_new_folder(folder: Path, write: Callable[[Path], Result]) -> Result:
    """Let `write` fill a scratch folder that becomes `folder` only when it is whole; what `write` returns.

    Raises:
        ConfigError: `folder` exists and is not empty, before or after `write`.
    """
    require_new_folder(folder)
    folder = folder.resolve()
    there = folder.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A folder that is there may be a mount, or the working one: it cannot be replaced, its contents are moved into it.
    with tempfile.TemporaryDirectory(dir=folder if there else folder.parent, prefix=".exporting-") as name:
        scratch = Path(name) / "export"
        scratch.mkdir()
        result = write(scratch)
        if not there:
            require_new_folder(folder)
            os.replace(scratch, folder)
        elif sorted(folder.iterdir()) == [Path(name)]:
            for path in scratch.iterdir():
                os.replace(path, folder / path.name)
        else:
            raise ConfigError(f"something else was written into {folder} meanwhile: choose another output folder.")
    return result


@contextmanager
def removed_on_error(folder: Path, keep: bool) -> Iterator[None]:
    """Within the context, an error removes what `folder` holds as it begins: the same command can be given again.

    `keep` the folder itself, as one that was there before.
    """
    written = list(folder.iterdir())
    try:
        yield
    except BaseException:
        for path in written:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if not keep:
            with suppress(OSError):  # something else was written into it
                folder.rmdir()
        raise


def set_mode_of_weights(config: Path) -> None:
    """Give the safetensors files beside `config` its mode: safetensors writes them for their owner alone (0600)."""
    for weights in config.parent.glob("*.safetensors"):
        shutil.copymode(config, weights)
