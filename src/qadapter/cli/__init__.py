"""The command line: one module a command, imported only when it is called."""

import argparse
import codecs
import difflib
import errno
import io
import json
import logging
import os
import re
import sys
import time
import traceback
from importlib import import_module
from typing import Any, NoReturn

from qadapter import __version__
from qadapter.errors import ConfigError, QAdapterError

COMMANDS = {
    "quickstart": "customise a small model in minutes and read what it gained and cost",
    "train": "train a Q-Adapter on preference pairs",
    "data": "look at a preference dataset before training (data check)",
    "generate": "answer prompts with an adapter, at any strength",
    "chat": "talk to an adapter in the terminal",
    "eval": "measure what an adapter gained and what it cost",
    "sweep": "the whole trade-off along the dial, and the strength that fits a budget",
    "compare": "adapters and plain LoRAs of one base, side by side",
    "audit": "evidence and a gate: exit code 0 passes, 1 fails, 2 could not run",
    "serve": "serve adapters with OpenAI's protocol, a strength dial on every request",
    "playground": "open a local page: base and policy side by side while the strength moves",
    "wrap": "make any PEFT LoRA an adapter folder, without training",
    "export": "write a policy as a merged checkpoint, a plain LoRA, GGUF-ready, or for vLLM",
    "info": "say what an adapter folder holds",
}
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
# Processes of one run mostly fail alike. The first speaks for all: the launcher ends the others while they wait.
PATIENCE_SECONDS = 10.0
# What a full disk, a used-up quota and a limit on file sizes say; safetensors writes in Rust and raises its own type.
DISK_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class UsageError(ConfigError):
    """A command line that cannot be understood."""

    exit_code = EXIT_USAGE


class CommandParser(argparse.ArgumentParser):
    """A parser that raises instead of printing its usage and ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        unknown = unknown_option(message)
        near = difflib.get_close_matches(unknown, self._option_string_actions, n=1) if unknown else []
        raise UsageError(f"{message}.{did_you_mean(near[0] if near else None)} See {self.prog} --help.")


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        bare = action.default is None or action.default is False or action.default == []
        return action.help if bare else super()._get_help_string(action)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON for standard output, in ASCII alone where that is in another encoding than UTF-8."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return json.dumps(value, indent=indent, ensure_ascii=codecs.lookup(encoding).name != "utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run a command; the process's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # tables and answers hold what not every terminal's encoding has
        sys.stdout.reconfigure(errors="backslashreplace")
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = _run(arguments)
        sys.stdout.flush()  # a reader that has gone shows here rather than at exit
        return code
    except SystemExit as stop:  # argparse has shown its help
        return int(stop.code or 0)
    except KeyboardInterrupt as interrupt:
        if first_process():
            _complain(str(interrupt) or "interrupted.")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        if not first_process():
            time.sleep(PATIENCE_SECONDS)
        _complain(one_line(error))
        return getattr(error, "exit_code", 1)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0 if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        print(f"qadapter {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}. Commands: {', '.join(COMMANDS)}.")
    # PEFT imports bitsandbytes, which warns on CPUs with bfloat16 instructions of a kernel that nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    command = import_module(f"qadapter.cli.{name}")
    return command.run(arguments[1:])


def overview() -> str:
    """The text of `qadapter --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qadapter [--version] [--debug] COMMAND ...",
            "",
            "Customise a language model to new preferences without losing what it can do.",
            "",
            *lines,
            "",
            "`qadapter COMMAND --help` explains a command; --debug shows the traceback of an error.",
        ]
    )


def unknown_option(message: str) -> str | None:
    """The first option, as it was written, in argparse's message on arguments that it does not know."""
    match = re.match(r"unrecognized arguments: (--[\w-]+)", message)
    return match[1] if match else None


def did_you_mean(name: str | None) -> str:
    """A sentence for an error's message; empty where nothing is near."""
    return f" Did you mean {name}?" if name else ""


def first_process() -> bool:
    """Whether this is the only process of a command, or the first one on its machine of those that torchrun started."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser for one command whose help shows its defaults."""
    return CommandParser(
        prog=f"qadapter {name}",
        description=description,
        formatter_class=DefaultsFormatter,
        allow_abbrev=False,
    )


def one_line(error: Exception) -> str:
    """What is said of an error that ends a command."""
    if any(text in str(error) for text in DISK_FULL):
        place = getattr(error, "filename", None) or "a file"
        return f"no space left on the device while writing {place}: free some and run again."
    message = str(error).strip()
    if re.match(r"Caught \w+ in DataLoader worker", message):  # torch puts the worker's traceback in front of it
        message = message.rpartition(f"{type(error).__name__}: ")[2]
    if isinstance(error, QAdapterError):
        return " ".join(message.split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    first = (message or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first} (run again with --debug for the traceback)"


def _complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
