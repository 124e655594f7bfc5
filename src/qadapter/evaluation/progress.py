"""Progress with counts and time left, on standard error so that a command's output stays clean.

Bars in a terminal; elsewhere (a log, a batch job) a line now and then.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_A_LINE, SECONDS_WORTH_A_LINE = 30.0, 5.0
# Called with the number of items done since the last call.
Advance = Callable[[int], None]
# Opens a bar: (what is being done, number of items) to the function that advances it.
Track = Callable[[str, int], Advance]


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A progress bar with counts, time gone and time left."""
    columns = (
        TextColumn("{task.description}", markup=False),  # names of folders and judges may hold brackets
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


@contextmanager
def tracked() -> Iterator[Track]:
    """A `Track` that shows a bar for each thing being done, or lines where nobody watches."""
    if not sys.stderr.isatty():
        yield lines(sys.stderr)
        return
    # The stream as it is now: the bars go on while a library's own output is kept from it.
    with progress_bar(Console(file=sys.stderr)) as progress:
        yield bars(progress)


def bars(progress: Progress) -> Track:
    """A `Track` that adds a bar to `progress` for each thing being done."""

    def track(name: str, total: int) -> Advance:
        task = progress.add_task(name, total=total)
        return lambda done: progress.advance(task, done)

    return track


def lines(stream: TextIO, clock: Callable[[], float] = time.monotonic) -> Track:
    """A `Track` that writes a line every half minute, and one at the end of what took more than five seconds."""

    def track(name: str, total: int) -> Advance:
        start = last = clock()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            now = clock()
            if done >= total:
                if count and now - start > SECONDS_WORTH_A_LINE:
                    print(
                        f"{name}: {done} of {total} in {timedelta(seconds=round(now - start))}", file=stream, flush=True
                    )
            elif now - last >= SECONDS_A_LINE and done:
                left = timedelta(seconds=round((now - start) / done * (total - done)))
                print(f"{name}: {done} of {total}, {left} left", file=stream, flush=True)
                last = now

        return advance

    return track


def silent(name: str, total: int) -> Advance:
    """A `Track` that shows nothing."""
    return lambda done: None
