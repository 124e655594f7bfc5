"""`qadapter eval`: what an adapter gained and what it cost, in one table; and the options of all that measure."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from qadapter.cli import command_parser
from qadapter.cli.data import parse_columns
from qadapter.cli.policies import (
    DTYPES,
    add_decay_option,
    default_device,
    pick_dtype,
    quiet_datasets,
    quiet_libraries,
)
from qadapter.errors import ConfigError
from qadapter.evaluation.audit import POLICY
from qadapter.evaluation.columns import BASE, Column
from qadapter.evaluation.comparison import run_comparison
from qadapter.evaluation.part_store import PartStore, write_ordered_json
from qadapter.evaluation.progress import Track, tracked
from qadapter.evaluation.subjects import Subject, open_subject
from qadapter.evaluation.tables import headline, print_table
from qadapter.evaluation.workload import BUDGETS, Workload
from qadapter.new_folders import require_writable

# Options that a budget sets, unless they are given.
BUDGETED = ("max_pairs", "max_instructions", "prompts", "max_new_tokens", "limit")


def run(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    parser = command_parser("eval", "Measure what an adapter gained and what it cost, against its frozen base.")
    add_subject_options(parser)
    add_strength_options(parser)
    add_workload_options(parser)
    parser.add_argument("--output", type=Path, default=None, help="also write all figures to this JSON file")
    options = parser.parse_args(arguments)
    if options.output is not None:
        if options.output.is_dir():
            raise ConfigError(f"--output {options.output} is a folder: name a file in it.")
        require_writable(options.output.parent)
    column = column_of(options)
    workload, store = workload_of(options), store_of(options)
    with measuring() as track:
        results = run_comparison(
            [options.adapter], [[column]], partial(subject_of, options=options), workload, store, track
        )
    rows = headline(results["results"], [column.name])
    print_table(Console(), "What it gained and what it cost (95% intervals)", ("", BASE, column.name), rows)
    if options.output is not None:
        write_ordered_json(options.output, results)
        print(f"all figures: {options.output}")
    return 0


def add_subject_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Which adapters, and how to load them."""
    if several:
        parser.add_argument("adapters", nargs="+", help="adapter folders, hub ids, or plain PEFT LoRA folders")
    else:
        parser.add_argument("adapter", help="adapter folder, hub id, or plain PEFT LoRA folder")
    parser.add_argument("--base-model", default=None, help="base model instead of the one that the adapter names")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, else float32")
    parser.add_argument("--no-verify", action="store_true", help="load although base, template or adapter differ")


def add_strength_options(parser: argparse.ArgumentParser) -> None:
    """At which setting of the dial."""
    parser.add_argument("--strength", type=float, default=1.0, help="0 is the base, 1 the trained policy")
    add_dial_options(parser)


def add_dial_options(parser: argparse.ArgumentParser) -> None:
    """Settings of the dial besides the strength."""
    parser.add_argument(
        "--adapter-weights", nargs="+", action="extend", default=None, help="of a composition: NAME=WEIGHT ..."
    )
    parser.add_argument("--cap", type=float, default=None, help="cap on KL(policy || base) at each token, in nats")
    add_decay_option(parser)


def add_workload_options(parser: argparse.ArgumentParser, answers: bool = True) -> None:
    """What is measured on, and how much of it; without `answers`, for a command that generates none."""
    parser.add_argument("--dataset", default="builtin", help="held-out pairs: file, hub id, or builtin")
    parser.add_argument("--split", default=None, help="split of a hub dataset (default: test)")
    parser.add_argument(
        "--columns", nargs="*", action="extend", help="your column names: prompt=my_q chosen=good category=topic"
    )
    parser.add_argument(
        "--neutral-text", type=Path, default=None, help="text or JSONL with text and category (default: the package's)"
    )
    judges = "rule:house-style, rule:max-words=40, endpoint:URL#MODEL, ...; repeatable"
    # Without answers it is known only to be refused with what to use instead.
    parser.add_argument("--judge", action="append", default=[], help=judges if answers else argparse.SUPPRESS)
    parser.add_argument(
        "--tasks", nargs="*", action="extend", default=[], help="benchmarks of lm-eval, or YAML files of tasks"
    )
    parser.add_argument("--tasks-from", type=Path, default=None, help="folder of task YAMLs or benchmark JSONL files")
    parser.add_argument("--chat-template", action="store_true", help="put benchmark questions as a user's messages")
    parser.add_argument("--budget", choices=tuple(BUDGETS), default="standard", help="how much is measured")
    suppressed: dict[str, Any] = {"type": int, "default": argparse.SUPPRESS}
    parser.add_argument("--max-pairs", help="held-out pairs, instead of the budget's", **suppressed)
    if answers:
        parser.add_argument(
            "--instructions",
            type=Path,
            default=None,
            help="general prompts, one a line, or JSONL (default: the package's)",
        )
        parser.add_argument("--max-instructions", help="general instructions, instead of the budget's", **suppressed)
        parser.add_argument("--prompts", help="prompts that are judged, instead of the budget's", **suppressed)
        parser.add_argument("--max-new-tokens", help="longest answer, instead of the budget's", **suppressed)
    else:
        parser.set_defaults(instructions=None)
    parser.add_argument("--limit", help="items of each benchmark, instead of the budget's", **suppressed)
    parser.add_argument("--max-length", type=int, default=2048, help="longest text in tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of samples, resampling and benchmarks")
    parser.add_argument("--no-cache", action="store_true", help="measure again what an earlier run has stored")


def workload_of(options: argparse.Namespace) -> Workload:
    """The workload among a command's options."""
    amounts = {name: getattr(options, name, BUDGETS[options.budget][name]) for name in BUDGETED}
    return Workload(
        dataset=options.dataset,
        split=options.split,
        data_columns=parse_columns(options.columns) or {},
        neutral_text=options.neutral_text,
        instructions=options.instructions,
        judges=tuple(options.judge),
        tasks=tuple(options.tasks),
        tasks_from=options.tasks_from,
        chat_template=options.chat_template,
        max_length=options.max_length,
        seed=options.seed,
        **amounts,
    )


def store_of(options: argparse.Namespace) -> PartStore:
    """Where finished parts are kept."""
    return PartStore(reuse=not options.no_cache)


def column_of(options: argparse.Namespace) -> Column:
    """The column among a command's options."""
    return Column(POLICY, options.strength, weights_of(options), options.cap, options.decay)


def weights_of(options: argparse.Namespace) -> dict[str, float] | None:
    """{adapter: weight} among a command's options.

    Raises:
        ConfigError: an entry that is not NAME=NUMBER.
    """
    if options.adapter_weights is None:
        return None
    weights = {}
    for entry in options.adapter_weights:
        name, _, value = entry.partition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            raise ConfigError(f"--adapter-weights {entry!r}: write NAME=WEIGHT, such as concise=0.8.") from None
    return weights


def subject_of(path: str, options: argparse.Namespace) -> Subject:
    """The adapter at `path`, loaded as a command's options say."""
    dtype = pick_dtype(options.dtype)
    return open_subject(path, options.base_model, dtype, default_device(), verify=not options.no_verify)


@contextmanager
def measuring() -> Iterator[Track]:
    """Quiet libraries, and progress bars on standard error."""
    with quiet_libraries(), quiet_datasets(), tracked() as track:
        yield track
