"""`qadapter compare`: adapters and plain LoRAs of one base, at several strengths, as columns of one table."""

from functools import partial
from pathlib import Path

from rich.console import Console

from qadapter.cli import command_parser
from qadapter.cli.options import add_dial_options, add_subject_options, add_workload_options, dial_of
from qadapter.errors import ConfigError
from qadapter.new_folders import require_writable


def run(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    parser = command_parser("compare", "Measure adapters and plain LoRAs of one base side by side.")
    add_subject_options(parser, several=True)
    parser.add_argument("--strengths", default="1", help="such as 0.25,0.5,1, or FIRST:LAST:COUNT")
    add_dial_options(parser)
    add_workload_options(parser)
    parser.add_argument("--output-dir", type=Path, default=None, help="also write compare.json and compare.html there")
    options = parser.parse_args(arguments)

    from qadapter.cli.measuring import measuring, store_of, subject_of, workload_of
    from qadapter.evaluation.columns import parse_strengths, strength_columns, unique_names
    from qadapter.evaluation.comparison import run_comparison
    from qadapter.evaluation.comparison_report import print_comparison, write_comparison

    strengths = parse_strengths(options.strengths)
    if strengths == [0.0]:
        raise ConfigError(f"--strengths {options.strengths!r} names the base only: add one that is not 0.")
    if options.output_dir is not None:
        require_writable(options.output_dir)
    settings = dial_of(options)
    columns = [strength_columns(name, strengths, **settings) for name in unique_names(options.adapters)]
    with measuring() as track:
        comparison = run_comparison(
            options.adapters,
            columns,
            partial(subject_of, options=options),
            workload_of(options),
            store_of(options),
            track,
        )
    if options.output_dir is not None:  # before it prints: whoever reads may have left
        write_comparison(comparison, options.output_dir)
    print_comparison(comparison, Console())
    if options.output_dir is not None:
        print(f"written to {options.output_dir}")
    return 0
