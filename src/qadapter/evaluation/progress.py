"""Progress bars with counts and time left, on standard error so that a command's output stays clean."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Called with the number of items done since the last call.
Advance = Callable[[int], None]
# Opens a bar: (what is being done, number of items) to the function that advances it.
Track = Callable[[str, int], Advance]


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A progress bar with counts, time gone and time left."""
    columns = (
        TextColumn("{task.description}"),
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
    """A `Track` that shows a bar for each thing being done."""
    # The stream as it is now: the bars go on while a library's own output is kept from it.
    with progress_bar(Console(file=sys.stderr)) as progress:

        def track(name: str, total: int) -> Advance:
            task = progress.add_task(name, total=total)
            return lambda done: progress.advance(task, done)

        yield track


def silent(name: str, total: int) -> Advance:
    """A `Track` that shows nothing."""
    return lambda done: None
