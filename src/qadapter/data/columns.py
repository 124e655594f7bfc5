"""The columns of a dataset as users name them on the command line."""

from collections.abc import Sequence

from qadapter.errors import ConfigError


def parse_columns(pairs: Sequence[str] | None) -> dict[str, str] | None:
    """{"prompt": "my_q", ...} from ["prompt=my_q", ...]; None if there are none.

    Raises:
        ConfigError: an entry without "=", or a name given twice.
    """
    if not pairs:
        return None
    columns: dict[str, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals:
            raise ConfigError(f"--columns {pair!r}: write NAME=YOUR_COLUMN, such as prompt=question.")
        if name in columns:
            raise ConfigError(f"--columns names {name!r} twice: keep one.")
        columns[name] = column
    return columns
