"""The Domain-Specific Preference data (arXiv 2309.03126) as its authors publish it: one file a split for all domains.

https://github.com/Linear95/DSP, data/domain_specific_preference.{train,test}.json: a list of {"query", "responses"}
with the answers of four domains and the plain one ("normal"). The pairs of a domain are its answer against each of
the others, four a query. (The converted files dsp_DOMAIN_pairs.*.json are the layout "dsp" of `layouts`.)
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from qadapter.data.downloads import downloaded_list
from qadapter.data.rows import RawRow, RowError
from qadapter.errors import DataError

DOMAINS = ("academy", "business", "entertainment", "literature")
PREFIX = "dsp/"
SPLITS = ("train", "test")
# GitHub holds no larger file.
MOST_BYTES = 100 * 2**20
ADDRESS = "https://raw.githubusercontent.com/Linear95/DSP/HEAD/data/domain_specific_preference.{split}.json"


def dsp_source(name: str) -> tuple[str, Path | None] | None:
    """(domain, file or None) of "dsp/academy" or "dsp/academy:FILE"; None for any other name.

    Raises:
        DataError: an unknown domain.
    """
    if not name.startswith(PREFIX):
        return None
    domain, separator, path = name.removeprefix(PREFIX).partition(":")
    if domain not in DOMAINS:
        raise DataError(f"{name}: no such domain; the domains are {', '.join(PREFIX + known for known in DOMAINS)}")
    if separator and not path:
        raise DataError(f"{name}: name the file after the colon, or leave the colon out to download the data")
    return domain, Path(path).expanduser() if separator else None


def published_file(split: str) -> Path:
    """The file of a split, fetched by the first call.

    Raises:
        DataError: a split that is not published, or a file that cannot be had.
    """
    if split not in SPLITS:
        raise DataError(f"dsp: no split {split!r}; the splits are {', '.join(SPLITS)}")
    try:
        return downloaded_list(ADDRESS.format(split=split), MOST_BYTES)
    except DataError as error:
        raise DataError(f"{error}. Or download it by other means and name it as 'dsp/academy:FILE'") from error


def domain_pairs(rows: Iterable[RawRow], domain: str) -> Iterator[RawRow]:
    """The pairs of a domain; an answer that equals the domain's own gives none."""
    for row in rows:
        if isinstance(row.content, RowError):
            yield row
            continue
        responses = row.content.get("responses")
        if not isinstance(responses, dict) or not isinstance(responses.get(domain), str):
            error = RowError("wrong type", f"responses has to hold the answers by domain, that of {domain} among them")
            yield RawRow(row.number, row.place, error)
            continue
        for other, answer in responses.items():
            if other != domain and answer != responses[domain]:
                pair = {"query": row.content.get("query"), "chosen": responses[domain], "rejected": answer}
                yield RawRow(row.number, f"{row.place}, {domain} against {other}", pair)
