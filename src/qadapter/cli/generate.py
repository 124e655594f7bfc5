"""`qadapter generate`: answers to prompts, streamed or in batches, beside the base's if wanted."""

import argparse
import sys
from pathlib import Path

from qadapter.cli import command_parser, json_text
from qadapter.cli.options import add_policy_options, add_sampling_options
from qadapter.data.messages import as_text
from qadapter.data.rows import RowError
from qadapter.data.texts import read_prompts
from qadapter.errors import ConfigError, DataError


def run(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    parser = command_parser("generate", "Answer prompts with an adapter, at any strength.")
    add_policy_options(parser)
    parser.add_argument(
        "--prompt", action="append", default=[], help="a prompt; may be given several times (default: standard input)"
    )
    parser.add_argument("--prompts-file", type=Path, help="text file, one prompt a line, or JSONL with a prompt key")
    parser.add_argument("--compare", action="store_true", help="also show the base's answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts answered at once")
    add_sampling_options(parser)
    options = parser.parse_args(arguments)

    from qadapter.cli.policies import load_policy, quiet_libraries, sampling_of, strength_of
    from qadapter.generation import generate_texts, stream_text

    sampling = sampling_of(options)
    if options.batch_size < 1:
        raise ConfigError(f"batch_size = {options.batch_size}: must be at least 1.")
    prompts = prompts_of(options)
    with quiet_libraries():
        model, tokenizer = load_policy(options)
        strength = strength_of(options.strength, tokenizer, options)
        if len(prompts) == 1 and not options.json and not options.compare:
            for piece in stream_text(model, tokenizer, prompts[0], sampling, strength):
                print(piece, end="", flush=True)
            print()
            return 0
        strengths = {"base": 0.0, "policy": strength} if options.compare else {"policy": strength}
        columns = {
            name: generate_texts(model, tokenizer, prompts, sampling, own, options.batch_size)
            for name, own in strengths.items()
        }
    for index, prompt in enumerate(prompts):
        answers = {name: column[index].text for name, column in columns.items()}
        if options.json:
            print(json_text({"prompt": prompt, "strength": options.strength, **answers}))
        else:
            print(f"> {prompt}")
            for name, text in answers.items():
                print(f"[{name}] {text}\n" if options.compare else f"{text}\n")
    return 0


def prompts_of(options: argparse.Namespace) -> list[str]:
    """The prompts given as options, in a file, or else on standard input.

    Raises:
        ConfigError: there is none.
        DataError: one is no text.
    """
    prompts = [_checked_text(text) for text in options.prompt]
    if options.prompts_file:
        prompts += [prompt for prompt, _ in read_prompts(options.prompts_file)]
    if not options.prompt and not options.prompts_file and not sys.stdin.isatty():
        prompts = [text for text in [_standard_input()] if text]
    if not prompts:
        raise ConfigError("there is no prompt: give --prompt TEXT, --prompts-file FILE, or text on standard input.")
    return prompts


def _standard_input() -> str:
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 text: {error}.") from error


def _checked_text(text: str) -> str:
    """`text`, refused where it holds bytes or halves of surrogate pairs, which no tokenizer takes."""
    try:
        return as_text(text, "prompt")
    except RowError as error:
        raise error.at("--prompt") from None
