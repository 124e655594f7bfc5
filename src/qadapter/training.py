"""A training run from files to an adapter folder: the run's own arguments, its folder, and stopping cleanly."""

import errno
import logging
import math
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback, set_seed

from qadapter.config import QAdapterConfig
from qadapter.data import load_preference_dataset, train_eval_split
from qadapter.data.columns import parse_columns
from qadapter.data.sources import SHORT_NAMES
from qadapter.devices import pick_dtype
from qadapter.errors import ConfigError
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.bases import load_tokenizer, resolve_base
from qadapter.modeling.manifest import MANIFEST_NAME
from qadapter.modeling.quantised import check_trainable_files
from qadapter.trainer import QAdapterTrainer
from qadapter.training_arguments import QAdapterTrainingArguments
from qadapter.training_batches import tokenised_pairs
from qadapter.training_log import CURVE_NAME, LOG_NAME

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What a run writes, and `overwrite` removes; anything else in the folder is the user's and stays.
RUN_FILES = (
    MANIFEST_NAME, LOG_NAME, CURVE_NAME, "training_arguments.json", "README.md", "audit.json", "audit.html",
    "sweep.json", "sweep.svg", "sweep.html",
)  # fmt: skip
# With less free than this, an error while writing is taken to mean that the disk is full.
LEAST_FREE_BYTES = 2**20


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
        metadata={"help": "Names of the layers to adapt; default: all linear layers but the head."},
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
        _require_rules(
            self,
            ("lora_r", self.lora_r >= 1, "must be at least 1"),
            ("lora_alpha", 0 < self.lora_alpha < math.inf, "must be a number above 0"),
            ("first_adapted_layer", self.first_adapted_layer >= 0, "must be 0 or above"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "must lie in [0, 1)"),
        )
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules or "all-linear",
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            task_type="CAUSAL_LM",
        )


@dataclass
class RunArguments:
    """Presets and the output folder."""

    preset: str = field(default="default", metadata={"help": "Settings of the method: default or authors."})
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


def _require_rules(settings: Any, *rules: tuple[str, bool, str]) -> None:
    """Raise ConfigError for the first (name, whether it holds, rule) that does not hold."""
    for name, holds, rule in rules:
        if not holds:
            raise ConfigError(f"{name} = {getattr(settings, name)!r}: {rule}.")


def check_settings(data: DataArguments, training: QAdapterTrainingArguments) -> None:
    """Refuse settings with which nothing can be trained.

    Raises:
        ConfigError: a value outside its range, or a combination that cannot work.
    """
    if data.eval_dataset and data.eval_fraction:
        raise ConfigError("eval_dataset and eval_fraction exclude each other: choose one.")
    if data.streaming and data.eval_fraction:
        raise ConfigError("eval_fraction cannot split a streamed dataset: give --eval-dataset.")
    if data.streaming and training.cache_base_states:
        raise ConfigError("cache_base_states needs a dataset of known length: leave --streaming out.")
    if data.streaming and training.max_steps <= 0:
        raise ConfigError("the length of a streamed dataset is not known: give --max-steps.")
    _require_rules(
        training,
        ("per_device_train_batch_size", training.per_device_train_batch_size >= 1, "must be at least 1"),
        ("per_device_eval_batch_size", training.per_device_eval_batch_size >= 1, "must be at least 1"),
        ("gradient_accumulation_steps", training.gradient_accumulation_steps >= 1, "must be at least 1"),
        ("learning_rate", 0 < training.learning_rate < math.inf, "must be a number above 0"),
        ("num_train_epochs", training.max_steps > 0 or training.num_train_epochs > 0, "must be above 0"),
    )


def checkpoint_to_resume(training: QAdapterTrainingArguments, overwrite: bool) -> str | None:
    """The checkpoint to resume from, if any; changes nothing.

    Raises:
        ConfigError: the folder is a file, holds another run and `overwrite` is false, or has no such checkpoint.
    """
    folder = Path(str(training.output_dir))
    if folder.is_file():
        raise ConfigError(f"output folder {folder} is a file: choose another.")
    resume = training.resume_from_checkpoint
    if resume:
        return last_checkpoint(folder) if str(resume).lower() in ("last", "true") else str(resume)
    found = run_parts(folder)
    if found and not overwrite:
        raise ConfigError(
            f"output folder {folder} holds another run ({found[0].name}): choose another one, "
            "or pass --resume-from-checkpoint last to go on with it, or --overwrite to replace it."
        )
    return None


def run_parts(folder: Path) -> list[Path]:
    """What a run has left in its folder: files, checkpoints, adapters."""
    files = [folder / name for name in RUN_FILES]
    checkpoints = sorted(path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name))
    return [path for path in (*files, *checkpoints, folder / "adapters") if path.exists()]


def remove_run(folder: Path) -> None:
    """Remove what a run has left in its folder; anything else in it is the user's and stays."""
    for path in run_parts(folder):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def last_checkpoint(folder: Path) -> str:
    """The newest whole checkpoint of a run: one whose adapter and trainer state were both written."""
    whole = [
        path
        for path in folder.glob("checkpoint-*")
        if CHECKPOINT.fullmatch(path.name)
        and (path / MANIFEST_NAME).exists()
        and (path / "trainer_state.json").exists()
    ]
    if not whole:
        raise ConfigError(f"{folder} has no checkpoint to resume from: leave --resume-from-checkpoint out.")
    return str(max(whole, key=lambda path: int(path.name.split("-")[1])))


