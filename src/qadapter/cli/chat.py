"""`qadapter chat`: a conversation in the terminal with a dial."""

import contextlib
import importlib
from collections.abc import Callable

from qadapter.cli import command_parser
from qadapter.cli.options import add_policy_options, add_sampling_options
from qadapter.data.messages import as_text
from qadapter.data.rows import RowError
from qadapter.errors import ConfigError, QAdapterError

HELP = "/strength X sets the dial (0 base, 1 policy), /reset starts anew, /help, /exit"


def run(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    parser = command_parser("chat", f"Talk to an adapter in the terminal. Inside: {HELP}.")
    add_policy_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--system", default=None, help="system message")
    options = parser.parse_args(arguments)

    from qadapter.cli.policies import load_policy, quiet_libraries, sampling_of, strength_of
    from qadapter.generation import stream_text

    sampling = sampling_of(options)
    with contextlib.suppress(ImportError):  # not on every system
        importlib.import_module("readline")  # `input` then edits lines and remembers them
    with quiet_libraries():
        model, tokenizer = load_policy(options)
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the base model {model.base_source.name} has no chat template, so it holds no conversations: "
                f"use `qadapter generate {options.adapter}`."
            )
        print(f"{options.adapter} on {model.base_source.name}. {HELP}")
        return converse(
            lambda messages, strength: stream_text(
                model, tokenizer, messages, sampling, strength_of(strength, tokenizer, options)
            ),
            options.strength,
            options.system,
        )


def converse(answer: Callable, strength: float, system: str | None, read: Callable[[str], str] = input) -> int:
    """Read lines and print streamed answers until the end of input; Ctrl-C stops an answer, then the program."""
    start: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while True:
        try:
            line = as_text(read(f"[{strength:g}] > "), "message").strip()
        except EOFError:
            print()
            return 0
        except (UnicodeDecodeError, RowError):
            print("the line is no text in this terminal's encoding: nothing was sent")
            continue
        if line in ("/exit", "/quit"):
            return 0
        if line == "/reset":
            messages = list(start)
        elif line.startswith("/strength"):
            strength = _strength(line, strength)
        elif line.startswith("/"):
            print(HELP)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answered = _print_stream(answer(messages, strength))
            except (QAdapterError, RuntimeError, IndexError) as error:
                # A model without room for more: what was said stays, for the user to copy or to begin anew.
                messages.pop()
                print(f"\nerror: {' '.join(str(error).split())}\nThe message was taken back; /reset starts anew.")
            else:
                messages.append({"role": "assistant", "content": answered})


def _strength(line: str, current: float) -> float:
    from qadapter.modeling.mixing import checked_number

    with contextlib.suppress(ValueError, ConfigError):
        return checked_number(float(line.removeprefix("/strength")), "strength")
    print(f"{line!r}: write /strength and a number, such as /strength 0.5")
    return current


def _print_stream(pieces) -> str:  # type: ignore[no-untyped-def]
    text = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        pieces.close()
    print()
    return text
