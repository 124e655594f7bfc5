"""What was found in a preference dataset."""

from dataclasses import asdict, dataclass, field
from typing import Any

from qadapter.data.tokenisation import TokenisationReport


@dataclass(frozen=True)
class RowProblem:
    """A row that is no pair: its number (the line in JSON Lines), the class of fault, the full message."""

    row: int
    reason: str
    message: str


@dataclass(frozen=True)
class LengthStatistics:
    """Lengths in the unit of the report."""

    minimum: int
    median: float
    p95: int
    maximum: int


@dataclass(frozen=True)
class Example:
    """What a pair looks like as text; `chosen` and `rejected` are the parts that are trained."""

    row: int
    prompt: str
    chosen: str
    rejected: str


@dataclass
class CheckReport:
    """What was found in a source. Row pairs are (row, earlier row); lengths are tokens or words (`unit`)."""

    source: str
    layout: str
    chat: bool
    rows: int = 0
    pairs: int = 0
    columns_read: list[str] = field(default_factory=list)
    columns_unread: list[str] = field(default_factory=list)  # those that hold something
    errors: list[RowProblem] = field(default_factory=list)
    duplicates: list[tuple[int, int]] = field(default_factory=list)
    contradictions: list[tuple[int, int]] = field(default_factory=list)
    prompts: int = 0
    chosen_longer: float | None = None
    unit: str = "words"
    lengths: dict[str, LengthStatistics] = field(default_factory=dict)
    tokenisation: TokenisationReport | None = None
    tokenisation_error: str | None = None
    context_warning: str | None = None
    examples: list[Example] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every row is a pair and, with a tokenizer, pairs are left to train on, which the base can run."""
        return self.pairs > 0 and not self.errors and self.tokenisation_error is None

    @property
    def identical_pairs(self) -> list[int]:
        """The rows whose two answers are the same."""
        return self.rows_with("identical answers")

    @property
    def empty_answers(self) -> list[int]:
        """The rows in which an answer is missing or blank."""
        return self.rows_with("no answer")

    def rows_with(self, reason: str) -> list[int]:
        return [problem.row for problem in self.errors if problem.reason == reason]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, dicts and numbers, for JSON."""
        properties = {name: getattr(self, name) for name in ("ok", "identical_pairs", "empty_answers")}
        return properties | asdict(self)
