"""A merged checkpoint that llama.cpp's converter reads as it is, with the commands to run."""

import json
import os
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from qadapter.errors import ConfigError
from qadapter.export.merged import CHECKED_TOKENS, require_mergeable, write_merged
from qadapter.modeling import QAdapterForCausalLM
from qadapter.new_folders import into_new_folder, write_json

SENTENCEPIECE_NAME = "tokenizer.model"
OUTTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
GGUF_README = """# GGUF-ready checkpoint

A merged checkpoint of {base} with the adapter at strength 1: an ordinary Hugging Face model.
Largest difference of its logits from the policy's on {tokens} tokens: {difference:.3g}.

With a checkout of llama.cpp beside this folder, and its programs installed (or built, in llama.cpp/build/bin), convert
it, then quantise and run it:

    pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt
    python llama.cpp/convert_hf_to_gguf.py {name} --outfile {name}.gguf --outtype {outtype}
    llama-quantize {name}.gguf {name}-q4_k_m.gguf Q4_K_M
    llama-cli -m {name}-q4_k_m.gguf

`--outtype {outtype}` keeps the numbers of this folder; any other rounds them. Quantising changes the answers, on small
models by more than an adapter may have changed them: read some beside those of `qadapter generate`, and try Q8_0
instead of Q4_K_M. llama-cli fills in this folder's chat template; llama-completion does so with `--jinja` only, and
without it leaves out the template's own system message.
A GGUF file has no dial: strength, composition and the KL cap need both streams (`qadapter serve`, or vLLM).
"""


def export_gguf_ready(
    model: QAdapterForCausalLM,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    interpolated: float | None = None,
) -> float:
    """A checkpoint as `export_merged` writes it, with instructions to convert it to GGUF; the largest logit difference.

    Raises:
        ConfigError: the policy cannot be merged exactly, or is in a number format that GGUF does not have.
    """
    if model.dtype not in OUTTYPES:
        raise ConfigError(f"the policy is in {model.dtype}, which GGUF does not have: load it with dtype=float32.")
    require_mergeable(model, interpolated)
    name = shlex.quote(Path(folder).resolve().name)

    def write(scratch: Path) -> float:
        difference = write_merged(model, scratch, tokenizer, interpolated)
        if tokenizer is not None:
            _write_tokenizer_config(scratch / "tokenizer_config.json", tokenizer)
            _copy_sentencepiece(model, scratch)
        readme = GGUF_README.format(
            base=model.base_source.name,
            name=name,
            tokens=CHECKED_TOKENS,
            difference=difference,
            outtype=OUTTYPES[model.dtype],
        )
        (scratch / "README.md").write_text(readme, encoding="utf-8")
        return difference

    return into_new_folder(Path(folder), write)


def _write_tokenizer_config(path: Path, tokenizer: Any) -> None:
    """Say in the words of transformers 4 what transformers 5 has written: both read them.

    The converter's own requirements name transformers 4, which knows neither TokenizersBackend nor extra tokens as a
    list. Beside a SentencePiece file the converter takes added tokens from nowhere but added_tokens_decoder.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    config["added_tokens_decoder"] = {
        str(index): {flag: getattr(token, flag) for flag in flags}
        for index, token in tokenizer.added_tokens_decoder.items()
    }
    write_json(path, config)


def _copy_sentencepiece(model: QAdapterForCausalLM, folder: Path) -> None:
    """Copy the base's tokenizer.model if its tokenizer comes from SentencePiece; transformers 5 writes no such file.

    Without the scores in it llama.cpp splits most texts otherwise than the model was trained with, and says nothing.
    """
    fast = folder / "tokenizer.json"
    vocabulary = json.loads(fast.read_text(encoding="utf-8"))["model"] if fast.is_file() else {}
    if vocabulary.get("type") != "Unigram" and not vocabulary.get("byte_fallback"):
        return
    source = model.base_source
    try:
        base = Path(source.path)
        if not base.is_dir():
            base = Path(snapshot_download(source.path, revision=source.hub_revision, allow_patterns=SENTENCEPIECE_NAME))
        found = (base / SENTENCEPIECE_NAME).is_file()
        reason = "there is no such file"
    except (OSError, ValueError) as error:
        found, reason = False, str(error)
    if found:
        shutil.copyfile(base / SENTENCEPIECE_NAME, folder / SENTENCEPIECE_NAME)
    else:
        warnings.warn(
            f"{SENTENCEPIECE_NAME} of {source.name!r} is not to be had ({reason}): llama.cpp would split texts "
            "otherwise than the model does. Copy it from the base into the exported folder before you convert.",
            stacklevel=3,
        )
