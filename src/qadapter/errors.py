"""Errors that users can act on: each message names the thing, the value, the rule and the way out."""

from typing import Any


class QAdapterError(Exception):
    """Base class; the command line prints it as one line and exits with `exit_code`."""

    exit_code = 1


class ConfigError(QAdapterError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(QAdapterError):
    """A dataset, or a row of it, that cannot be used as preference pairs."""


class AdapterFormatError(QAdapterError):
    """An adapter folder that is damaged, foreign, or does not belong to the given base model."""


class TrainingError(QAdapterError):
    """A run that cannot lead to an adapter any more."""


def require_rules(settings: Any, *rules: tuple[str, bool, str], prefix: str = "") -> None:
    """Raise ConfigError for the first (name, whether it holds, rule) that does not hold; `prefix` precedes its name."""
    for name, holds, rule in rules:
        if not holds:
            raise ConfigError(f"{prefix}{name} = {getattr(settings, name)!r}: {rule}.")


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's message, or its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