def load_datasets(data: DataArguments, seed: int) -> tuple[Any, Any]:
    """Training pairs and held-out pairs (None if there are none)."""
    sources: Any = data.dataset[0] if data.dataset and len(data.dataset) == 1 else data.dataset
    options: dict[str, Any] = {
        "columns": parse_columns(data.columns),
        "on_error": "drop" if data.drop_bad_rows else "raise",
    }
    train = load_preference_dataset(
        sources,
        split=data.dataset_split,
        streaming=data.streaming,
        max_rows=data.max_rows,
        seed=seed,
        **options,
    )
    if data.eval_dataset:
        split = "test" if data.eval_dataset in ("builtin", *SHORT_NAMES) else "train"
        return train, load_preference_dataset(data.eval_dataset, split=split, **options)
    if data.eval_fraction:
        return train_eval_split(train, eval_fraction=data.eval_fraction, seed=seed)
    return train, None


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
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a broken binary raises many types
        raise ConfigError(
            f"quantised bases need bitsandbytes, which cannot be used here ({type(error).__name__}): "
            "pip install 'qadapter[quantised]', or leave --load-in-4bit/--load-in-8bit out."
        ) from error
    from transformers import BitsAndBytesConfig

    if arguments.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


class StopOnInterrupt(TrainerCallback):
    """As a context: the first Ctrl-C ends the step, saves a checkpoint and stops; the second stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def __enter__(self) -> "StopOnInterrupt":
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop once the running step is done."""
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Likewise where the running step ends with an evaluation."""
        self.on_step_end(args, state, control)


class NewRun(TrainerCallback):
    """Makes room in the output folder as training begins: what can be refused has passed by then."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the run that the folder holds; one process of many does."""
        if args.should_save:
            remove_run(Path(args.output_dir))


@contextmanager
def nothing_left_of_refusals(folder: Path) -> Iterator[None]:
    """Within the context, an error removes `folder` and those above that were not there before, where still empty.

    The Trainer makes its folder before it, its optimizer and the checkpoint have been checked.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # one that holds something
            for path in new:
                path.rmdir()
        raise


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Within the context, errors on a full disk say so: torch's own writer raises anything but that."""
    try:
        yield
    except Exception as error:
        if folder.exists() and shutil.disk_usage(folder).free < LEAST_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


def base_name(arguments: ModelArguments) -> str:
    """The name by which the adapter remembers its base: for a folder its absolute path, which holds everywhere.

    Raises:
        ConfigError: a path that leads to no folder, or a revision of a folder.
    """
    name = str(arguments.model)
    if os.path.isfile(name) or (not os.path.isdir(name) and (name.count("/") > 1 or name.startswith((".", "/", "~")))):
        raise ConfigError(
            f"base model {name!r}: there is no such folder. "
            "Give a folder with config.json and safetensors, a hub id, or builtin."
        )
    if name == "builtin" or not os.path.isdir(name):
        return name
    if arguments.revision:
        raise ConfigError(f"revision = {arguments.revision!r}: {name} is a folder, which has none. Leave it out.")
    return os.path.abspath(name)


def train(run: Run, callbacks: list[TrainerCallback] | None = None) -> QAdapterTrainer:
    """Run it; the trainer, with the adapter folder written.

    Raises:
        KeyboardInterrupt: stopped by the user; a checkpoint is saved, the adapter folder is not.
    """
    # What is cheap to check comes first.
    checkpoint = checkpoint_to_resume(run.training, run.overwrite)
    check_settings(run.data, run.training)
    name, options, lora = base_name(run.model), model_options(run.model), run.adapter.to_peft()
    source = resolve_base(name, run.model.revision)
    check_trainable_files(source)
    train_set, eval_set = load_datasets(run.data, run.training.seed)
    tokenizer = load_tokenizer(source)
    # Tokenised before the model is loaded: bad data should be known within seconds.
    train_set = tokenised("training pairs", train_set, tokenizer, run.training)
    eval_set = tokenised("held-out pairs", eval_set, tokenizer, run.training)
    set_seed(run.training.seed)  # the trainer seeds too, but the adapter's first weights are drawn here
    options |= {"first_adapted_layer": run.adapter.first_adapted_layer, "revision": run.model.revision}
    model = QAdapterForCausalLM.from_base(name, run.method, lora, **options)
    folder = Path(str(run.training.output_dir))
    makes_room = [] if checkpoint else [NewRun()]
    with StopOnInterrupt() as interrupt, nothing_left_of_refusals(folder), full_disk_named(folder):
        trainer = QAdapterTrainer(
            model=model,
            args=run.training,
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=tokenizer,
            callbacks=[interrupt, *makes_room, *(callbacks or [])],
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        if interrupt.interrupted and trainer.state.global_step < trainer.state.max_steps:
            raise KeyboardInterrupt(
                f"interrupted after step {trainer.state.global_step} of {trainer.state.max_steps}; a checkpoint is "
                "saved: go on with the same command and --resume-from-checkpoint last."
            )
        trainer.save_model()
    return trainer


def tokenised(name: str, dataset: Any, tokenizer: Any, training: QAdapterTrainingArguments) -> Any:
    """The tokenised dataset (None if there is none); warns of what was dropped or cut."""
    if dataset is None:
        return None
    dataset, report = tokenised_pairs(dataset, tokenizer, training)
    if report.dropped or report.truncated_prompts:
        logger.warning("%s: %s", name, report.summary())
    return dataset
