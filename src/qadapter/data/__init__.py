"""Preference pairs: from files, the hub or the package to token ids and batches."""

from importlib import import_module
from typing import TYPE_CHECKING

# Public names and where they live; resolved on first use, because the collator imports torch.
_EXPORTS = {
    "NAMED_SOURCES": "qadapter.data.sources",
    "CheckReport": "qadapter.data.check_report",
    "Format": "qadapter.data.formats",
    "PackedCollator": "qadapter.data.packing",
    "PreferenceCollator": "qadapter.data.collator",
    "RowError": "qadapter.data.rows",
    "TokenisationReport": "qadapter.data.tokenisation",
    "check_preferences": "qadapter.data.check",
    "load_preference_dataset": "qadapter.data.sources",
    "recognise": "qadapter.data.formats",
    "render": "qadapter.data.check",
    "tokenise_preferences": "qadapter.data.tokenisation",
    "train_eval_split": "qadapter.data.splits",
}
__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from qadapter.data.check import check_preferences as check_preferences
    from qadapter.data.check import render as render
    from qadapter.data.check_report import CheckReport as CheckReport
    from qadapter.data.collator import PreferenceCollator as PreferenceCollator
    from qadapter.data.formats import Format as Format
    from qadapter.data.formats import recognise as recognise
    from qadapter.data.packing import PackedCollator as PackedCollator
    from qadapter.data.rows import RowError as RowError
    from qadapter.data.sources import NAMED_SOURCES as NAMED_SOURCES
    from qadapter.data.sources import load_preference_dataset as load_preference_dataset
    from qadapter.data.splits import train_eval_split as train_eval_split
    from qadapter.data.tokenisation import TokenisationReport as TokenisationReport
    from qadapter.data.tokenisation import tokenise_preferences as tokenise_preferences


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'qadapter.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__]
