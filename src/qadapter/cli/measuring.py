"""What the commands that measure share: their workload, their subjects, and their progress on standard error."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from qadapter.cli.options import dial_of
from qadapter.cli.policies import loading_options, quiet_datasets, quiet_libraries
from qadapter.data.columns import parse_columns
from qadapter.devices import default_device
from qadapter.evaluation.audit import POLICY
from qadapter.evaluation.columns import Column
from qadapter.evaluation.part_store import PartStore
from qadapter.evaluation.progress import Track, tracked
from qadapter.evaluation.subjects import Subject, open_subject
from qadapter.evaluation.workload import BUDGETS, Workload

# Options that a budget sets, unless they are given.
BUDGETED = ("max_pairs", "max_instructions", "prompts", "max_new_tokens", "limit")


def workload_of(options: argparse.Namespace) -> Workload:
    """The workload among a command's options."""
    amounts = {name: getattr(options, name, BUDGETS[options.budget][name]) for name in BUDGETED}
    return Workload(
        dataset=options.dataset,
        split=options.split,
        data_columns=parse_columns(options.columns) or {},
        neutral_text=options.neutral_text,
        instructions=options.instructions,
        judges=tuple(options.judge),
        tasks=tuple(options.tasks),
        tasks_from=options.tasks_from,
        chat_template=options.chat_template,
        max_length=options.max_length,
        seed=options.seed,
        **amounts,
    )


def store_of(options: argparse.Namespace) -> PartStore:
    """Where finished parts are kept."""
    return PartStore(reuse=not options.no_cache)


def column_of(options: argparse.Namespace) -> Column:
    """The column among a command's options."""
    return Column(POLICY, options.strength, **dial_of(options))


def subject_of(path: str, options: argparse.Namespace) -> Subject:
    """The adapter at `path`, loaded as a command's options say."""
    return open_subject(
        path, options.base_model, device=default_device(), verify=not options.no_verify, **loading_options(options)
    )


@contextmanager
def measuring() -> Iterator[Track]:
    """Quiet libraries, and progress bars on standard error."""
    with quiet_libraries(), quiet_datasets(), tracked() as track:
        yield track
