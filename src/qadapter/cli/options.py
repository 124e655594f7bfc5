"""Options that several commands have. Nothing heavy is imported here: --help and a misspelt option answer at once."""

import argparse
import math
from pathlib import Path
from typing import Any

from qadapter.errors import ConfigError
from qadapter.evaluation.workload import BUDGETS

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that loads an adapter folder."""
    parser.add_argument("adapter", help="adapter folder or hub id, as `qadapter train` wrote it")
    parser.add_argument("--strength", type=float, default=1.0, help="0 is the base, 1 the trained policy")
    add_loading_options(parser)


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """On which base, and how it is loaded."""
    parser.add_argument("--base-model", default=None, help="base model instead of the one that the adapter names")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, else float32")
    parser.add_argument("--no-verify", action="store_true", help="load although base, template or adapter differ")
    parser.add_argument(
        "--unquantised",
        action="store_true",
        help="load the base as its files are, though the adapter was trained on it in 4 or 8 bits",
    )


def add_interpolation_option(parser: argparse.ArgumentParser) -> None:
    """What the strength and the weights are of."""
    parser.add_argument(
        "--interpolation",
        choices=("logits", "weights"),
        default="logits",
        help="what strength and adapter weights mix: logits, in a stream more, or the LoRAs' weights, in one stream",
    )


def add_template_option(parser: argparse.ArgumentParser) -> None:
    """What the base's chat template reads besides the conversation."""
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        default=None,
        help='variables of the base\'s chat template, such as {"enable_thinking": false} for Qwen 3',
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that generates."""
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus to sample from")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    add_dial_options(parser)
    parser.add_argument(
        "--off-inside", action="store_true", help="leave code fences, JSON, reasoning and tool calls to the base"
    )
    add_template_option(parser)


def add_subject_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Which adapters, and how to load them."""
    if several:
        parser.add_argument("adapters", nargs="+", help="adapter folders, hub ids, or plain PEFT LoRA folders")
    else:
        parser.add_argument("adapter", help="adapter folder, hub id, or plain PEFT LoRA folder")
    add_loading_options(parser)


def add_confident_option(parser: argparse.ArgumentParser) -> None:
    """Of a gate or a budget."""
    parser.add_argument(
        "--confident",
        action="store_true",
        help="the whole 95%% interval has to keep a limit, not the estimate alone",
    )


def add_strength_options(parser: argparse.ArgumentParser) -> None:
    """At which setting of the dial."""
    parser.add_argument("--strength", type=float, default=1.0, help="0 is the base, 1 the trained policy")
    add_dial_options(parser)


def add_dial_options(parser: argparse.ArgumentParser) -> None:
    """Settings of the dial besides the strength."""
    parser.add_argument(
        "--adapter-weights", nargs="+", action="extend", default=None, help="of a composition: NAME=WEIGHT ..."
    )
    parser.add_argument("--cap", type=float, default=None, help="cap on KL(policy || base) at each token, in nats")
    parser.add_argument(
        "--threshold",
        type=float,
        default=None,
        help="of KL in nats, 0.1 say: the strength fades where the adapter hardly moves a token, and below it is 0",
    )
    parser.add_argument("--decay", type=float, default=1.0, help="factor of the strength from token to token")
    add_interpolation_option(parser)


def add_workload_options(parser: argparse.ArgumentParser, answers: bool = True) -> None:
    """What is measured on, and how much of it; without `answers`, for a command that generates none."""
    parser.add_argument("--dataset", default="builtin", help="held-out pairs: file, hub id, or builtin")
    parser.add_argument("--split", default=None, help="split of a hub dataset (default: test)")
    parser.add_argument(
        "--columns", nargs="*", action="extend", help="your column names: prompt=my_q chosen=good category=topic"
    )
    parser.add_argument(
        "--neutral-text", type=Path, default=None, help="text or JSONL with text and category (default: the package's)"
    )
    judges = "rule:house-style, rule:max-words=40, endpoint:URL#MODEL, ...; repeatable"
    # Without answers it is known only to be refused with what to use instead.
    parser.add_argument("--judge", action="append", default=[], help=judges if answers else argparse.SUPPRESS)
    parser.add_argument(
        "--tasks", nargs="*", action="extend", default=[], help="benchmarks of lm-eval, or YAML files of tasks"
    )
    parser.add_argument("--tasks-from", type=Path, default=None, help="folder of task YAMLs or benchmark JSONL files")
    parser.add_argument("--chat-template", action="store_true", help="put benchmark questions as a user's messages")
    parser.add_argument("--budget", choices=tuple(BUDGETS), default="standard", help="how much is measured")
    suppressed: dict[str, Any] = {"type": int, "default": argparse.SUPPRESS}
    parser.add_argument("--max-pairs", help="held-out pairs, instead of the budget's", **suppressed)
    if answers:
        parser.add_argument(
            "--instructions",
            type=Path,
            default=None,
            help="general prompts, one a line, or JSONL (default: the package's)",
        )
        parser.add_argument("--max-instructions", help="general instructions, instead of the budget's", **suppressed)
        parser.add_argument("--prompts", help="prompts that are judged, instead of the budget's", **suppressed)
        parser.add_argument("--max-new-tokens", help="longest answer, instead of the budget's", **suppressed)
    else:
        parser.set_defaults(instructions=None)
    parser.add_argument("--limit", help="items of each benchmark, instead of the budget's", **suppressed)
    parser.add_argument("--max-length", type=int, default=2048, help="longest text in tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of samples, resampling and benchmarks")
    parser.add_argument("--no-cache", action="store_true", help="measure again what an earlier run has stored")


def weights_of(options: argparse.Namespace) -> dict[str, float] | None:
    """{adapter: weight} among a command's options.

    Raises:
        ConfigError: an entry that is not NAME=NUMBER.
    """
    if options.adapter_weights is None:
        return None
    weights = {}
    for entry in options.adapter_weights:
        name, _, value = entry.partition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            raise ConfigError(f"--adapter-weights {entry!r}: write NAME=WEIGHT, such as concise=0.8.") from None
    return weights


def dial_of(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of the dial besides the strength among a command's options, as a `Column` takes them.

    Raises:
        ConfigError: a cap or threshold that is no number of nats, by the option's own name.
    """
    for option, value in (("cap", options.cap), ("threshold", options.threshold)):
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"--{option} {value:g}: must be a finite number of nats, 0 or above.")
    return {
        "adapter_weights": weights_of(options),
        "max_kl": options.cap,
        "min_kl": options.threshold,
        "decay": options.decay,
        "interpolation": options.interpolation,
    }


def require(value: Any, option: str, example: str) -> Any:
    """`value`, refused if it is missing."""
    if value is None:
        raise ConfigError(f"{option} is missing: {option} {example}")
    return value
