"""docs/cli.md, written from the commands' own help: python tests/cli/render_help.py > docs/cli.md"""

import io
import os
from contextlib import redirect_stdout
from unittest.mock import patch

from qadapter.cli import COMMANDS, main, overview

HEAD = """# Command line

Written by `python tests/cli/render_help.py > docs/cli.md`; a test fails when it is stale.

```
{overview}
```

Exit codes: 0 done, 1 an error (one line on standard error), 2 a command line that cannot be understood, 130 Ctrl-C.
`audit`: 1 a limit is broken, 2 it could not run. `data check`: 1 also where the data are bad.
"""


def render():
    """The text of docs/cli.md."""
    with patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}):
        return HEAD.format(overview=overview()) + "".join(_help(name) for name in COMMANDS)


def _help(name):
    out = io.StringIO()
    with redirect_stdout(out):
        assert main([name, "--help"]) == 0
    title = "data check" if name == "data" else name
    return f"\n## qadapter {title}\n\n```\n{out.getvalue().rstrip()}\n```\n"


if __name__ == "__main__":
    print(render(), end="")
