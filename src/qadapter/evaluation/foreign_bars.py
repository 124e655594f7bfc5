"""Progress bars that other libraries draw with tqdm, shown as ours."""

import io
import re
import time
from collections.abc import Callable

from qadapter.evaluation.progress import Advance, Track

# "Building contexts for arc_easy on rank 0...:  12%|█▏        | 12/100 [00:01<00:07, 12.0it/s]"
BAR = re.compile(r"(?P<title>[^\r\n]*?)\s*\d+%\|[^|]*\|\s*(?P<done>\d+)/(?P<total>\d+)\s")
# Bars that are done sooner are not worth a line.
SECONDS = 2.0


class ForeignBars(io.TextIOBase):
    """A stream in place of standard error: tqdm's bars that last come out through a `Track`, all other text is dropped.

    Args:
        title: before each bar's own.
    """

    def __init__(self, track: Track, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.track, self.title, self.clock = track, title, clock
        self.started: dict[tuple[str, int], float] = {}
        self.shown: dict[tuple[str, int], tuple[Advance, int]] = {}

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, text: str) -> int:
        """Take a piece of text: one state of a bar, or anything else."""
        for found in BAR.finditer(text):
            self._show(found["title"].strip(" .:"), int(found["done"]), int(found["total"]))
        return len(text)

    def _show(self, title: str, done: int, total: int) -> None:
        bar = (title, total)
        started = self.started.setdefault(bar, self.clock())
        if bar not in self.shown:
            if done >= total or self.clock() - started < SECONDS:
                return
            self.shown[bar] = self.track(f"{self.title}: {title}", total), 0
        advance, before = self.shown[bar]
        advance(done - before)
        self.shown[bar] = advance, done
