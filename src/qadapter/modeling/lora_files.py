"""Plain PEFT LoRA folders: reading them without trusting them, and writing them so that PEFT reads them.

What a layer's adapter is (its rank, its target) is taken from the tensors, never from patterns in the config: those
are regular expressions, and a hostile one can run for ever.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qadapter.errors import AdapterFormatError
from qadapter.modeling.bases import BaseSource
from qadapter.modeling.manifest import MANIFEST_NAME, read_json_object
from qadapter.modeling.streams import ALPHA_LIMIT, MAX_RANK, SUPPORTED_INITIALISATIONS, UNSUPPORTED_SETTINGS

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_TENSORS = 100_000
PREFIX = "base_model.model."
KEY = re.compile(r"base_model\.model\.([A-Za-z0-9_.]{1,200})\.lora_(A\.weight|B\.weight|magnitude_vector)")
MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\\?\.[A-Za-z0-9_]+)*")  # whose dots may be escaped
CONVERSION = (
    'python -c "import sys, torch, safetensors.torch as s; '
    "s.save_file(torch.load(sys.argv[1], map_location='cpu', weights_only=True), sys.argv[2])\""
)
WRAPPER_PART = re.compile(r"\.(modules_to_save|original_module)\.(?=weight$|bias$)")
BASE_KEY = re.compile(r"base_model\.model\.((?!.*lora_)[A-Za-z0-9_.]{1,200})")


def is_plain_lora(folder: Path) -> bool:
    """Whether it is a LoRA as PEFT writes it, and no adapter folder."""
    return (folder / CONFIG_NAME).is_file() and not (folder / MANIFEST_NAME).exists()


def read_adapter(root: Path, name: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors of the adapter `name` in an adapter folder."""
    return read_lora(inside(root, root / "adapters" / name))


def inside(root: Path, path: Path) -> Path:
    """`path`, refused if it leads out of `root` (through symbolic links, say)."""
    # A hub snapshot's files are links into the cache's blobs beside it.
    if not path.is_dir() or not path.resolve().is_relative_to(root.resolve()):
        raise AdapterFormatError(f"{path} is missing, or leads out of the adapter folder.")
    return path


