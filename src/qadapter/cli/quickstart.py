"""`qadapter quickstart`: customise a small model in minutes and read what it gained and cost."""

from pathlib import Path

from rich.console import Console

from qadapter.builtin import QUICKSTART_STEPS
from qadapter.cli import command_parser
from qadapter.errors import ConfigError


def run(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    parser = command_parser(
        "quickstart",
        "Train a Q-Adapter on the built-in model and pairs on the CPU, and report what it gained and cost.",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("quickstart"), help="where adapter and report go")
    parser.add_argument("--steps", type=int, default=QUICKSTART_STEPS, help="optimiser steps")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        raise ConfigError(f"--steps {options.steps}: must be at least 1.")

    from qadapter.cli.policies import quiet_datasets, quiet_libraries
    from qadapter.evaluation.report import print_report, write_report
    from qadapter.quickstart import run_quickstart

    console = Console()
    with quiet_libraries(), quiet_datasets():
        result = run_quickstart(options.output_dir, console, options.steps)
        write_report(result, options.output_dir)
        print_report(result, options.output_dir, console)
    return 0
