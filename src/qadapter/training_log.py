"""What a run says while it trains, and what it leaves behind: a line of JSON a log entry, the training curve as SVG."""

import json
import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from qadapter.plots import line_chart

LOG_NAME = "training_log.jsonl"
CURVE_NAME = "training_curve.svg"
CURVES = ("loss", "rewards/accuracies", "qadapter/kl")
# What a line says of an entry: its metric, what it is called there, and its format. The file has all metrics.
SAID = (
    ("loss", "loss", ".4f"), ("rewards/accuracies", "accuracy", ".0%"), ("rewards/margins", "margin", ".3f"),
    ("qadapter/kl", "KL", ".4f"), ("qadapter/retained_kl", "KL on texts", ".4f"),
    ("learning_rate", "learning rate", ".1e"),
)  # fmt: skip


class TrainingLogCallback(TrainerCallback):
    """Appends to training_log.jsonl in the output folder and redraws training_curve.svg when training ends."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run keeps the entries before its checkpoint; a new one starts the file anew."""
        if state.is_world_process_zero:
            path = Path(args.output_dir) / LOG_NAME
            path.parent.mkdir(parents=True, exist_ok=True)
            entries = [entry for entry in read_log(path) if entry["step"] <= state.global_step > 0]
            path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append one entry."""
        if state.is_world_process_zero and logs:
            numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
            entry = {
                "step": state.global_step,
                **{k: v if math.isfinite(v) else None for k, v in numbers.items()},
            }
            path = Path(args.output_dir) / LOG_NAME
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the curve."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            (folder / CURVE_NAME).write_text(training_curve(read_log(folder / LOG_NAME)))


class LogBar(ProgressCallback):
    """The trainer's progress bar, with a line an entry in place of its dictionary."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run's bar begins where the run does, or its rate would count the steps before."""
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if self.training_bar is not None:
            self.training_bar.initial = self.training_bar.n = self.training_bar.last_print_n = state.global_step
            self.training_bar.refresh()

    def close(self) -> None:
        """End the lines of bars that an error has left open."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the line above the bar."""
        if state.is_world_process_zero and self.training_bar is not None:
            for line in log_lines(logs or {}, state):
                self.training_bar.write(line)


class LogLines(PrinterCallback):
    """A line an entry, with the time left, where nobody watches a bar."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.begin = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run's first step is a later one."""
        self.begin = (state.global_step, self.clock())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print the line."""
        if state.is_local_process_zero:
            step, start = self.begin
            done, left = state.global_step - step, state.max_steps - state.global_step
            seconds = (self.clock() - start) / done * left if done else 0
            ended = "train_runtime" in (logs or {})  # perhaps before its last step
            for line in log_lines(logs or {}, state):
                told = f"{line}; {timedelta(seconds=round(seconds))} left" if seconds and not ended else line
                print(told, flush=True)


def log_lines(logs: dict[str, Any], state: Any) -> list[str]:
    """What an entry of the log says to a reader: of training, of each set of held-out pairs, of the whole run."""
    lines = []
    for key in logs:
        if key == "loss" or (key.startswith("eval_") and key.endswith("_loss")):
            prefix = key[: -len("loss")]
            values = [f"{said} {logs[prefix + name]:{form}}" for name, said, form in SAID if prefix + name in logs]
            held_out = " ".join(("held out", prefix[len("eval_") : -1])).strip()
            lines.append(
                f"step {state.global_step} of {state.max_steps}{', ' + held_out if prefix else ''}: {', '.join(values)}"
            )
    if "train_runtime" in logs:
        pairs = f", {logs['train_samples_per_second']:.2g} pairs a second" if "train_samples_per_second" in logs else ""
        lines.append(f"trained to step {state.global_step} in {timedelta(seconds=round(logs['train_runtime']))}{pairs}")
    return lines


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a training log, none if there is no file; a last line that a crash cut short is left out."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def training_curve(entries: list[dict[str, Any]]) -> str:
    """Loss, accuracy and KL over the steps as one SVG; held-out values where there are any."""
    series = {}
    for name in CURVES:
        for prefix, label in (("", name), ("eval_", f"{name} (held out)")):
            points = [(e["step"], e[prefix + name]) for e in entries if e.get(prefix + name) is not None]
            if points:
                series[label] = points
    return line_chart(series, "Training curve", "optimiser step")
