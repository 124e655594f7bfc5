"""What `qadapter train --help` shows: our options by subject, the trainer's usual ones, and the others by name."""

import argparse
import textwrap
from collections.abc import Iterable, Mapping

from qadapter.cli import DefaultsFormatter
from qadapter.training_arguments import UNFIT

USAGE = (
    "%(prog)s --model MODEL --dataset DATASET [DATASET ...] --output-dir DIR [options]\n"
    "       %(prog)s --config FILE [options]"
)
OTHERS = "others of transformers' TrainingArguments (https://huggingface.co/docs/transformers/main_classes/trainer)"
# Of transformers' arguments those that most runs look at; output_dir stands with the run.
USUAL = [
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim"),
    *("bf16", "activation_checkpointing", "torch_compile", "use_cpu", "seed"),
    *("logging_steps", "report_to"),
    *("eval_strategy", "eval_steps", "per_device_eval_batch_size"),
    *("save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end", "metric_for_best_model"),
    *("resume_from_checkpoint", "push_to_hub", "hub_model_id"),
]
# Arguments of transformers that are no options here: one is refused, one is every command's --debug.
TAKEN = ("fp16", "debug")
# Where transformers' text does not fit.
TEXTS = {
    "output_dir": "Folder for the adapter and its checkpoints.",
    "max_steps": "Optimiser steps, instead of epochs; needed with --streaming.",
    "eval_strategy": "When to evaluate; by default epoch where pairs are held out, steps with --eval-steps.",
    "eval_steps": "Steps between evaluations, below 1 a share of all; by default those of --logging-steps.",
    "load_best_model_at_end": "End with the best checkpoint's adapter; needs held-out pairs.",
    "resume_from_checkpoint": "Go on with the same command: last, or a checkpoint's folder.",
    "metric_for_best_model": "Of the evaluation, such as qadapter/kl; default: the loss.",
}
# Where the last word of the option is no word for its value.
VALUES = {"report_to": "NAME", "metric_for_best_model": "NAME", "resume_from_checkpoint": "CHECKPOINT", "optim": "NAME"}


class TrainFormatter(DefaultsFormatter):
    """Each option once, with dashes; switches without a value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if "by default" in (action.help or "") else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.dest == "help":
            return super()._format_action_invocation(action)
        option = dashed(action.dest)
        if action.nargs == "?":
            return f"{option}, {dashed('no_' + action.dest)}" if action.default is True else option
        value = _value(action)
        return f"{option} {value} [{value} ...]" if action.nargs == "+" else f"{option} {value}"


def dashed(name: str) -> str:
    """The option that sets an argument."""
    return f"--{name.replace('_', '-')}"


def _value(action: argparse.Action) -> str:
    """A word for the option's value."""
    choices = "{" + ",".join(map(str, action.choices or ())) + "}"
    if action.choices is not None and len(choices) < 30:
        return choices
    numbers: dict[object, str] = {int: "N", float: "X"}
    last_word = action.dest.rpartition("_")[2].upper()
    return VALUES.get(action.dest) or numbers.get(action.type) or ("NAME" if action.choices else last_word)


def help_text(
    parser: argparse.ArgumentParser, own: Mapping[str, Iterable[str]], known: Mapping[str, argparse.Action]
) -> str:
    """The whole help.

    Args:
        parser: whose usage and description it is.
        own: names of our arguments by their section's title.
        known: the parser's options by name.
    """
    formatter = parser._get_formatter()
    formatter.add_usage(parser.usage, parser._actions, [])
    formatter.add_text(parser.description)
    named = {name for names in own.values() for name in names}
    usual = [name for name in USUAL if name in known and name not in named]
    for title, names in {**own, "training, of transformers": usual}.items():
        formatter.start_section(title)
        formatter.add_arguments([known[name] for name in names])
        formatter.end_section()
    others = [dashed(name) for name in known if name not in {*named, *usual, *UNFIT, *TAKEN}]
    listed = textwrap.fill(" ".join(others), width=max(formatter._width - 2, 11), break_on_hyphens=False)
    return f"{formatter.format_help()}\n{OTHERS}:\n{textwrap.indent(listed, '  ')}\n"
