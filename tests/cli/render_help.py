"""docs/cli.md, written from the commands' own help: python tests/cli/render_help.py > docs/cli.md"""

import dataclasses
import io
import os
from contextlib import redirect_stdout
from unittest.mock import patch

from qadapter.cli import COMMANDS, main, overview
from qadapter.cli.train import GROUPS, TrainParser

HEAD = """# Command line

Written by `python tests/cli/render_help.py > docs/cli.md`; a test fails when it is stale.

```
{overview}
```

Exit codes: 0 done, 1 an error (one line on standard error), 2 a command line that cannot be understood, 130 Ctrl-C.
`audit`: 1 a limit is broken, 2 it could not run. `data check`: 1 also where the data are bad.
"""
TRAIN = """
## qadapter train

{description}

Besides these, every one of transformers' `TrainingArguments` is an option
(`qadapter train --help` lists them; the few that do not fit pairs are refused with the reason), and `--config FILE`
reads any of them from YAML.
"""


def render():
    """The text of docs/cli.md."""
    with patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}):
        sections = [_train() if name == "train" else _help(name) for name in COMMANDS]
    return HEAD.format(overview=overview()) + "".join(sections)


def _help(name):
    out = io.StringIO()
    with redirect_stdout(out):
        assert main([name, "--help"]) == 0
    title = "data check" if name == "data" else name
    return f"\n## qadapter {title}\n\n```\n{out.getvalue().rstrip()}\n```\n"


def _train():
    parser = TrainParser()
    return TRAIN.format(description=parser.description) + "".join(_table(parser, group) for group in GROUPS)


def _table(parser, group):
    """The arguments that a group defines itself, as rows of option, default and meaning."""
    lines = [f"\n### {group.__name__}\n", "| Option | Default | Meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(group):
        if field.name in vars(group).get("__annotations__", {}):
            option, action = field.name.replace("_", "-"), parser.by_name[field.name]
            default = "" if field.default is None else f"`{field.default}`"
            lines.append(f"| `--{option}` | {default} | {action.help or ''} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
