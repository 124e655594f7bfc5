"""What the commands that use an adapter share: loading it, and libraries that keep quiet."""

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from qadapter.cli import first_process
from qadapter.cli.options import dial_of
from qadapter.data.template_variables import fix_variables
from qadapter.devices import default_device, pick_dtype
from qadapter.evaluation.columns import Column
from qadapter.generation import Sampling
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.conditions import OffInside
from qadapter.modeling.loading import tokenizer_of
from qadapter.modeling.mixing import Strength, checked_weights


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the context, libraries report errors only, and our own warnings are lines on standard error.

    Downloads show how far they are where somebody watches.
    Of several processes the first one warns.
    """
    own, handler = logging.getLogger("qadapter"), logging.StreamHandler()
    # bitsandbytes warns at every product in 8 bits.
    others = {logger: logger.level for logger in map(logging.getLogger, ("huggingface_hub", "bitsandbytes"))}
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    handler.setLevel(logging.WARNING if first_process() else logging.ERROR)
    verbosity = transformers_logging.get_verbosity()
    drew, hub_drew = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # the hub's bars, too
    if hub_drew and sys.stderr.isatty():
        enable_progress_bars()
    for logger in others:
        logger.setLevel(logging.ERROR)
    own.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for logger, level in others.items():
            logger.setLevel(level)
        own.removeHandler(handler)
        if drew:
            transformers_logging.enable_progress_bar()
        (enable_progress_bars if hub_drew else disable_progress_bars)()


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


def tokenizer_with(tokenizer: Any, options: argparse.Namespace) -> Any:
    """The tokenizer, with the variables that the options give its chat template."""
    if getattr(options, "chat_template_kwargs", None) is not None:
        fix_variables(tokenizer, options.chat_template_kwargs)
    return tokenizer


def sampling_of(options: argparse.Namespace) -> Sampling:
    """The sampling settings among a command's options."""
    return Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)


def strength_of(strength: float, tokenizer: Any, options: argparse.Namespace) -> Strength:
    """The strength as `generate` takes it: off inside code and the like, where a command's options say so."""
    return OffInside(tokenizer, strength) if options.off_inside and strength else strength


def loading_options(options: argparse.Namespace) -> dict[str, Any]:
    """What a command's options say of the base's loading, as keyword arguments of `from_pretrained`."""
    unquantised = {"quantization_config": None} if options.unquantised else {}
    return {"dtype": pick_dtype(options.dtype), **unquantised}


def load_policy(options: argparse.Namespace) -> tuple[QAdapterForCausalLM, Any]:
    """Policy and tokenizer of an adapter folder, on the machine's accelerator, at the options' setting of the dial."""
    dial = Column("policy", options.strength, **dial_of(options))  # checked before minutes of loading
    model = QAdapterForCausalLM.from_pretrained(
        options.adapter,
        base_model=options.base_model,
        verify=not options.no_verify,
        **loading_options(options),
    )
    model.max_kl, model.min_kl, model.decay = dial.max_kl, dial.min_kl or None, dial.decay
    model.interpolation = model.checked_interpolation(dial.interpolation)
    if dial.adapter_weights is not None:
        weights = checked_weights(dial.adapter_weights, model.adapter_weights)
        model.adapter_weights = {name: float(weight) for name, weight in weights.items()}
    return model.to(default_device()), tokenizer_with(tokenizer_of(options.adapter, model.base_source), options)
