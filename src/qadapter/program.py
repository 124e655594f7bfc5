"""The command line program, as others name it."""

import os
import shlex
import shutil
import sys


def called_as() -> str:
    """How this program can be called again: by its name, or where that is not on the path, as it was called."""
    if shutil.which("qadapter"):
        return "qadapter"
    if os.path.basename(sys.argv[0]) == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m qadapter"
    return shlex.quote(sys.argv[0]) if os.path.basename(sys.argv[0]) == "qadapter" else "qadapter"
