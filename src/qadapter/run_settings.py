"""The arguments of a training run besides the trainer's own: base, data, adapter, and what is wrong with them."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig

from qadapter.config import PRESETS, QAdapterConfig
from qadapter.devices import pick_dtype
from qadapter.errors import ConfigError, require_rules
from qadapter.modeling.adapter_settings import ALL_LINEAR
from qadapter.modeling.quantised import require_bitsandbytes
from qadapter.training_arguments import QAdapterTrainingArguments
from qadapter.training_metrics import METRICS


@dataclass
class ModelArguments:
    """Which base model, and how to load it."""

    model: str | None = field(default=None, metadata={"help": 'Base model: hub id, folder, or "builtin".'})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub model."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Base weights: auto (bfloat16 on a GPU that has it, else float32), float32, bfloat16."},
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the base to 4 bits (extra: quantised)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the base to 8 bits (extra: quantised)."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})


@dataclass
class DataArguments:
    """Which pairs."""

    dataset: list[str] | None = field(
        default=None,
        metadata={"help": 'Files, hub ids or "builtin"; several may carry weights: a.jsonl=0.7 b.jsonl=0.3.'},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub dataset."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Held-out pairs; else see eval_fraction."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split of eval_dataset (default: test of builtin, dsp/... and hh-rlhf/..., else train)."},
    )
    eval_fraction: float = field(default=0.0, metadata={"help": "Share of prompts to hold out of the dataset."})
    columns: list[str] | None = field(
        default=None, metadata={"help": "Your column names: prompt=my_q chosen=good rejected=bad."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the dataset as it is needed (set max_steps)."})
    max_rows: int | None = field(default=None, metadata={"help": "Use the first rows only."})
    drop_bad_rows: bool = field(default=False, metadata={"help": "Leave out rows with errors instead of stopping."})


@dataclass
class AdapterArguments:
    """The LoRA."""

    lora_r: int = field(default=8, metadata={"help": "Rank."})
    lora_alpha: float = field(default=16, metadata={"help": "Scale, divided by the rank (or its root, rsLoRA)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers to adapt; default: all linear layers but head, routers and experts."},
    )
    first_adapted_layer: int = field(
        default=0,
        metadata={"help": "Adapt this layer and those above only (0: all): faster, smaller, less to learn with."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Rank-stabilised LoRA."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})

    def to_peft(self) -> LoraConfig:
        """PEFT's config of it.

        Raises:
            ConfigError: a value outside its range.
        """
        require_rules(
            self,
            ("lora_r", self.lora_r >= 1, "must be at least 1"),
            ("lora_alpha", 0 < self.lora_alpha < math.inf, "must be a number above 0"),
            ("first_adapted_layer", self.first_adapted_layer >= 0, "must be 0 or above"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "must lie in [0, 1)"),
        )
        names = self.lora_target_modules or []
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            # In a list PEFT takes the word for a layer's name.
            target_modules=ALL_LINEAR if names in ([], [ALL_LINEAR]) else names,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            task_type="CAUSAL_LM",
        )


@dataclass
class RunArguments:
    """Presets and the output folder."""

    preset: str = field(default="default", metadata={"help": f"Settings of the method: {', '.join(PRESETS)}."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the run that the output folder holds."})


@dataclass(frozen=True)
class Run:
    """Everything that describes one training run."""

    model: ModelArguments
    data: DataArguments
    adapter: AdapterArguments
    method: QAdapterConfig
    training: QAdapterTrainingArguments
    overwrite: bool = False


def check_settings(data: DataArguments, training: QAdapterTrainingArguments, method: QAdapterConfig) -> None:
    """Refuse settings with which nothing can be trained.

    Raises:
        ConfigError: a value outside its range, or a combination that cannot work.
    """
    if data.eval_dataset and data.eval_fraction:
        raise ConfigError("eval_dataset and eval_fraction exclude each other: choose one.")
    if data.eval_split and not data.eval_dataset:
        raise ConfigError(f"eval_split = {data.eval_split!r}: there is no eval_dataset of which it is a split.")
    if data.streaming and data.eval_fraction:
        raise ConfigError("eval_fraction cannot split a streamed dataset: give --eval-dataset.")
    if data.streaming and training.cache_base_states:
        raise ConfigError("cache_base_states needs a dataset of known length: leave --streaming out.")
    if data.streaming and method.retention:
        raise ConfigError("retention needs a dataset of known length: leave --streaming out.")
    if data.streaming and training.max_steps <= 0:
        raise ConfigError("the length of a streamed dataset is not known: give --max-steps.")
    best = training.metric_for_best_model
    require_rules(
        training,
        (
            "metric_for_best_model",
            best is None or best.removeprefix("eval_") in METRICS,
            f"choose one of {', '.join(METRICS)}",
        ),
        ("per_device_train_batch_size", training.per_device_train_batch_size >= 1, "must be at least 1"),
        ("per_device_eval_batch_size", training.per_device_eval_batch_size >= 1, "must be at least 1"),
        ("gradient_accumulation_steps", training.gradient_accumulation_steps >= 1, "must be at least 1"),
        ("learning_rate", 0 < training.learning_rate < math.inf, "must be a number above 0"),
        ("seed", 0 <= training.seed < 2**32, "must lie in [0, 2**32)"),
        ("num_train_epochs", training.max_steps > 0 or training.num_train_epochs > 0, "must be above 0"),
    )


def base_name(arguments: ModelArguments) -> str:
    """The name of the base model.

    Raises:
        ConfigError: a revision of a folder.
    """
    name = str(arguments.model)
    if arguments.revision and os.path.isdir(name):
        raise ConfigError(f"revision = {arguments.revision!r}: {name} is a folder, which has none. Leave it out.")
    return name


def model_options(arguments: ModelArguments) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the base model.

    Raises:
        ConfigError: an unknown dtype, float16, or quantisation that this machine cannot do.
    """
    if arguments.dtype == "float16":
        raise ConfigError("dtype = float16: training in it diverges. Use bfloat16 or float32.")
    if arguments.dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype = {arguments.dtype!r}: choose auto, float32 or bfloat16.")
    options: dict[str, Any] = {"dtype": pick_dtype(arguments.dtype)}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    if arguments.load_in_4bit or arguments.load_in_8bit:
        options["quantization_config"] = _quantisation(arguments, options["dtype"])
    return options


def _quantisation(arguments: ModelArguments, dtype: torch.dtype) -> Any:
    if arguments.load_in_4bit and arguments.load_in_8bit:
        raise ConfigError("load_in_4bit and load_in_8bit exclude each other: choose one.")
    require_bitsandbytes("the base is to be quantised", "leave --load-in-4bit/--load-in-8bit out")
    from transformers import BitsAndBytesConfig

    if arguments.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
