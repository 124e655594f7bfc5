"""A training run from files to an adapter folder, which Ctrl-C stops cleanly."""

import logging
import signal
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from qadapter.data import load_preference_dataset, train_eval_split
from qadapter.data.base_limits import require_fit
from qadapter.data.columns import parse_columns
from qadapter.data.mixtures import split_weight
from qadapter.data.rows import RowError
from qadapter.data.sources import SHORT_NAMES
from qadapter.data.splits import pairs_of_trained_prompts
from qadapter.errors import DataError
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.bases import load_config, load_tokenizer, resolve_base
from qadapter.modeling.quantised import check_trainable_files
from qadapter.run_folder import (
    NewRun,
    checkpoint_to_resume,
    full_disk_named,
    nothing_left_of_refusals,
)
from qadapter.run_settings import DataArguments, Run, base_name, check_settings, model_options
from qadapter.trainer import QAdapterTrainer
from qadapter.training_arguments import QAdapterTrainingArguments
from qadapter.training_batches import tokenised_pairs
from qadapter.training_log import LogBar, LogLines

logger = logging.getLogger(__name__)


def load_datasets(data: DataArguments, seed: int) -> tuple[Any, Any]:
    """Training pairs and held-out pairs (None if there are none)."""
    sources: Any = data.dataset or []
    # Of a source by itself no more than max_rows rows are read, of a list all; a weight is a list's alone.
    if len(sources) == 1 and split_weight(sources[0])[1] is None:
        sources = sources[0]
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
        split = data.eval_split or ("test" if data.eval_dataset in ("builtin", *SHORT_NAMES) else "train")
        held_out = load_preference_dataset(data.eval_dataset, split=split, **options)
        if not data.streaming and (trained := pairs_of_trained_prompts(train, held_out)):
            logger.warning(
                "%d of %d held-out pairs have a prompt that is trained on, so their figures are too good: leave "
                "such pairs out of one of the two, or give --eval-fraction, which splits by prompt.",
                trained,
                len(held_out),
            )
        return train, held_out
    if data.eval_fraction:
        return train_eval_split(train, eval_fraction=data.eval_fraction, seed=seed)
    return train, None


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


def train(run: Run, callbacks: list[TrainerCallback] | None = None) -> QAdapterTrainer:
    """Run it; the trainer, with the adapter folder written.

    Raises:
        KeyboardInterrupt: stopped by the user; a checkpoint is saved, the adapter folder is not.
    """
    # What is cheap to check comes first.
    checkpoint = checkpoint_to_resume(run.training, run.overwrite)
    check_settings(run.data, run.training, run.method)
    name, options, lora = base_name(run.model), model_options(run.model), run.adapter.to_peft()
    source = resolve_base(name, run.model.revision)
    check_trainable_files(source)
    try:
        train_set, eval_set = load_datasets(run.data, run.training.seed)
    except RowError as error:
        ways = "`qadapter data check` lists all rows with errors, --drop-bad-rows leaves them out"
        raise DataError(f"{error}. {ways}.") from error
    tokenizer = load_tokenizer(source)
    # Tokenised before the model is loaded: bad data should be known within seconds.
    config = load_config(source)
    train_set = tokenised("training pairs", train_set, tokenizer, run.training, config)
    eval_set = tokenised("held-out pairs", eval_set, tokenizer, run.training, config)
    set_seed(run.training.seed)  # the trainer seeds too, but the adapter's first weights are drawn here
    options |= {"first_adapted_layer": run.adapter.first_adapted_layer, "revision": run.model.revision}
    model = QAdapterForCausalLM.from_base(name, run.method, lora, **options)
    folder = Path(str(run.training.output_dir))
    begins = [] if checkpoint else [NewRun(run.overwrite)]
    with StopOnInterrupt() as interrupt, nothing_left_of_refusals(folder), full_disk_named(folder):
        trainer = QAdapterTrainer(
            model=model,
            args=run.training,
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=tokenizer,
            callbacks=[interrupt, *begins, *(callbacks or [])],
        )
        for theirs in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(theirs)
        bar = None if run.training.disable_tqdm else LogBar()
        trainer.add_callback(bar or LogLines())
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            if bar is not None:
                bar.close()
        if interrupt.interrupted and trainer.state.global_step < trainer.state.max_steps:
            raise KeyboardInterrupt(
                f"interrupted after step {trainer.state.global_step} of {trainer.state.max_steps}; a checkpoint is "
                "saved: go on with the same command and --resume-from-checkpoint last."
            )
        trainer.save_model()  # also of a run that had all its steps: it may have ended before
    return trainer


def tokenised(name: str, dataset: Any, tokenizer: Any, training: QAdapterTrainingArguments, config: Any) -> Any:
    """The tokenised dataset (None if there is none); warns of what was dropped or cut, refuses what cannot be run."""
    if dataset is None:
        return None
    dataset = tokenised_pairs(name, dataset, tokenizer, training)
    if config is not None:
        require_fit(dataset, config)
    return dataset
