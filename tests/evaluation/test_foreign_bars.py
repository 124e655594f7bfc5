"""Other libraries' progress bars, shown as ours."""

import time

from tqdm import tqdm

from qadapter.evaluation.foreign_bars import SECONDS, ForeignBars


class Bars(dict):
    """A `Track` that keeps [total, done] of each bar."""

    def __call__(self, name, total):
        self[name] = [total, 0]
        return lambda done: self[name].__setitem__(1, self[name][1] + done)


def test_a_bar_that_lasts_is_shown_with_its_counts():
    bars, now = Bars(), [0.0]
    stream = ForeignBars(bars, "base", lambda: now[0])
    for item in tqdm(range(100), desc="Building contexts for t on rank 0...", file=stream, mininterval=0):
        now[0] = item * SECONDS / 50
    assert bars == {"base: Building contexts for t on rank 0": [100, 100]}


def test_short_bars_and_other_text_are_dropped():
    bars = Bars()
    stream = ForeignBars(bars, "base", lambda: 0.0)
    for _ in tqdm(range(50), desc="short", file=stream, mininterval=0):
        pass
    print("a warning: 50% of 3/4 |", file=stream)
    assert bars == {}


def test_the_clock_is_the_machines():
    assert ForeignBars(Bars(), "").clock is time.monotonic
