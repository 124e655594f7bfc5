"""The quickstart: customise the built-in model to the built-in house style on a CPU, and report gain and cost."""

import gc
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.progress import Progress
from transformers import PrinterCallback, TrainerCallback, set_seed

from qadapter.builtin import QUICKSTART_STEPS
from qadapter.config import QAdapterConfig
from qadapter.data import load_preference_dataset
from qadapter.devices import cpu_dtype
from qadapter.evaluation.columns import BASE, Column
from qadapter.evaluation.drift import measure_texts
from qadapter.evaluation.drift_figures import drift_figures
from qadapter.evaluation.house_style import follows_house_style
from qadapter.evaluation.intervals import Interval, wilson
from qadapter.evaluation.preferences import paired, preference_figures
from qadapter.evaluation.progress import Advance, bars, lines, progress_bar
from qadapter.evaluation.report import REPORT_FILES, QuickstartResult
from qadapter.evaluation.texts import load_pairs, neutral_texts
from qadapter.evaluation.workload import BUILTIN
from qadapter.generation import Answer, Sampling, generate_texts
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.bases import BaseSource, load_tokenizer, resolve_base
from qadapter.modeling.builtin_model import BUILTIN_MODEL
from qadapter.run_folder import remove_run
from qadapter.trainer import QAdapterTrainer
from qadapter.training_arguments import QAdapterTrainingArguments
from qadapter.training_log import LogLines

# Found on SmolLM2-135M-Instruct and two CPU cores; benchmarks/LOG.md has the runs. A smaller beta than the package's
# default lets the style show after one short pass; they were found without a discount.
METHOD = QAdapterConfig.preset("undiscounted", beta=1.0)
# Nats; with it the policy leaves to the base what the pairs say nothing of (docs/dial.md, "A threshold").
THRESHOLD = 0.1
FIRST_ADAPTED_LAYER = 20  # of 30: a third of the second stream, and of the backward pass
LORA_RANK = 8
LEARNING_RATE = 1e-3
SEED = 0
PAIRS_A_STEP = 4
JUDGED_PROMPTS = 24
MAX_NEW_TOKENS = 80


class ProgressCallback(TrainerCallback):
    """Shows the trainer's steps on a rich progress bar."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.task = self.progress.add_task("Training", total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step more."""
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """The latest loss and accuracy beside the bar."""
        if logs and "loss" in logs and "rewards/accuracies" in logs:
            text = f"Training (loss {logs['loss']:.3f}, accuracy {logs['rewards/accuracies']:.2f})"
            self.progress.update(self.task, description=text)