def read_lora(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors of a plain PEFT LoRA folder, with the targets named in full.

    Raises:
        AdapterFormatError: a file is missing or damaged, or the adapter is of an unsupported kind.
    """
    config, tensors = _read_files(folder, KEY, {})
    return _lora_config(config, tensors, folder), tensors


def read_foreign_lora(folder: Path) -> tuple[LoraConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Config and tensors as of `read_lora`, and base weights that lie beside them, by their names in the base.

    PEFT saves the embeddings along with a LoRA on the head, with a resized vocabulary and for `modules_to_save`,
    whether they have changed or not; whoever has the base can tell. With both of the latter it also writes the parts
    of its wrapper (`modules_to_save`, `original_module`), which it does not read.
    """
    keys = re.compile(f"{KEY.pattern}|{BASE_KEY.pattern}")
    config, tensors = _read_files(folder, keys, settled={"modules_to_save": None})
    adapter = {name: tensor for name, tensor in tensors.items() if KEY.fullmatch(name)}
    base = {
        name.removeprefix(PREFIX).replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
        if name not in adapter and not (WRAPPER_PART.search(name) and WRAPPER_PART.sub(".", name) in tensors)
    }
    return _lora_config(config, adapter, folder), adapter, base


def _read_files(
    folder: Path, keys: re.Pattern[str], settled: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config, with the entries that the caller has settled, and the tensors, whose names all match `keys`."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise AdapterFormatError(f"{folder}: {name} is missing{_way_out(folder)}")
    config = {**read_json_object(folder / CONFIG_NAME), **settled}
    # First: it says why the weights hold tensors that no plain LoRA has.
    _require_plain_lora(config, folder / CONFIG_NAME)
    return config, _read_tensors(folder / WEIGHTS_NAME, keys)


def _way_out(folder: Path) -> str:
    """What helps where a folder lacks its config or its weights; nothing where nothing is known."""
    pickled = folder / "adapter_model.bin"
    if (folder / CONFIG_NAME).is_file() and pickled.exists():
        paths = " ".join(shlex.quote(str(path)) for path in (pickled, folder / WEIGHTS_NAME))
        return f" (pickled weights are never read). Convert them: {CONVERSION} {paths}"
    if any((path / WEIGHTS_NAME).is_file() for path in folder.glob("checkpoint-*")):
        return ": the run was interrupted. Take one of the checkpoint-* folders in it."
    return "."


def _read_tensors(path: Path, keys: re.Pattern[str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                raise AdapterFormatError(f"{path} has {len(names)} tensors; at most {MAX_TENSORS} are read.")
            for name in names:
                if "lora_embedding_" in name:
                    raise AdapterFormatError(
                        f"{path}: {name!r} is a LoRA on embeddings, which no stream can have. Leave them out of "
                        "target_modules, or train them whole (modules_to_save, then `qadapter wrap --new-base`)."
                    )
                if not keys.fullmatch(name):
                    raise AdapterFormatError(f"{path}: tensor {name!r} is not part of a LoRA adapter.")
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFormatError(f"{path} is not a readable safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise AdapterFormatError(f"{path}: tensor {name!r} holds numbers of type {tensor.dtype}.")
        # Attention on some CPUs turns NaN queries into zeros: the policy's answers need not show the damage.
        if not bool(tensor.float().isfinite().all()):  # as it will be: float64 reaches farther
            raise AdapterFormatError(
                f"{path}: tensor {name!r} holds NaN, infinity or more than float32 can: the adapter is damaged."
            )
    return tensors


def _require_plain_lora(config: Mapping[str, Any], where: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterFormatError(f"{where}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be used.")
    for key in UNSUPPORTED_SETTINGS:
        if config.get(key):
            raise AdapterFormatError(f"{where}: {key} is set, which a frozen base and its streams cannot follow.")
    if config.get("bias", "none") != "none":
        raise AdapterFormatError(f"{where}: bias is {config['bias']!r}; only adapters with bias 'none' can be used.")
    if config.get("init_lora_weights", True) not in SUPPORTED_INITIALISATIONS:
        raise AdapterFormatError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}: such an adapter belongs to a base whose "
            "weights were rewritten. Convert it to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)."
        )
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config.get(key, False), bool):
            raise AdapterFormatError(f"{where}: {key} is {config[key]!r}, must be true or false.")


def _lora_config(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> LoraConfig:
    where = folder / CONFIG_NAME
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, part = KEY.fullmatch(name).groups()  # type: ignore[union-attr]
        modules.setdefault(module, {})[part] = tensor
    if not modules:
        raise AdapterFormatError(f"{folder / WEIGHTS_NAME} holds no LoRA tensors.")
    ranks = {module: _rank(parts, f"{folder / WEIGHTS_NAME}: {module}") for module, parts in modules.items()}
    # One pattern a module, each a literal name: PEFT matches patterns as regular expressions.
    patterns = _alpha_patterns(config, where)
    alphas = {module: _alpha(config.get("lora_alpha"), patterns, module, where) for module in modules}
    default_rank, default_alpha = max(ranks.values()), max(alphas.values())
    return LoraConfig(
        r=default_rank,
        lora_alpha=default_alpha,
        rank_pattern={re.escape(m): rank for m, rank in ranks.items() if rank != default_rank},
        alpha_pattern={re.escape(m): alpha for m, alpha in alphas.items() if alpha != default_alpha},
        target_modules=sorted(modules),
        use_rslora=config.get("use_rslora", False),
        use_dora=config.get("use_dora", False),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def _rank(parts: dict[str, Tensor], where: str) -> int:
    if "A.weight" not in parts or "B.weight" not in parts:
        raise AdapterFormatError(f"{where}: a LoRA needs both lora_A and lora_B.")
    a, b = parts["A.weight"], parts["B.weight"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] < 1:
        raise AdapterFormatError(f"{where}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit together.")
    if a.shape[0] > MAX_RANK:
        raise AdapterFormatError(f"{where}: the rank is {a.shape[0]}; at most {MAX_RANK} is read.")
    return a.shape[0]


def _alpha_patterns(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """alpha_pattern by literal names or suffixes of names; other patterns are refused."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise AdapterFormatError(f"{where}: alpha_pattern must be an object.")
    for pattern in patterns:
        if not MODULE_NAME.fullmatch(pattern):
            raise AdapterFormatError(
                f"{where}: alpha_pattern {pattern!r} is not a plain module name, as layers.0.self_attn.q_proj is: "
                "give each layer its own entry."
            )
    return {pattern.replace("\\", ""): alpha for pattern, alpha in patterns.items()}


def _alpha(alpha: Any, patterns: dict[str, Any], module: str, where: Path) -> float:
    """lora_alpha of a module: that of the first pattern that is its name or ends it, else the common one."""
    parts = module.split(".")
    suffixes = {".".join(parts[start:]) for start in range(len(parts))}
    alpha = next((value for pattern, value in patterns.items() if pattern in suffixes), alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < ALPHA_LIMIT:
        raise AdapterFormatError(f"{where}: lora_alpha is {alpha!r}, must lie between 0 and {ALPHA_LIMIT:g}.")
    return alpha


def write_adapter_config(path: Path, peft_config: LoraConfig, tensors: dict[str, Tensor], base: BaseSource) -> None:
    """Write adapter_config.json for PEFT, with all patterns replaced by the names that they matched."""
    values = peft_config.to_dict()
    modules = sorted({KEY.fullmatch(name).group(1) for name in tensors})  # type: ignore[union-attr]
    values["target_modules"] = modules
    for setting, common in (("rank_pattern", peft_config.r), ("alpha_pattern", peft_config.lora_alpha)):
        patterns = values[setting]
        matched = {module: patterns.get(get_pattern_key(patterns, module), common) for module in modules}
        values[setting] = {re.escape(module): value for module, value in matched.items() if value != common}
    values["exclude_modules"] = values["layers_to_transform"] = values["layers_pattern"] = None
    values["base_model_name_or_path"], values["revision"] = base.name, base.hub_revision
    values["inference_mode"] = True
    values.pop("runtime_config", None)
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    path.write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n")
