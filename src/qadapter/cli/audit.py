"""`qadapter audit`: evidence for an adapter, and a gate. Exit codes: 0 passes, 1 fails, 2 could not run."""

import os
import sys
from pathlib import Path

from rich.console import Console

from qadapter.cli import command_parser
from qadapter.cli.options import add_confident_option, add_strength_options, add_subject_options, add_workload_options
from qadapter.cli.sweep import output_folder
from qadapter.errors import ConfigError
from qadapter.evaluation.gate import EXIT_CODES, EXIT_COULD_NOT_RUN, Limits, parse_drops


def run(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    try:
        return _run(arguments)
    except Exception as error:
        # Exit code 1 says that the gate was reached and failed: nothing else may.
        error.exit_code = EXIT_COULD_NOT_RUN  # type: ignore[attr-defined]
        raise


def _run(arguments: list[str]) -> int:
    parser = command_parser(
        "audit",
        "Measure what an adapter gained and cost, hold it to limits, and write the evidence into its folder. "
        "Exit code 0: passes, 1: fails, 2: could not run.",
    )
    add_subject_options(parser)
    add_strength_options(parser)
    parser.add_argument("--max-kl", type=float, default=None, help="limit on KL(policy || base), in nats a token")
    parser.add_argument("--max-drop", nargs="+", action="extend", default=[],
                        help="TASK=POINTS ..., the percentage points by which benchmarks may fall")  # fmt: skip
    parser.add_argument("--min-accuracy", type=float, default=None, help="least share of held-out pairs ranked rightly")
    add_confident_option(parser)
    add_workload_options(parser)
    parser.add_argument(
        "--output-dir", type=Path, default=None, help="where audit.json and audit.html go (default: the adapter folder)"
    )
    parser.add_argument("--no-card", action="store_true", help="leave the adapter's README.md alone")
    options = parser.parse_args(arguments)

    from qadapter.cli.measuring import column_of, measuring, store_of, subject_of, workload_of
    from qadapter.evaluation.audit import run_audit
    from qadapter.evaluation.audit_report import HTML_NAME, JSON_NAME, print_audit, write_audit
    from qadapter.evaluation.benchmarks import require_lm_eval
    from qadapter.evaluation.card import CARD_NAME, check_card, update_card

    limits = Limits(options.max_kl, parse_drops(options.max_drop), options.min_accuracy, options.confident)
    if limits.max_drop:
        require_lm_eval()
    adapter = Path(options.adapter)
    has_card = adapter.is_dir() and not options.no_card
    if adapter.is_dir() and not os.access(adapter, os.W_OK):
        elsewhere = [
            *(["--output-dir DIR"] if options.output_dir is None else []),
            *(["--no-card"] if has_card else []),
        ]
        if elsewhere:
            raise ConfigError(
                f"{adapter} cannot be written to: give {' and '.join(elsewhere)}, "
                "so that results go elsewhere and its README.md is left alone."
            )
    column, workload, folder = column_of(options), workload_of(options), output_folder(options)
    if has_card:
        check_card(adapter)
    with measuring() as track:
        subject = subject_of(options.adapter, options)
        audit = run_audit(subject, column, workload, limits, store_of(options), track)
    write_audit(audit, folder)
    if has_card:
        update_card(adapter, audit, beside=folder.resolve() == adapter.resolve())
    written = [folder / JSON_NAME, folder / HTML_NAME, *([adapter / CARD_NAME] if has_card else [])]
    try:
        print_audit(audit, Console())
        print(f"written: {', '.join(map(str, written))}", flush=True)
    except (BrokenPipeError, SystemExit):  # the latter is rich's: nobody reads on, as in `| head`, the verdict stands
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_CODES[audit["verdict"]]
