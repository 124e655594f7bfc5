"""Tokenised pairs kept between runs: Arrow files in a folder of their own in the cache of `datasets`.

`tokenise_preferences` is the slow twin: what comes from the cache equals what it gives. An entry is named by all that
the ids depend on, so nothing in it ever becomes outdated, and any of the folders may be removed at any time. Those that
were used longest ago are, where all take more than MOST_BYTES.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadapter.data.tokenisation import (
    TOKENISATION_VERSION,
    Limits,
    TokenisationReport,
    token_features,
    tokenise_preferences,
)
from qadapter.errors import first_line
from qadapter.new_folders import file_digest

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# With fewer rows tokenising takes about a second, hardly more than the fingerprint of the tokenizer.
LEAST_ROWS = 1000
BATCH_ROWS = 1000
MANIFEST = "tokens.json"
PAIRS = "pairs"
MOST_BYTES = 5 * 2**30
# Entries, and what a process leaves of one that was killed while it wrote or removed it.
OWN_NAMES = re.compile(r"[0-9a-f]{64}|\.(writing|removing)-.*")
# A scratch folder this old is nobody's any more.
STALE_SECONDS = 24 * 3600


def cacheable(dataset: Any, tokenizer: Any) -> bool:
    """Whether the ids of these rows are worth keeping, and depend on nothing but what an entry is named by.

    Left out are streams, rows that a format or transform changes as they are read, and tokenizers of which the
    serialised `tokenizers` pipeline is not the whole story: those in Python, and subclasses from elsewhere.
    """
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    return (
        isinstance(dataset, Dataset)
        and len(dataset) >= LEAST_ROWS
        and dataset.format["type"] is None
        and set(dataset.format["columns"]) == set(dataset.column_names)
        and isinstance(tokenizer, PreTrainedTokenizerFast)
        and type(tokenizer).__module__.partition(".")[0] == "transformers"
    )


def tokenise_cached(
    dataset: "Dataset",
    tokenizer: Any,
    *,
    fingerprint: Mapping[str, str],
    max_length: int | None = None,
    max_prompt_length: int | None = None,
) -> "tuple[Dataset, TokenisationReport]":
    """What `tokenise_preferences` gives for a `cacheable` dataset, read from the cache if it is there, else kept in it.

    `fingerprint`: that of the tokenizer and its template, as adapter folders have it.
    A damaged entry is made anew and an unwritable cache is done without, each with a warning. Processes that come
    at once all tokenise; the first to end leaves its entry. An entry that another process removes meanwhile is as good
    as none.
    """
    limits = Limits(max_length, max_prompt_length)
    entry = cache_folder() / entry_name(dataset, tokenizer, fingerprint, limits)
    if os.path.exists(entry):
        try:
            found = read_entry(entry, limits)
        except Exception as error:  # damaged files raise many types
            if os.path.exists(entry):
                reason = first_line(error)
                logger.warning("the cached tokens in %s are damaged (%s): the pairs are tokenised anew.", entry, reason)
                remove_entry(entry)
        else:
            with contextlib.suppress(OSError):  # removed meanwhile, or not ours to touch
                os.utime(entry)
            return found
    tokenised, report = tokenise_preferences(dataset, tokenizer, **limits._asdict())
    try:
        write_entry(entry, tokenised, report)
    except OSError as error:
        logger.warning("the tokens cannot be kept in %s (%s): the next run tokenises again.", entry.parent, error)
    else:
        remove_oldest(entry)
    return tokenised, report


def cache_folder() -> Path:
    """Where the entries are: HF_DATASETS_CACHE/qadapter."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "qadapter"


# -- what an entry is named by -----------------------------------------------------------------------------------------


