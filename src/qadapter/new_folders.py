"""The folder that an export, or a base written anew, goes to: a new one, whole or not there."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from qadapter.errors import ConfigError

Result = TypeVar("Result")


def require_new_folder(folder: Path) -> None:
    """Refuse a folder that holds something, or cannot be made: nothing is overwritten.

    Raises:
        ConfigError: `folder` exists and is not empty, or would have to lie in a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output folder {folder} exists and is not empty: choose another one.")
    for parent in folder.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise ConfigError(f"output folder {folder}: {parent} is a file. Choose another one.")


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


def set_mode_of_weights(config: Path) -> None:
    """Give the safetensors files beside `config` its mode: safetensors writes them for their owner alone (0600)."""
    for weights in config.parent.glob("*.safetensors"):
        shutil.copymode(config, weights)
