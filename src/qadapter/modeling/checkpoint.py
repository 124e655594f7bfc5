"""The adapter folder: written so that it is never half there, read as if it came from an enemy.

    my-adapter/
      qadapter_config.json      what the adapter means: settings, base, tokenizer, digests, a logit probe
      adapters/default/         a plain PEFT adapter (adapter_config.json, adapter_model.safetensors)
      tokenizer files           as trained with, when a tokenizer is known

qadapter_config.json is removed before and written after everything else: without it the folder is no adapter. There
is no adapter_config.json at the top, because other tools would load the folder as a plain LoRA and sample from the
wrong policy. Only safetensors are read, paths cannot leave the folder, and sizes are bounded.
"""

import inspect
import itertools
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE

from qadapter.errors import ConfigError
from qadapter.modeling.fingerprints import weight_fingerprint
from qadapter.modeling.lora_files import CONFIG_NAME, WEIGHTS_NAME, write_adapter_config
from qadapter.modeling.manifest import MANIFEST_NAME, Manifest, own_adapters
from qadapter.modeling.merging import require_unfolded
from qadapter.modeling.policy import QAdapterForCausalLM
from qadapter.modeling.probe import make_probe
from qadapter.modeling.quantised import quantisation_of
from qadapter.new_folders import file_digest, set_mode_of_weights, write_json

logger = logging.getLogger(__name__)


def save(
    model: QAdapterForCausalLM,
    folder: str | os.PathLike[str],
    state_dict: dict[str, Tensor] | None = None,
    tokenizer: Any = None,
    probe: dict[str, Any] | None = None,
) -> None:
    """Write the adapter folder; on any failure the folder holds no adapter rather than a wrong one.

    Args:
        state_dict: the adapter's weights instead of the model's own; gathered, where the model is sharded.
        tokenizer: written, too, and its fingerprint recorded.
        probe: what `make_probe` gives; needed of a sharded model, which all processes have to run.

    Raises:
        ConfigError: the folder is a file, its `adapters` is a link, or the adapter is folded into the base.
        TrainingError: log-probabilities of the policy that are not finite.
    """
    folder = Path(folder)
    require_unfolded(model.base)
    if folder.is_file():
        raise ConfigError(f"{folder} is a file: an adapter is a folder, choose another output folder.")
    own_adapters(folder)  # refuses before the work
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        model.remember_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
        scratch = Path(name)
        digests = {
            adapter: write_adapter(model, adapter, scratch / "adapters" / adapter, state_dict)
            for adapter in model.adapters
        }
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        write_json(scratch / MANIFEST_NAME, _manifest(model, digests, state_dict, probe).to_dict())
        _publish(scratch, folder)


def _publish(scratch: Path, folder: Path) -> None:
    """Move everything from `scratch` into `folder`, the manifest last; only its own earlier adapters are replaced."""
    earlier = own_adapters(folder)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    for old in earlier:
        shutil.rmtree(old)
    (folder / "adapters").mkdir(exist_ok=True)
    for new in (scratch / "adapters").iterdir():
        _put_aside(folder / "adapters" / new.name)
        os.replace(new, folder / "adapters" / new.name)
    names = [name for name in os.listdir(scratch) if name != "adapters"]
    if "tokenizer_config.json" in names:  # chat templates that it does not have are an earlier tokenizer's
        (folder / CHAT_TEMPLATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder / CHAT_TEMPLATE_DIR, ignore_errors=True)
    for name in sorted(names, key=lambda name: name == MANIFEST_NAME):
        os.replace(scratch / name, folder / name)


def _put_aside(path: Path) -> None:
    """Rename what is in the way: no manifest says whose it is, an interrupted save's or somebody's own LoRA."""
    if path.exists() or path.is_symlink():
        names = (path.with_name(f"{path.name}.old{number}") for number in itertools.count(1))
        aside = next(name for name in names if not name.exists() and not name.is_symlink())
        path.rename(aside)
        logger.warning("%s was there and is of no adapter known here: it is %s now.", path, aside.name)


def write_adapter(
    model: QAdapterForCausalLM,
    adapter: str,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
    scale: float = 1.0,
) -> str:
    """Write one plain PEFT adapter, its update times `scale`; the SHA-256 of its weights file."""
    folder.mkdir(parents=True, exist_ok=True)
    source = None
    if state_dict is not None:
        gathered = _of_base(state_dict)
        if lacking := sorted(set(model.adapter_parameters(adapter)) - set(gathered)):
            raise ConfigError(
                f"the state_dict lacks {len(lacking)} tensors of the adapter {adapter!r}, first {lacking[0]!r}: gather "
                "all weights before saving (with ZeRO-3: stage3_gather_16bit_weights_on_model_save = true)."
            )
        source = {f"base_model.model.{name}": weight for name, weight in gathered.items()}
    tensors = get_peft_model_state_dict(
        model.peft_model, state_dict=source, adapter_name=adapter, save_embedding_layers=False
    )
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    if scale != 1.0:  # by the factor B of every update BA
        tensors = {name: scale * tensor if ".lora_B." in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    write_adapter_config(folder / CONFIG_NAME, model.peft_model.peft_config[adapter], tensors, model.base_source)
    set_mode_of_weights(folder / CONFIG_NAME)
    return file_digest(folder / WEIGHTS_NAME)


def _of_base(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of ours with the names that the base has for its weights."""
    return {name.removeprefix("base."): weight for name, weight in state_dict.items()}


def _manifest(
    model: QAdapterForCausalLM,
    digests: dict[str, str],
    state_dict: dict[str, Tensor] | None,
    probe: dict[str, Any] | None,
) -> Manifest:
    quantisation = quantisation_of(model.base)
    return Manifest(
        configs={name: config.to_dict() for name, config in model.configs.items()},
        weights=dict.fromkeys(model.adapters, 0.0) | model.adapter_weights,
        digests=digests,
        base={
            "name": model.base_source.name,
            "revision": model.base_source.revision,
            "fingerprint": weight_fingerprint(model.base, _of_base(state_dict or {}), linear=quantisation is None),
            "architecture": type(model.base).__name__,
            "quantization": quantisation,
        },
        tokenizer=model.tokenizer_fingerprint,
        probe=probe or make_probe(model),
    )


def push(
    model: QAdapterForCausalLM,
    repo_id: str,
    private: bool | None = None,
    token: str | bool | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Upload the model's adapter folder to a hub repository, created if needed; the commit's information.

    Give the tokenizer where the adapter was trained with another chat template than the base's own.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        save(model, scratch, tokenizer=tokenizer)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=scratch,
            commit_message=commit_message or "Upload Q-Adapter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


# What `push` takes besides the place.
UPLOAD_OPTIONS = tuple(inspect.signature(push).parameters)[2:]


def copy_adapter(source: Path, folder: Path) -> None:
    """Put the adapter of one folder into another, as `save` does: its manifest comes last."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
        shutil.copytree(source / "adapters", Path(name) / "adapters")
        shutil.copy(source / MANIFEST_NAME, name)
        _publish(Path(name), folder)
