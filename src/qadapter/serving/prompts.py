"""From messages or text to the ids the model continues."""

from collections.abc import Mapping, Sequence
from typing import Any

from qadapter.data.encoding import UNUSABLE_VARIABLES, PlainEncoder, render
from qadapter.data.rows import RowError
from qadapter.data.template_variables import unread_variable
from qadapter.serving.api_errors import ApiError, bad_request
from qadapter.serving.schema import Message


class PromptEncoder:
    """Encodes the prompts of requests, and holds them to the context's length."""

    def __init__(self, tokenizer: Any, vocabulary: int, context: int) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.context = context

    def chat(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[int]:
        """The conversation in the tokenizer's chat template, up to where the answer begins.

        Args:
            variables: what the template reads besides.

        Raises:
            ApiError: there is no template, it refuses the conversation, or a variable is not the client's to set or
                of a type that the template cannot use.
        """
        if not self.tokenizer.chat_template:
            raise bad_request(
                "the base model has no chat template: use /v1/completions.", "messages", "no_chat_template"
            )
        unread = unread_variable(self.tokenizer, variables)
        if unread is not None:
            message = f"the base model's chat template reads no variable {unread!r} of a request: leave it out."
            raise bad_request(message, "chat_template_kwargs")
        roles = {"developer": "system"}  # the older name is the one templates know
        rows = [{"role": roles.get(message.role, message.role), "content": message.text} for message in messages]
        try:
            return render(self.tokenizer, rows, add_generation_prompt=True, variables=variables)
        except RowError as error:
            param = "chat_template_kwargs" if error.reason == UNUSABLE_VARIABLES else "messages"
            raise bad_request(f"{error}.", param) from None

    def text(self, prompt: str | Sequence[int]) -> list[int]:
        """A text as the tokenizer begins texts, or ids as they are.

        Raises:
            ApiError: ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            return PlainEncoder(self.tokenizer).prompt_ids(prompt)
        wrong = next((token for token in prompt if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise bad_request(f"prompt holds the id {wrong}; ids lie in 0 ... {self.vocabulary - 1}.", "prompt")
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
