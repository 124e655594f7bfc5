"""What transformers calls a decoder's cache of keys and values: `cache` from 5.24 on, `past_key_values` before."""

from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

from qadapter.errors import ConfigError

NAMES = ("cache", "past_key_values")
CACHE = next(name for name in NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)


def cache_of(output: Any) -> Any:
    """The cache in what a decoder, a causal LM or `generate` returned."""
    return getattr(output, CACHE)


def given_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache of a call, whichever name it was given by; raises ConfigError where both were used."""
    if cache is not None and past_key_values is not None:
        raise ConfigError("cache and past_key_values are two names of one argument: give one of them.")
    return past_key_values if cache is None else cache
