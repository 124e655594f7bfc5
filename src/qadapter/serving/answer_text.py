"""From tokens to text that may be sent: whole characters, nothing of a stop string, log-probabilities beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qadapter.detokenising import Detokeniser, Reading
from qadapter.serving.sampling import Chosen


class StopStrings:
    """Lets text pass up to the first stop string, holding back what may yet become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that may pass now, and whether a stop string was met."""
        text = self._held + piece
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self._held = ""
            return text[: min(places)], True
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        held = next((size for size in range(min(longest, len(text)), 0, -1) if self._may_stop(text[-size:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """What was held back, when no more text follows."""
        held, self._held = self._held, ""
        return held

    def _may_stop(self, ending: str) -> bool:
        return any(stop.startswith(ending) for stop in self._stops)


class TokenReport(NamedTuple):
    """A token of the answer, its log-probability, the likeliest alternatives, and where its text begins.

    The first token of an echoed prompt has no log-probability.
    """

    reading: Reading
    logprob: float | None
    top: tuple[tuple[Reading, float], ...]
    offset: int


@dataclass
class AnswerText:
    """The text of one answer, as far as it may be sent.

    Args:
        detokeniser: of this answer.
        stops: of this answer.
    """

    detokeniser: Detokeniser
    stops: StopStrings

    def __post_init__(self) -> None:
        self._decoded = 0  # characters so far, those of stop strings included
        self._passed = 0  # characters that may be sent
        self._ready = ""
        self._reports: list[TokenReport] = []

    def add(self, chosen: Chosen) -> bool:
        """Take a token in; whether it completed a stop string, which ends the answer."""
        return self._extend(self._read(chosen, chosen.logprob is not None))

    def echo(self, chosen: Chosen, reported: bool) -> None:
        """Take a token of the prompt in, which stands before the answer and may hold stop strings."""
        piece = self._read(chosen, reported)
        self._decoded += len(piece)
        self._pass(piece)

    def _read(self, chosen: Chosen, reported: bool) -> str:
        """The text that a token completes; the token is reported if wanted."""
        reading = self.detokeniser.reading(chosen.token) if reported else None
        top = tuple((self.detokeniser.reading(token), logprob) for token, logprob in chosen.top)
        piece = self.detokeniser.push(chosen.token)
        if reading is not None:
            # Before the token's own text, the piece has what waited for it.
            offset = self._decoded + max(0, len(piece) - len(reading.text))
            self._reports.append(TokenReport(reading, chosen.logprob, top, offset))
        return piece

    def close(self) -> bool:
        """No more tokens follow: what was held back may be sent; whether it had a stop string."""
        stopped = self._extend(self.detokeniser.flush())
        self._pass(self.stops.flush())
        self._passed = self._decoded + 1  # all reports may go
        return stopped

    def take(self) -> tuple[str, list[TokenReport]]:
        """Text and reports that may be sent now, each once."""
        text, self._ready = self._ready, ""
        reports = [report for report in self._reports if report.offset < self._passed]
        self._reports = self._reports[len(reports) :]
        return text, reports

    def _extend(self, piece: str) -> bool:
        """Take text in; whether it completed a stop string."""
        self._decoded += len(piece)
        passed, stopped = self.stops.push(piece)
        self._pass(passed)
        if stopped:
            self._reports = [report for report in self._reports if report.offset < self._passed]
        return stopped

    def _pass(self, text: str) -> None:
        self._ready += text
        self._passed += len(text)
