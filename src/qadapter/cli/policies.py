"""What the commands that use an adapter share: loading it quietly, and their common options."""

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from transformers.utils import logging as transformers_logging

from qadapter.cli import first_process
from qadapter.config import QAdapterConfig
from qadapter.data.template_variables import fix_variables
from qadapter.devices import default_device, pick_dtype
from qadapter.errors import ConfigError
from qadapter.generation import Sampling
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.loading import tokenizer_of
from qadapter.modeling.mixing import checked_decay, checked_number

DTYPES = ("auto", "float32", "bfloat16", "float16")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the context, libraries report errors only, and our own warnings are lines on standard error.

    Of several processes the first one warns.
    """
    hub, own, handler = logging.getLogger("huggingface_hub"), logging.getLogger("qadapter"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    handler.setLevel(logging.WARNING if first_process() else logging.ERROR)
    verbosity, level = transformers_logging.get_verbosity(), hub.level
    drew = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    own.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub.setLevel(level)
        own.removeHandler(handler)
        if drew:
            transformers_logging.enable_progress_bar()


def _show_warning(message: Warning | str, *_: Any) -> None:
    if first_process():
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Within the context, `datasets` draws no progress bars where nobody watches."""
    import datasets

    drew = not datasets.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if drew:
            datasets.enable_progress_bars()


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that loads an adapter folder."""
    parser.add_argument("adapter", help="adapter folder or hub id, as `qadapter train` wrote it")
    parser.add_argument("--base-model", default=None, help="base model instead of the one that the adapter names")
    parser.add_argument("--strength", type=float, default=1.0, help="0 is the base, 1 the trained policy")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, else float32")
    parser.add_argument("--no-verify", action="store_true", help="load although base, template or adapter differ")


def add_decay_option(parser: argparse.ArgumentParser) -> None:
    """How the strength changes along an answer."""
    parser.add_argument("--decay", type=float, default=1.0, help="factor of the strength from token to token")


def add_template_option(parser: argparse.ArgumentParser) -> None:
    """What the base's chat template reads besides the conversation."""
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        default=None,
        help='variables of the base\'s chat template, such as {"enable_thinking": false} for Qwen 3',
    )


def tokenizer_with(tokenizer: Any, options: argparse.Namespace) -> Any:
    """The tokenizer, with the variables that the options give its chat template."""
    if getattr(options, "chat_template_kwargs", None) is not None:
        fix_variables(tokenizer, options.chat_template_kwargs)
    return tokenizer


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that generates."""
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus to sample from")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    add_decay_option(parser)
    add_template_option(parser)


def sampling_of(options: argparse.Namespace) -> Sampling:
    """The sampling settings among a command's options."""
    return Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)


def load_policy(options: argparse.Namespace) -> tuple[QAdapterForCausalLM, Any]:
    """Policy and tokenizer of an adapter folder, on the machine's accelerator."""
    checked_number(options.strength, "strength")  # before minutes of loading
    decay = checked_decay(getattr(options, "decay", 1.0))  # of the commands that generate
    model = QAdapterForCausalLM.from_pretrained(
        options.adapter,
        base_model=options.base_model,
        verify=not options.no_verify,
        dtype=pick_dtype(options.dtype),
    )
    model.decay = decay
    return model.to(default_device()), tokenizer_with(tokenizer_of(options.adapter, model.base_source), options)


def require(value: Any, option: str, example: str) -> Any:
    """`value`, refused if it is missing."""
    if value is None:
        raise ConfigError(f"{option} is missing: {option} {example}")
    return value


def settings_line(config: QAdapterConfig) -> str:
    """The method's settings in one line."""
    return ", ".join(f"{name} {value}" for name, value in config.to_dict().items())
