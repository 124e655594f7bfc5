"""`qadapter sweep`: the whole trade-off curve of an adapter, and the strength that fits a budget."""

import argparse
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qadapter.cli import command_parser
from qadapter.cli.options import (
    add_confident_option,
    add_dial_options,
    add_subject_options,
    add_workload_options,
    dial_of,
)
from qadapter.errors import ConfigError
from qadapter.evaluation.gate import parse_drops
from qadapter.new_folders import require_writable
from qadapter.program import called_as

if TYPE_CHECKING:
    from qadapter.evaluation.columns import Column
    from qadapter.evaluation.sweep import SweepLimits


def run(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    parser = command_parser(
        "sweep", "Measure preference gain against drift at many strengths, at little more than the cost of one."
    )
    add_subject_options(parser)
    parser.add_argument("--strengths", default="0.1:2:20", help="such as 0.25,0.5,1, or FIRST:LAST:COUNT")
    parser.add_argument(
        "--alpha-0", type=float, nargs="*", action="extend", default=[], help="also with these weights of the base"
    )
    add_dial_options(parser)
    parser.add_argument("--max-kl", type=float, default=None, help="recommend a strength with at most this KL, in nats")
    parser.add_argument("--max-drop", action="append", default=[],
                        help="recommend one whose benchmarks fall by at most (TASK=)POINTS; repeatable")  # fmt: skip
    add_confident_option(parser)
    add_workload_options(parser, answers=False)
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=None,
        help="where sweep.json, .svg, .png and .html go (default: the adapter folder)",
    )
    options = parser.parse_args(arguments)
    if options.judge:
        raise ConfigError("a sweep generates no answers to judge: use `qadapter compare DIR --strengths ... --judge`.")

    from qadapter.cli.measuring import measuring, store_of, subject_of, workload_of
    from qadapter.evaluation.sweep import run_sweep
    from qadapter.evaluation.sweep_report import PNG_NAME, print_sweep, write_sweep

    columns, budget, workload = columns_of(options), budget_of(options), workload_of(options)
    budget.limits(workload.tasks)  # refuses what is out of range before any work
    folder = output_folder(options)
    with measuring() as track:
        subject = subject_of(options.adapter, options)
        sweep = run_sweep(subject, columns, workload, budget, store_of(options), track)
    written = write_sweep(sweep, folder)
    print_sweep(sweep, Console())
    print(f"written: {', '.join(map(str, written))}")
    if sweep["recommended"] and sweep["recommended"]["fits"]:
        print(f"next: {audit_command(arguments, options.adapter, sweep)}")
    if folder / PNG_NAME not in written:
        print(f"no {PNG_NAME}: it needs Pillow, pip install 'qadapter[eval]'")
    return 0


def audit_command(arguments: list[str], adapter: str, sweep: Mapping[str, Any]) -> str:
    """The command that measures the recommended strength and holds it to the same limits."""
    of_sweeps = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    of_sweeps.add_argument("--strengths")
    of_sweeps.add_argument("--alpha-0", nargs="*")
    of_sweeps.add_argument("--max-drop")  # audit takes all of them behind one
    _, shared = of_sweeps.parse_known_args(arguments)
    shared = [word for word in shared if word != "--"]
    shared.remove(adapter)  # it goes first: behind an option with several values it would be one of them
    if Path(adapter).is_dir() and not os.access(adapter, os.W_OK):
        shared.append("--no-card")
    drops = [f"{task}={points:g}" for task, points in sweep["budget"]["max_drop"].items()]
    limits = ["--max-drop", *drops] if drops else []
    words = [adapter, "--strength", f"{sweep['recommended']['strength']:g}", *shared, *limits]
    return f"{called_as()} audit {shlex.join(words)}"


def columns_of(options: argparse.Namespace) -> "list[Column]":
    """A column for each strength, and again for each alpha_0."""
    from qadapter.evaluation.columns import Column, parse_strengths

    strengths = parse_strengths(options.strengths)
    settings = dial_of(options)
    columns = [Column(f"{strength:g}", strength, **settings) for strength in strengths if strength != 0.0]
    for alpha_0 in dict.fromkeys(options.alpha_0):
        columns += [
            Column(f"{column.strength:g}, alpha_0 {alpha_0:g}", column.strength, alpha_0=alpha_0, **settings)
            for column in columns[: len(strengths)]
            if column.alpha_0 is None
        ]
    if not columns:
        raise ConfigError(f"--strengths {options.strengths!r} names the base only: add one that is not 0.")
    return columns


def budget_of(options: argparse.Namespace) -> "SweepLimits":
    """The budget among the options.

    Raises:
        ConfigError: a limit that is neither POINTS nor TASK=POINTS.
    """
    from qadapter.evaluation.sweep import SweepLimits

    plain = [entry for entry in options.max_drop if "=" not in entry]
    if len(plain) > 1:
        raise ConfigError(f"--max-drop: one number for all benchmarks, got {', '.join(plain)}.")
    try:
        points = float(plain[0]) if plain else None
    except ValueError:
        raise ConfigError(f"--max-drop {plain[0]!r}: write POINTS or TASK=POINTS, such as 1.0.") from None
    drops = parse_drops([entry for entry in options.max_drop if "=" in entry])
    return SweepLimits(options.max_kl, points, drops, options.confident)


def output_folder(options: argparse.Namespace) -> Path:
    """The folder given, else the adapter's own.

    Raises:
        ConfigError: none was given, and the adapter is no folder of this machine; it is a file or read-only.
    """
    folder = options.output_dir or Path(options.adapter)
    if options.output_dir is None and not folder.is_dir():
        raise ConfigError(
            f"{options.adapter} is not a folder here: correct the path, or, if it is a hub id, say with --output-dir "
            "where the results go."
        )
    require_writable(folder)
    return folder
