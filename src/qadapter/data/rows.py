"""What a row is before and after it is understood, and how a bad one is reported."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from qadapter.errors import DataError

Row = Mapping[str, Any]  # as it stands in the source
Message = dict[str, str]  # {"role": ..., "content": ...}
Pair = dict[str, Any]  # {"prompt", "chosen", "rejected"}: message lists (chat) or strings (plain text)
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")  # of tokenised pairs


class RowError(DataError):
    """One row that cannot be used; `reason` is a short class of faults, `place` says where the row stands."""

    def __init__(self, reason: str, message: str, place: str = ""):
        super().__init__(reason, message, place)  # all three, so that the error survives pickling
        self.reason = reason
        self.message = message
        self.place = place

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message

    def at(self, place: str) -> "RowError":
        """The same error with the place of the row."""
        return RowError(self.reason, self.message, place)


class RawRow(NamedTuple):
    """A row of a source with its 1-based number; `content` is an error where the row could not be read."""

    number: int
    place: str  # "pairs.jsonl, line 7"
    content: Row | RowError
