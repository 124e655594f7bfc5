"""The command line program, as others name it."""

import shlex
import shutil
import sys
from pathlib import Path


def called_as() -> str:
    """How this program can be called again: by its name, or where that is not on the path, as it was called."""
    if shutil.which("qadapter"):
        return "qadapter"
    called = Path(sys.argv[0])
    if called.parts[-2:] == ("qadapter", "__main__.py"):
        return f"{shlex.quote(sys.executable)} -m qadapter"
    return shlex.quote(sys.argv[0]) if called.name == "qadapter" else "qadapter"
