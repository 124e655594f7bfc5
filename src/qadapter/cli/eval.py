"""`qadapter eval`: what an adapter gained and what it cost, in one table."""

from functools import partial
from pathlib import Path

from rich.console import Console

from qadapter.cli import command_parser
from qadapter.cli.options import add_strength_options, add_subject_options, add_workload_options
from qadapter.errors import ConfigError
from qadapter.new_folders import require_writable


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

    from qadapter.cli.measuring import column_of, measuring, store_of, subject_of, workload_of
    from qadapter.evaluation.card import missing_lines
    from qadapter.evaluation.columns import BASE
    from qadapter.evaluation.comparison import run_comparison
    from qadapter.evaluation.tables import headline, print_lines, print_table
    from qadapter.new_folders import write_ordered_json

    column = column_of(options)
    workload, store = workload_of(options), store_of(options)
    with measuring() as track:
        results = run_comparison(
            [options.adapter], [[column]], partial(subject_of, options=options), workload, store, track
        )
    if options.output is not None:  # before it prints: whoever reads may have left
        write_ordered_json(options.output, results)
    rows, console = headline(results["results"], [column.name]), Console()
    print_table(console, "What it gained and what it cost (95% intervals)", ("", BASE, column.name), rows)
    print_lines(console, missing_lines(results["results"]["judged"]))
    if options.output is not None:
        print(f"all figures: {options.output}")
    return 0
