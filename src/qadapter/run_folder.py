"""The output folder of a training run: another run in it is respected, and a refused run leaves nothing."""

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qadapter.errors import ConfigError
from qadapter.modeling.manifest import MANIFEST_NAME, own_adapters, read_json_object, read_manifest
from qadapter.new_folders import require_writable
from qadapter.training_arguments import QAdapterTrainingArguments
from qadapter.training_log import CURVE_NAME, LOG_NAME

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
ARGUMENTS_NAME = "training_arguments.json"
PAIRS = "pairs_sha256"  # an entry of it
# What decides which pairs a step trains on.
BATCHES = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed")
AUDIT_FILES = ("audit.json", "audit.html")
SWEEP_FILES = ("sweep.json", "sweep.html", "sweep.svg", "sweep.png", "sweep_benchmarks.svg", "sweep_benchmarks.png")
# What a run writes, and `overwrite` removes; anything else in the folder is the user's and stays.
RUN_FILES = (MANIFEST_NAME, LOG_NAME, CURVE_NAME, ARGUMENTS_NAME, *AUDIT_FILES, *SWEEP_FILES)
STATE_NAME = "trainer_state.json"  # of a checkpoint, as transformers calls it
CARD_NAME = "README.md"
OLD_CARD_NAME = "README.old.md"
# In a card with an audit's certificate; what it certifies is of the run that it lies beside.
CERTIFICATE = "<!-- qadapter audit: begin"
# With less free than this, an error while writing is taken to mean that the disk is full.
LEAST_FREE_BYTES = 2**20


def checkpoint_to_resume(training: QAdapterTrainingArguments, overwrite: bool) -> str | None:
    """The checkpoint to resume from, if any; changes nothing.

    Raises:
        ConfigError: the folder is a file or read-only, holds another run without `overwrite`, or has no checkpoint.
        AdapterFormatError: what is named is no checkpoint.
    """
    folder = Path(str(training.output_dir))
    require_writable(folder)
    found = run_parts(folder)  # refuses a link, of a run to resume, too
    resume = training.resume_from_checkpoint
    if resume:
        if str(resume).lower() in ("last", "true"):
            resume = last_checkpoint(folder)
        read_manifest(Path(str(resume)))
        if not (Path(str(resume)) / STATE_NAME).exists():
            raise ConfigError(
                f"{resume} is an adapter, no checkpoint ({STATE_NAME} is missing): "
                "give a checkpoint-* folder of its run."
            )
        # The Trainer's and FSDP's names, and DeepSpeed's.
        if not any(any(Path(str(resume)).glob(name)) for name in ("optimizer*", "global_step*")):
            logger.warning("%s has no optimizer state (save_only_model): the optimizer begins anew.", resume)
        _warn_of_other_batches(Path(str(resume)), training)
        return str(resume)
    if found and not overwrite:
        resumable = ", or pass --resume-from-checkpoint last to go on with it" if whole_checkpoints(folder) else ""
        raise ConfigError(
            f"output folder {folder} holds another run ({found[0].name}): choose another one{resumable}, or pass "
            "--overwrite to replace it."
        )
    return None


def _warn_of_other_batches(checkpoint: Path, training: QAdapterTrainingArguments) -> None:
    path = checkpoint / ARGUMENTS_NAME
    before = read_json_object(path) if path.exists() else {}
    now = {name: getattr(training, name) for name in BATCHES}
    other = [
        f"{name} = {before[name]} (now {now[name]})" for name in BATCHES if before.get(name, now[name]) != now[name]
    ]
    if other:
        logger.warning(
            "%s was trained with %s: the run goes on with other pairs than it would have.", checkpoint, ", ".join(other)
        )


def warn_of_other_pairs(checkpoint: Path, digest: str | None) -> None:
    """Warn where a checkpoint names other training pairs than those of `digest`; None for pairs that have none."""
    path = checkpoint / ARGUMENTS_NAME
    before = (read_json_object(path) if path.exists() else {}).get(PAIRS)
    if before is not None and digest is not None and before != digest:
        logger.warning(
            "%s was trained on other pairs, or on these in another order: the run goes on with those of this dataset "
            "from the step at which it stopped, as if it had seen the ones before.", checkpoint
        )  # fmt: skip


def run_parts(folder: Path) -> list[Path]:
    """What a run has left in its folder: files, checkpoints, adapters, and the folder that these lie in.

    The empty log of a run that failed is nothing.

    Raises:
        ConfigError: that folder is a link or a file.
    """
    files = [folder / name for name in RUN_FILES if name != LOG_NAME or has_bytes(folder / name)]
    checkpoints = sorted(path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name))
    card = folder / CARD_NAME
    certified = [card] if card.is_file() and CERTIFICATE.encode() in card.read_bytes() else []
    adapters = (*own_adapters(folder), folder / "adapters")
    return [path for path in (*files, *certified, *checkpoints, *adapters) if path.exists()]


def has_bytes(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def remove_run(folder: Path) -> None:
    """Remove what a run has left in its folder; anything else in it is the user's and stays."""
    for path in run_parts(folder):
        if path == folder / "adapters":
            with suppress(OSError):  # not empty: somebody's LoRAs are in it, too
                path.rmdir()
        elif path.is_dir():
            shutil.rmtree(path)
        elif path.name == CARD_NAME:  # what it certifies is gone, but it may hold the user's words, too
            path.replace(folder / OLD_CARD_NAME)
        else:
            path.unlink()


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of which adapter and trainer state were both written."""
    return [
        path
        for path in folder.glob("checkpoint-*")
        if CHECKPOINT.fullmatch(path.name) and (path / MANIFEST_NAME).exists() and (path / STATE_NAME).exists()
    ]


def last_checkpoint(folder: Path) -> str:
    """The newest whole checkpoint of a run."""
    whole = whole_checkpoints(folder)
    if not whole:
        raise ConfigError(f"{folder} has no checkpoint to resume from: leave --resume-from-checkpoint out.")
    return str(max(whole, key=lambda path: int(path.name.split("-")[1])))


class NothingLeft(Exception):
    """Ends the training of a resumed run that has all its steps; the message says so."""


class LastStep(TrainerCallback):
    """Keeps a resumed run from going on beyond its last step, as the Trainer would; nothing is written by then."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the step of the checkpoint, 0 where there is none.

        Raises:
            ConfigError: it is a later one than the run's last.
            NothingLeft: it is the last one.
        """
        step = state.global_step
        if step > state.max_steps:
            raise ConfigError(
                f"checkpoint-{step} is of step {step}, but this run ends at step {state.max_steps}: give a larger "
                "max_steps or num_train_epochs, or resume an earlier checkpoint."
            )
        if step and step == state.max_steps:
            raise NothingLeft(f"checkpoint-{step} is of the run's last step: nothing is left to train.")


class NewRun(TrainerCallback):
    """Makes room in the output folder as training begins, once: what can be refused has passed by then."""

    def __init__(self, overwrite: bool) -> None:
        self.overwrite = overwrite
        self._begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the run that the folder holds; one process of many does.

        Raises:
            ConfigError: it may not be replaced; it was not there when this run was started.
        """
        # With auto_find_batch_size training begins again: what the folder holds then is the run's own.
        if not args.should_save or self._begun:
            return
        self._begun = True
        folder = Path(args.output_dir)
        if (found := run_parts(folder)) and not self.overwrite:
            raise ConfigError(
                f"output folder {folder} holds another run ({found[0].name}), begun meanwhile: choose another one."
            )
        remove_run(folder)


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
