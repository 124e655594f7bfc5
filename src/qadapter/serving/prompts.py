"""From messages or text to the ids the model continues."""

from collections.abc import Mapping, Sequence
from typing import Any

from qadapter.data.encoding import UNUSABLE_VARIABLES, PlainEncoder, render, require_one_template
from qadapter.data.rows import RowError
from qadapter.data.template_variables import unread_variable
from qadapter.serving.api_errors import ApiError, bad_request
from qadapter.serving.schema import Message


class PromptEncoder:
    """Encodes the prompts of requests, and holds them to the context's length."""

    def __init__(self, tokenizer: Any, vocabulary: int, context: int) -> None:
        require_one_template(tokenizer)
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.context = context

    def chat(self, messages: Sequence[Message], variables: Mapping[str, Any], effort: str | None = None) -> list[int]:
        """The conversation in the tokenizer's chat template, up to where the answer begins.

        Args:
            variables: what the template reads besides.
            effort: how much to reason, in OpenAI's words, of which templates know some.

        Raises:
            ApiError: there is no template, it refuses the conversation, a variable is not the client's to set or of
                a type that the template cannot use, or the template knows no effort.
        """
        if not self.tokenizer.chat_template:
            raise bad_request(
                "the base model has no chat template: use /v1/completions.", "messages", "no_chat_template"
            )
        unread = unread_variable(self.tokenizer, variables)
        if unread is not None:
            message = f"the base model's chat template reads no variable {unread!r} of a request: leave it out."
            raise bad_request(message, "chat_template_kwargs")
        rows = [_row(message) for message in messages]
        variables = {**self._effort(effort), **variables}
        try:
            return render(self.tokenizer, rows, add_generation_prompt=True, variables=variables)
        except RowError as error:
            param = "chat_template_kwargs" if error.reason == UNUSABLE_VARIABLES else "messages"
            raise bad_request(f"{error}.", param) from None

    def _effort(self, effort: str | None) -> dict[str, Any]:
        """The template's variables for an effort."""

        def reads(name: str) -> bool:
            return unread_variable(self.tokenizer, [name]) is None

        if effort is None:
            return {}
        if reads("reasoning_effort"):
            return {"reasoning_effort": effort}
        if effort == "none" and reads("enable_thinking"):
            return {"enable_thinking": False}
        if effort == "none" and "think" not in self.tokenizer.get_chat_template():
            return {}  # nothing to turn off
        message = f"reasoning_effort {effort!r}: the base model's chat template has no such choice: leave it out."
        raise bad_request(message, "reasoning_effort", "unsupported_parameter")

    def text(self, prompt: str | Sequence[int]) -> list[int]:
        """A text as the tokenizer begins texts, or ids as they are.

        Raises:
            ApiError: ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            return PlainEncoder(self.tokenizer).prompt_ids(prompt)
        wrong = next((token for token in prompt if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            text = f"prompt holds the id {str(wrong)[:40]}; ids lie in 0 ... {self.vocabulary - 1}."
            raise bad_request(text, "prompt")
        return list(prompt)

    def answer_tokens(self, prompt_ids: Sequence[int], wanted: int | None, param: str) -> int:
        """How long the answer may become: what was asked for, else the rest of the context.

        Raises:
            ApiError: an empty prompt, or more tokens than the context holds.
        """
        if not prompt_ids:
            raise bad_request(f"{param} holds no token.", param)
        if len(prompt_ids) + (1 if wanted is None else wanted) > self.context:
            message = (
                f"this server's context is {self.context} tokens, but the prompt has {len(prompt_ids)} and the answer "
                f"was to have {'at least 1' if wanted is None else f'up to {wanted}'}: shorten one of them."
            )
            raise ApiError(400, message, "context_length_exceeded", param)
        return self.context - len(prompt_ids) if wanted is None else wanted


def _row(message: Message) -> dict[str, str]:
    """A message as templates read it."""
    role = "system" if message.role == "developer" else message.role  # the older name is the one templates know
    name = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": message.text, **name}
