"""Several processes that share the cells of a suite, on one device, until none is left or the time is up.

Each process takes the first cell that nobody has taken, by creating a file that must not exist. What the cells of a
setting share (the base's answers, a base tuned first, a judge) is made by the process that comes first; until it is
there the others take cells of other settings. A process prefers settings whose data it has in memory.
"""

import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.cells import Cell
from benchmarks.experiments.provenance import set_up
from benchmarks.experiments.runner import Runner, clock, ensured, free_memory, quiet, setting_key
from qadapter.new_folders import whole_file

POLL_SECONDS = 0.2
# How far down the list a process looks, in cells a process: far enough for all to find settings of their own, and near
# enough for a stopped run to have done the first cells.
LOOK_AHEAD = 3
OUT_OF_MEMORY_SECONDS = 5.0
MARGIN = 1.15  # on the seconds that a cell is expected to take


@dataclass(frozen=True)
class Board:
    """The folder in which the processes of one run tell each other what is taken, prepared and done.

    Args:
        deadline: as of time.monotonic(), which all processes of a machine share; None for none.
    """

    folder: Path
    workers: int
    deadline: float | None

    def take(self, name: str) -> bool:
        """Whether this process is the first to take it."""
        path = self.folder / f"taken-{name}"
        try:
            with path.open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return False
        return True

    def taken(self, name: str) -> bool:
        """Whether any process has taken it."""
        return (self.folder / f"taken-{name}").exists()

    def mark(self, name: str, content: str = "") -> None:
        """Tell the others; the file appears whole."""
        with whole_file(self.folder / name) as scratch:
            scratch.write_text(content, encoding="utf-8")

    def marked(self, name: str) -> bool:
        """Whether any process has told so."""
        return (self.folder / name).exists()

    def release_dead(self, name: str) -> None:
        """Let another process take what a process has that has died."""
        path = self.folder / f"taken-{name}"
        try:
            os.kill(int(path.read_text() or os.getpid()), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass

    def in_time(self, methods: Iterable[str]) -> set[str]:
        """The methods of which a cell that starts now would end before the deadline, so far as is known.

        A cell takes the median of its method's cells so far, else of all cells.
        """
        if self.deadline is None:
            return set(methods)
        times = defaultdict(list)
        for path in self.folder.glob("done-*"):
            times[path.name.split("-", 2)[2]].append(float(path.read_text()))
        usual = statistics.median(value for own in times.values() for value in own) if times else 0.0
        left = self.deadline - time.monotonic()
        return {name for name in methods if MARGIN * statistics.median(times.get(name) or [usual]) < left}


def run_in_workers(
    cells: Sequence[Cell], make_runner: Callable[[], Runner], workers: int, minutes: float | None, threads: int | None
) -> int:
    """Run the cells that are not finished; how many failed. At the deadline what is under way is stopped and lost.

    Args:
        make_runner: picklable; called in each process.
    """
    runner = make_runner()
    todo = [cell for cell in cells if not runner.store.finished(cell)]
    runner.say(
        f"{len(cells)} cells, {len(cells) - len(todo)} finished before, {len(todo)} to run by {workers} processes"
    )
    start = time.monotonic()
    deadline = None if minutes is None else start + 60 * minutes
    with tempfile.TemporaryDirectory(dir=ensured(runner.store.work), prefix="board-") as folder:
        board = Board(Path(folder), workers, deadline)
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        started = [
            context.Process(target=work, args=(number, board, todo, make_runner, threads), daemon=True)
            for number in range(min(workers, len(todo)))
        ]
        with ended_with_this_process(started):
            for process in started:
                process.start()
            wait(started, deadline)
            late = [process for process in started if process.is_alive()]
        done, failed = (len(list(board.folder.glob(f"{word}-*"))) for word in ("done", "failed"))
        died = sum(process.exitcode != 0 for process in started if process not in late)
    runner.say(
        f"{done} cells done, {failed} failed, {len(todo) - done - failed} left, in {clock(time.monotonic() - start)}"
        + (f"; {died} processes died" if died else "")
        + (f"; {len(late)} were stopped at the deadline" if late else "")
    )
    return failed + died


def wait(processes: Sequence[Any], deadline: float | None) -> None:
    """Return when all processes have ended, or at the deadline."""
    # A list asks every process, not only up to the first one alive: what is not asked after its death stays a zombie,
    # which `Board.release_dead` takes for alive.
    while any([process.is_alive() for process in processes]):  # noqa: C419
        if deadline is not None and time.monotonic() >= deadline:
            return
        time.sleep(POLL_SECONDS)


@contextmanager
def ended_with_this_process(processes: Sequence[Any]) -> Iterator[None]:
    """On leaving, also by SIGTERM, none of the processes is left (SIGKILL they notice themselves, between cells)."""

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        signal.signal(signal.SIGTERM, before)


def work(number: int, board: Board, cells: Sequence[Cell], make_runner: Any, threads: int | None) -> None:
    """What one process does: take a cell, run it, tell; a cell that fails is told of and left."""
    runner = make_runner()
    runner.say = lambda line: print(f"{number:>2} {line}", flush=True)
    quiet()
    set_up(threads or 1)
    parent = multiprocessing.parent_process()
    while parent is None or parent.is_alive():
        cell = next_cell(board, cells, runner)
        if cell is None:
            return
        start = time.monotonic()
        try:
            result = patiently(runner.run_cell, cell)
        except Exception:  # told of and left: the other cells are worth having
            runner.say(f"FAILED {cell.name}\n{traceback.format_exc()}")
            board.mark(f"failed-{cell.key}")
            continue
        free_memory()
        seconds = time.monotonic() - start
        board.mark(f"done-{cell.key}-{cell.method}", str(seconds))
        runner.say(f"{cell.name}: {seconds:.0f} s ({runner.shown_seconds(result)}); {runner.shown_figures(result)}")


def patiently(run_cell: Callable[[Cell], Any], cell: Cell) -> Any:
    """The cell's result; where the others left too little of the device's memory, at the second try."""
    try:
        return run_cell(cell)
    except torch.OutOfMemoryError:
        pass  # the exception holds what is to be freed
    free_memory()
    time.sleep(random.uniform(0, OUT_OF_MEMORY_SECONDS))
    return run_cell(cell)


def next_cell(board: Board, cells: Sequence[Cell], runner: Runner) -> Cell | None:
    """The cell to run next, taken for this process; None where nothing is left that would end in time."""
    while True:
        methods = board.in_time({cell.method for cell in cells})
        left = [cell for cell in cells if cell.method in methods and not board.taken(cell.key)]
        if not left:
            return None
        near = left[: LOOK_AHEAD * board.workers]
        # A stable sort: the known settings first, otherwise in the order of the suite.
        for cell in sorted(near, key=lambda cell: not runner.knows(cell.setting)):
            prepared = f"prepared-{setting_key(cell.setting)}"
            if not board.marked(prepared):
                if not board.take(prepared):
                    board.release_dead(prepared)
                    continue  # another process is at it
                prepare(board, prepared, cell, cells, runner)
            if board.take(cell.key):
                return cell
        time.sleep(POLL_SECONDS)


def prepare(board: Board, mark: str, cell: Cell, cells: Sequence[Cell], runner: Runner) -> None:
    """Make what the setting's cells share, for all of their seeds; without it they make it themselves."""
    start = time.monotonic()
    try:
        for seed in dict.fromkeys(other.seed for other in cells if other.setting == cell.setting):
            runner.shared(Cell(cell.setting, cell.method, cell.options, seed))
    except Exception:  # the cells that need it will fail by themselves, each with its reason
        runner.say(f"FAILED to prepare {cell.setting.name}\n{traceback.format_exc()}")
    else:
        runner.say(f"{cell.setting.name} prepared in {time.monotonic() - start:.0f} s")
    board.mark(mark)