def entry_name(dataset: "Dataset", tokenizer: Any, fingerprint: Mapping[str, str], limits: Limits) -> str:
    """SHA-256 over everything that the ids depend on."""
    import tokenizers
    import transformers

    described = {
        "tokenisation": TOKENISATION_VERSION,
        "libraries": [transformers.__version__, tokenizers.__version__],
        "limits": limits,
        "tokenizer": dict(fingerprint) | {"pipeline": pipeline_digest(tokenizer)},
        "rows": rows_digest(dataset),
    }
    if "strftime_now" in repr(tokenizer.chat_template):
        described["today"] = date.today().isoformat()  # such templates write the date into every prompt
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def pipeline_digest(tokenizer: Any) -> str:
    """SHA-256 of how text becomes ids: merges, normalisation and added tokens, which the vocabulary does not tell."""
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    pipeline |= {"truncation": None, "padding": None}  # left over from the last call, and set by each
    described = [type(tokenizer).__qualname__, tokenizer.split_special_tokens, pipeline]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def rows_digest(dataset: "Dataset") -> str:
    """SHA-256 of the rows, however they are stored: chunks, files and indices do not matter."""
    digest = hashlib.sha256(repr(dataset.features).encode())
    for table in dataset.with_format("arrow").iter(BATCH_ROWS):
        digest.update(json.dumps(table.to_pylist(), default=repr).encode())
    return digest.hexdigest()


# -- an entry on disk --------------------------------------------------------------------------------------------------


def read_entry(entry: Path, limits: Limits) -> "tuple[Dataset, TokenisationReport]":
    """The tokenised pairs of an entry, in memory, and their report; raises whatever damage leads to."""
    from datasets import Dataset

    manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
    if file_digests(entry / PAIRS) != manifest["files"]:
        raise ValueError("its files are not as they were written")
    # In memory, so that what has been checked is what is used, whatever becomes of the files.
    tokenised = Dataset.load_from_disk(str(entry / PAIRS), keep_in_memory=True)
    report = TokenisationReport(**manifest["report"])
    check_pairs(tokenised, report, limits)
    return tokenised, report


def check_pairs(tokenised: "Dataset", report: TokenisationReport, limits: Limits) -> None:
    """Raise ValueError for other columns, another number of rows, or lengths that no tokenisation leads to."""
    import pyarrow.compute as pc

    if tokenised.features != token_features():
        raise ValueError(f"its columns are {tokenised.features}")
    if len(tokenised) != report.kept:
        raise ValueError(f"it has {len(tokenised)} rows, but {report.kept} were kept")
    prompts, *sides = (pc.list_value_length(column) for column in tokenised.data.columns)
    if any(lengths.null_count or pc.min(lengths).as_py() < 1 for lengths in (prompts, *sides)):
        raise ValueError("a row of it is empty")
    longest = pc.max(pc.add(prompts, pc.max_element_wise(*sides))).as_py()
    if longest > (limits.max_length or longest):
        raise ValueError(f"a row of it has {longest} tokens")
    if pc.max(prompts).as_py() > (limits.max_prompt_length or longest):
        raise ValueError(f"a prompt of it has {pc.max(prompts)} tokens")


def write_entry(entry: Path, tokenised: "Dataset", report: TokenisationReport) -> None:
    """Write an entry, whole or not at all; if another process was faster, leave that one's. Raises OSError."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".writing-") as scratch:
        made = Path(scratch) / "entry"
        tokenised.save_to_disk(str(made / PAIRS))
        manifest = {"report": asdict(report), "files": file_digests(made / PAIRS)}
        (made / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        try:
            os.replace(made, entry)
        except OSError:
            if not entry.is_dir():
                raise


def remove_oldest(kept: Path) -> None:
    """Remove the entries used longest ago until all take MOST_BYTES at most; `kept`, the one in use, stays."""
    others, total = [], folder_bytes(kept)
    with contextlib.suppress(OSError):
        for path in kept.parent.iterdir():
            if path == kept or not OWN_NAMES.fullmatch(path.name):
                continue
            with contextlib.suppress(OSError):  # another process has removed it
                used = path.stat().st_mtime
                if not path.name.startswith(".") or used < time.time() - STALE_SECONDS:
                    others.append((used, path, folder_bytes(path)))
    total += sum(size for _, _, size in others)
    for _, path, size in sorted(others):
        if total <= MOST_BYTES:
            break
        logger.info("the cache of tokens has %d bytes, of %d allowed: %s is removed.", total, MOST_BYTES, path)
        remove_entry(path)
        total -= size


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder; of those that are left where another process removes it meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def remove_entry(entry: Path) -> None:
    """Remove an entry, at one stroke; where that is not allowed, leave it."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=entry.parent, prefix=".removing-") as scratch:
        os.replace(entry, Path(scratch) / "entry")


def file_digests(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of the files in a folder."""
    return {path.name: file_digest(path) for path in sorted(folder.iterdir())}
