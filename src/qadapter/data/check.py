"""Look at a preference dataset before training: what it is, what is wrong, and what would be trained."""

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from qadapter.data.base_limits import beyond_context
from qadapter.data.check_rendering import render as render
from qadapter.data.check_report import CheckReport, Example, LengthStatistics, RowProblem
from qadapter.data.layouts import filled
from qadapter.data.rows import Pair, RowError
from qadapter.data.sources import (
    OpenSource,
    Source,
    check_arguments,
    open_source,
    pair_features,
    pair_or_error,
)
from qadapter.data.tokenisation import TokenisationReport, tokenise_preferences
from qadapter.errors import DataError

SIDES = ("prompt", "chosen", "rejected")
EXAMPLES = 3


def check_preferences(
    source: Source,
    tokenizer: Any = None,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
    max_rows: int | None = None,
    base_config: Any = None,
) -> CheckReport:
    """A CheckReport over all rows (or the first `max_rows`) with every bad row, not only the first.

    With a `tokenizer`, lengths are tokens and the examples are decoded ids, exactly what is trained; with the base
    model's `base_config`, too, they are held against its vocabulary and positions. Raises DataError only where
    nothing can be said: no such source, unreadable file, unknown layout.
    """
    check_arguments(max_rows, on_error="raise")
    opened = open_source(source, split, columns, streaming=False)
    report = CheckReport(str(source), opened.row_format.layout, opened.row_format.chat)
    numbered = collect_pairs(report, opened, max_rows)
    note_repetitions(report, numbered)
    if tokenizer is None:
        describe_text(report, numbered)
    else:
        describe_tokens(report, numbered, tokenizer, max_length, base_config)
    return report


def collect_pairs(report: CheckReport, opened: OpenSource, max_rows: int | None) -> list[tuple[int, Pair]]:
    """The valid pairs with their row numbers; fills in the columns, how many rows there are and what others lack."""
    numbered: list[tuple[int, Pair]] = []
    read: set[str] = set()
    found: dict[str, None] = {}  # keeps the order
    for row in islice(opened.rows, max_rows):
        report.rows += 1
        if not isinstance(row.content, RowError):
            read |= opened.row_format.columns_read(row.content)
            found |= {name: None for name, value in row.content.items() if filled(value)}
        pair = pair_or_error(row, opened.row_format)
        if isinstance(pair, RowError):
            report.errors.append(RowProblem(row.number, pair.reason, str(pair)))
        else:
            numbered.append((row.number, pair))
    report.pairs = len(numbered)
    parents = {path.split(".", 1)[0] for path in read}
    report.columns_read = sorted(read)
    report.columns_unread = [name for name in found if name not in read | parents]
    return numbered


def note_repetitions(report: CheckReport, numbered: Sequence[tuple[int, Pair]]) -> None:
    """Fill in duplicates (same prompt, same answers) and contradictions (same prompt, answers swapped)."""
    first_row: dict[tuple[bytes, ...], int] = {}
    for number, pair in numbered:
        prompt, chosen, rejected = (fingerprint(pair[side]) for side in SIDES)
        if (prompt, chosen, rejected) in first_row:
            report.duplicates.append((number, first_row[prompt, chosen, rejected]))
        if (prompt, rejected, chosen) in first_row:
            report.contradictions.append((number, first_row[prompt, rejected, chosen]))
        first_row.setdefault((prompt, chosen, rejected), number)
    report.prompts = len({prompt for prompt, _, _ in first_row})


def fingerprint(value: Any) -> bytes:
    """A short stand-in for a text or a conversation, so that large datasets are not held twice."""
    return hashlib.sha256(json.dumps(value).encode()).digest()[:16]


def describe_text(report: CheckReport, numbered: Sequence[tuple[int, Pair]]) -> None:
    """Fill in lengths in words and examples as text."""
    note_lengths(report, ({side: words(pair[side]) for side in SIDES} for _, pair in numbered))
    report.examples = [text_example(number, pair) for number, pair in numbered[:EXAMPLES]]


def words(value: Any) -> int:
    """How many words a text or the contents of a conversation have."""
    return len(value.split()) if isinstance(value, str) else sum(words(message["content"]) for message in value)


def text_example(number: int, pair: Pair) -> Example:
    """The pair as text; without a tokenizer a chat is shown as "role: content" lines."""
    if isinstance(pair["prompt"], str):
        return Example(number, **pair)
    prompt = "".join(f"{message['role']}: {message['content']}\n" for message in pair["prompt"])
    return Example(number, f"{prompt}assistant: ", pair["chosen"][0]["content"], pair["rejected"][0]["content"])


def describe_tokens(
    report: CheckReport,
    numbered: Sequence[tuple[int, Pair]],
    tokenizer: Any,
    max_length: int | None,
    base_config: Any,
) -> None:
    """Fill in token lengths, decoded examples and the tokenisation report, with the source's row numbers."""
    from datasets import Dataset

    if not numbered:
        return
    dataset = Dataset.from_list([pair for _, pair in numbered], features=pair_features(report.chat))
    try:
        tokenised, tokenisation = tokenise_preferences(dataset, tokenizer, max_length=max_length)
    except DataError as error:
        report.tokenisation_error = str(error)
        return
    if base_config is not None:
        note_fit(report, tokenised, base_config)
    numbers = [number for number, _ in numbered]
    report.tokenisation = renumbered(tokenisation, numbers)
    note_lengths(report, ({side: len(row[f"{side}_ids"]) for side in SIDES} for row in tokenised), "tokens")
    # By position: a row of the source may give several pairs.
    dropped = {position for rows in tokenisation.dropped.values() for position in rows}
    kept = (number for position, number in enumerate(numbers, start=1) if position not in dropped)
    report.examples = [
        Example(number, **{side: tokenizer.decode(row[f"{side}_ids"]) for side in SIDES})
        for number, row in zip(kept, tokenised.take(min(EXAMPLES, len(tokenised))), strict=False)
    ]


def note_fit(report: CheckReport, tokenised: Any, base_config: Any) -> None:
    """Fill in whether the base can run the pairs, and was made for such lengths."""
    try:
        report.context_warning = beyond_context(tokenised, base_config)
    except DataError as error:
        report.tokenisation_error = str(error)


def renumbered(report: TokenisationReport, numbers: Sequence[int]) -> TokenisationReport:
    """The report in the source's row numbers instead of positions among the valid pairs."""

    def in_source(rows: list[int]) -> list[int]:
        return [numbers[row - 1] for row in rows]

    return TokenisationReport(
        rows=report.rows,
        kept=report.kept,
        truncated_prompts=in_source(report.truncated_prompts),
        dropped={reason: in_source(rows) for reason, rows in report.dropped.items()},
        why=report.why,
        unstable_prompts=in_source(report.unstable_prompts),
        unspaced=in_source(report.unspaced),
    )


def note_lengths(report: CheckReport, lengths: Iterable[Mapping[str, int]], unit: str = "words") -> None:
    """Fill in the statistics of each side and how often the chosen answer is the longer one."""
    rows = list(lengths)
    if not rows:
        return
    report.unit = unit
    report.lengths = {side: length_statistics([row[side] for row in rows]) for side in SIDES}
    report.chosen_longer = sum(row["chosen"] > row["rejected"] for row in rows) / len(rows)


def length_statistics(lengths: Sequence[int]) -> LengthStatistics:
    """Minimum, median, 95th percentile (nearest rank) and maximum."""
    ranked = sorted(lengths)
    rank = -(-95 * len(ranked) // 100)
    return LengthStatistics(ranked[0], statistics.median(ranked), ranked[rank - 1], ranked[-1])
