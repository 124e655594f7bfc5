"""What a chat template reads besides the conversation, such as Qwen 3's `enable_thinking`."""

import contextlib
import inspect
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from qadapter.errors import ConfigError


def unread_variable(tokenizer: Any, names: Iterable[str]) -> str | None:
    """The first of the names that the template does not read, or that is not the user's to set; None if all are."""
    # These say how to render (with another template, say), or the template has them from elsewhere.
    taken = {"self", "messages", "conversations", *tokenizer.special_tokens_map}
    taken |= inspect.signature(tokenizer.apply_chat_template).parameters.keys()
    template = tokenizer.get_chat_template()

    def read(name: str) -> bool:
        return name.isidentifier() and name not in taken and bool(re.search(rf"\b{name}\b", template))

    return next((name for name in names if not read(name)), None)


def fix_variables(tokenizer: Any, text: str) -> None:
    """Let the tokenizer's template begin with these variables, {"name": value} as JSON.

    Raises:
        ConfigError: no JSON object, a value that is no text, number, true or false, a name that the template does
            not read, or a value that it cannot be filled in with.
    """
    try:
        variables = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--chat-template-kwargs {text!r} is no JSON: {error}.") from error
    if not isinstance(variables, dict) or not all(map(_plain, variables.values())):
        raise ConfigError(
            f'--chat-template-kwargs {text!r}: give names with a text, a number, true or false: {{"enable_thinking": '
            "false}, say."
        )
    if not tokenizer.chat_template:
        raise ConfigError("--chat-template-kwargs: the base model has no chat template. Leave the option out.")
    unread = unread_variable(tokenizer, variables)
    if unread is not None:
        raise ConfigError(f"--chat-template-kwargs: the base model's chat template reads no variable {unread!r}.")
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in variables.items()}
    beginning = "".join(f"{{%- set {name} = {value} -%}}" for name, value in values.items())
    given, trial = tokenizer.chat_template, _conversation(tokenizer)
    tokenizer.chat_template = beginning + tokenizer.get_chat_template()
    if trial is None:
        return
    try:
        tokenizer.apply_chat_template(trial, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever the template's code raises
        tokenizer.chat_template = given
        raise ConfigError(
            f"--chat-template-kwargs {text!r}: the base model's chat template fails with it ({error}). Give values of "
            "the types that it expects."
        ) from error


def _conversation(tokenizer: Any) -> list[dict[str, str]] | None:
    """A conversation that the template can be filled in with; None if none is known."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
    for trial in (messages[1:], messages):
        with contextlib.suppress(Exception):  # whatever the template's code raises
            tokenizer.apply_chat_template(trial, add_generation_prompt=True, tokenize=False)
            return trial
    return None


def _plain(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
