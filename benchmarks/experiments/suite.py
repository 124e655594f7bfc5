"""What a suite is: settings, methods with their knobs and seeds, and so its cells in order."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.experiments.ablations import ABLATIONS
from benchmarks.experiments.cells import Cell
from benchmarks.experiments.settings import Setting


@dataclass(frozen=True)
class Suite:
    """What is run and in which order: all methods of a seed before the next seed, so that a stopped run is balanced.

    Args:
        knobs: {method: its options, one dictionary a cell}.
        ablations: names in ABLATIONS, run on the first setting.
        purpose: one sentence for the results page.
        first: methods that run with all seeds, setting by setting in turn, before anything else.
        further_seeds: how many of the seeds the other methods run with; None for all.
    """

    settings: tuple[Setting, ...]
    knobs: dict[str, list[dict[str, Any]]]
    seeds: tuple[int, ...]
    purpose: str
    ablations: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    further_seeds: int | None = None

    def cells(self) -> Iterator[Cell]:
        """Each cell once."""
        seen = set()
        for cell in (*self._first(), *self._main(), *self._ablations()):
            if cell.key not in seen:
                seen.add(cell.key)
                yield cell

    def _first(self) -> Iterator[Cell]:
        knobs = {method: variants for method, variants in self.knobs.items() if method in self.first}
        for seed in self.seeds:
            for number in range(max(map(len, knobs.values()), default=0)):
                for setting in self.settings:
                    for method, variants in knobs.items():
                        if number < len(variants):
                            yield Cell.of(setting, method, variants[number], seed)

    def _main(self) -> Iterator[Cell]:
        knobs = {method: variants for method, variants in self.knobs.items() if method not in self.first}
        for seed in self.seeds[: self.further_seeds]:
            for setting in self.settings:
                for method, variants in knobs.items():
                    for options in variants:
                        yield Cell.of(setting, method, options, seed)

    def _ablations(self) -> Iterator[Cell]:
        for seed in self.seeds:
            for name in self.ablations:
                for method, options in ABLATIONS[name]:
                    yield Cell.of(self.settings[0], method, options, seed)