def run_quickstart(
    folder: Path,
    console: Console,
    steps: int = QUICKSTART_STEPS,
    judged_prompts: int = JUDGED_PROMPTS,
    held_out_pairs: int | None = None,
) -> QuickstartResult:
    """Train, save, load again, measure; everything lies in `folder` afterwards (report files: `write_report`).

    Args:
        held_out_pairs: the first so many alone; None for all.
    """
    start = time.perf_counter()
    seconds: dict[str, float] = {}
    source = resolve_base(BUILTIN_MODEL)
    tokenizer = load_tokenizer(source)
    dtype = cpu_dtype()
    console.print(f"Base model: {source.name}" + (f" ({source.revision})" if source.revision else ""), markup=False)
    train_pairs, held_out = load_preference_dataset(BUILTIN), load_pairs(BUILTIN, tokenizer)
    held_out = replace(held_out, pairs=held_out.pairs[:held_out_pairs])
    seconds["prepare"] = time.perf_counter() - start
    with progress_bar(console) as progress:
        adapter = train_adapter(folder, source, tokenizer, train_pairs, dtype, steps, progress)
        seconds["train"] = time.perf_counter() - start - seconds["prepare"]
        gc.collect()  # the trainer and its model hang in reference cycles
        policy = QAdapterForCausalLM.from_pretrained(adapter, dtype=dtype)
        policy.min_kl = THRESHOLD
        track = bars(progress) if console.is_terminal else lines(sys.stderr)
        dials = Column("policy", min_kl=THRESHOLD), Column("plain")
        sides, neutral = held_out.texts, neutral_texts(tokenizer)
        pairs = paired(measure_texts(policy, sides, dials[:1], advance=track("Held-out pairs", len(sides))))
        drifts = measure_texts(policy, neutral, dials, advance=track("Neutral text", len(neutral)))
        prompts = [prompt.text for prompt in held_out.prompts][:judged_prompts]
        answers = {
            name: _answers(track(f"Answers of the {name}", len(prompts)), policy, tokenizer, prompts, strength)
            for name, strength in (("base", 0.0), ("policy", 1.0))
        }
    seconds["total"] = time.perf_counter() - start
    seconds["measure"] = seconds["total"] - seconds["train"] - seconds["prepare"]
    judged = {name: _judge(column) for name, column in answers.items()}
    settings = _settings(source, dtype, steps, len(held_out.pairs))
    preferences = preference_figures(pairs, {BASE: None, "policy": None})
    on_chosen, on_neutral = drift_figures([pair.chosen for pair in pairs]), drift_figures(drifts)
    return QuickstartResult(settings, preferences, on_chosen, on_neutral, judged, prompts, answers, seconds)


def train_adapter(
    folder: Path,
    source: BaseSource,
    tokenizer: Any,
    pairs: Dataset,
    dtype: torch.dtype,
    steps: int,
    progress: Progress,
) -> Path:
    """Train on `pairs` and write the adapter; its folder."""
    lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    set_seed(SEED)
    options: dict[str, Any] = {"revision": source.revision, "dtype": dtype}
    policy = QAdapterForCausalLM.from_base(
        source.name, METHOD, lora, first_adapted_layer=FIRST_ADAPTED_LAYER, **options
    )
    arguments = QAdapterTrainingArguments(
        output_dir=str(folder / "adapter"),
        seed=SEED,
        max_steps=steps,
        per_device_train_batch_size=PAIRS_A_STEP,
        learning_rate=LEARNING_RATE,
        warmup_steps=4,
        logging_steps=5,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
        dataloader_pin_memory=False,
    )
    remove_previous(folder)
    trainer = QAdapterTrainer(
        model=policy,
        args=arguments,
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # ours shows what it would print
    trainer.add_callback(ProgressCallback(progress) if progress.console.is_terminal else LogLines())
    trainer.train()
    trainer.save_model()
    return folder / "adapter"


def remove_previous(folder: Path) -> None:
    """Remove what an earlier quickstart has left, so that its report never stands beside another adapter."""
    for name in REPORT_FILES:
        (folder / name).unlink(missing_ok=True)
    remove_run(folder / "adapter")


def _answers(advance: Advance, policy: Any, tokenizer: Any, prompts: list[str], strength: float) -> list[Answer]:
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)
    return generate_texts(policy, tokenizer, prompts, sampling, strength, JUDGED_PROMPTS, progress=advance)


def _judge(answers: list[Answer]) -> Interval:
    return wilson(sum(follows_house_style(answer.text, answer.finished) for answer in answers), len(answers))


def _settings(source: BaseSource, dtype: torch.dtype, steps: int, held_out_pairs: int) -> dict[str, Any]:
    return {
        "base": source.name,
        "revision": source.revision,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "method": METHOD.to_dict(),
        "threshold": THRESHOLD,
        "lora": {"rank": LORA_RANK, "first_adapted_layer": FIRST_ADAPTED_LAYER},
        "learning_rate": LEARNING_RATE,
        "pairs_a_step": PAIRS_A_STEP,
        "steps": steps,
        "held_out_pairs": held_out_pairs,
        "versions": {name: version(name) for name in ("qadapter", "torch", "transformers", "peft")},
    }
