"""The command line: run a suite, list its cells, write the results page."""

import argparse
import sys
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from benchmarks.experiments.ablations import ABLATIONS
from benchmarks.experiments.cells import Cell
from benchmarks.experiments.suite import Suite
from benchmarks.experiments.suites import SUITES, make_suite, narrowed
from qadapter.errors import ConfigError, QAdapterError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
WORK = ROOT / "benchmarks" / "work"
DATA = ROOT.parent / "shared" / "data"


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__)
    commands = result.add_subparsers(dest="command", required=True)
    for name, text in (("run", "run the cells that are not finished"), ("list", "name the cells")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--suite", required=True, choices=SUITES)
        command.add_argument("--settings", nargs="+", default=[], help="only these settings")
        command.add_argument("--methods", nargs="+", default=[], help="only these methods")
        command.add_argument("--seeds", nargs="+", type=int, default=[], help="only these seeds")
        command.add_argument("--ablations", nargs="+", default=[], choices=ABLATIONS, help="these ablations")
        command.add_argument("--base", default=None, help="another base model: id, folder, builtin or tiny")
        command.add_argument("--dtype", default=None, choices=("float32", "bfloat16"), help="default: the fast one")
        command.add_argument(
            "--cells", nargs="+", default=[], metavar="PATTERN", help="cells of such names, in this order"
        )
        command.add_argument("--shard", default="0/1", help="I/N: only every Nth cell, from the Ith on (0 to N-1)")
        _folders(command)
    commands.choices["run"].add_argument("--keep-adapters", action="store_true", help="keep each adapter in --work")
    commands.choices["run"].add_argument("--threads", type=int, default=None, help="CPU threads (default 1)")
    commands.choices["run"].add_argument(
        "--workers", type=int, default=1, help="processes that share the cells and the device (default 1)"
    )
    commands.choices["run"].add_argument(
        "--minutes", type=float, default=None, help="start no cell that would end later; then stop (default: no limit)"
    )
    report = commands.add_parser("report", help="write the results page from the results files")
    report.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md")
    _folders(report)
    judge = commands.add_parser("judge", help="compare stored samples with the base's by a judge of the package")
    judge.add_argument("--judge", required=True, help="endpoint:URL#MODEL, reward:MODEL, ... as in qadapter eval")
    judge.add_argument("--suite", required=True, choices=SUITES)
    _folders(judge)
    return result


def _folders(command: argparse.ArgumentParser) -> None:
    command.add_argument("--results", type=Path, default=RESULTS, help="folder of results files, one a suite in it")
    command.add_argument("--work", type=Path, default=WORK, help="scratch folder: samples, caches, prepared bases")
    command.add_argument("--data", type=Path, default=DATA, help="folder with pairs/ and bench/")


def chosen_suite(arguments: argparse.Namespace) -> Suite:
    """The suite with what the command line leaves of it."""
    return narrowed(
        make_suite(arguments.suite), arguments.settings, arguments.methods, arguments.seeds, arguments.ablations,
        arguments.base, arguments.dtype,
    )  # fmt: skip


def named_cells(cells: list[Cell], patterns: list[str]) -> list[Cell]:
    """The cells whose names match a shell pattern, the first pattern's first; all of them where none is given.

    Raises:
        ConfigError: a pattern that no cell matches.
    """
    if not patterns:
        return cells
    matching = [[cell for cell in cells if fnmatchcase(cell.name, pattern)] for pattern in patterns]
    for pattern, found in zip(patterns, matching, strict=True):
        if not found:
            raise ConfigError(f"--cells {pattern!r} matches no cell of the suite: `list` names them.")
    return list({cell.key: cell for found in matching for cell in found}.values())


def sharded(cells: list[Cell], shard: str) -> list[Cell]:
    """The cells of a shard "I/N".

    Raises:
        ConfigError: it is no such shard.
    """
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--shard {shard!r}: give I/N with I from 0 to N - 1, as 0/2 and 1/2 for two machines.")
    return cells[int(index) :: int(count)]


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit code."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "report":
            from benchmarks.experiments.report import write_report

            write_report(arguments.results, arguments.output)
        elif arguments.command == "judge":
            from benchmarks.experiments.compare import judge_samples

            judge_samples(arguments.judge, arguments.results / arguments.suite, arguments.work)
        else:
            cells = sharded(named_cells(list(chosen_suite(arguments).cells()), arguments.cells), arguments.shard)
            if arguments.command == "list":
                print("\n".join(cell.name for cell in cells))
            else:
                return _run(arguments, cells)
    except QAdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace, cells: list) -> int:
    from benchmarks.experiments.cells import Store
    from benchmarks.experiments.provenance import set_up
    from benchmarks.experiments.runner import Runner
    from benchmarks.experiments.workers import run_in_workers

    store = Store(arguments.results / arguments.suite, arguments.work)
    make_runner = partial(Runner, store, arguments.data, arguments.keep_adapters)
    if arguments.workers > 1 or arguments.minutes is not None:
        return run_in_workers(cells, make_runner, arguments.workers, arguments.minutes, arguments.threads) > 0
    set_up(arguments.threads)
    make_runner().run(cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
