"""Chat messages: checked, and split into the prompt that both sides share and one answer a side."""

import re
from typing import Any

from qadapter.data.rows import Message, Pair, RowError

# Role names as datasets write them (OpenAI style and ShareGPT style) and the name that templates know.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
# Keys by which a message is more than its content, and what to do about them.
UNREAD = {
    "tool_calls": "pairs with tool calls are not supported",
    "function_call": "pairs with tool calls are not supported",
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        "put it into the content, marked as the chat template does, or remove it",
    ),
}
# How a list of messages, or one, begins that was written as text: as JSON, as Python's repr, or as numpy's.
WRITTEN_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*(["'])(?:role|content|from|value)\1\s*:""")
WRITTEN_ROLE = re.compile(rf"""(["'])(?:role|from)\1\s*:\s*(["'])(?:{"|".join(ROLES)})\2""")
WRITTEN_CONTENT = re.compile(r"""(["'])(?:content|value)\1\s*:""")


def as_text(value: Any, name: str) -> str:
    """`value` if it is text that can be stored as UTF-8; raises RowError otherwise."""
    if value is None:
        raise RowError("no answer" if name in ("chosen", "rejected") else "no prompt", f"{name} is missing")
    if not isinstance(value, str):
        raise RowError("wrong type", f"{name} is {type(value).__name__}, text is needed")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(
                "wrong type",
                f"{name} holds half of a surrogate pair at character {error.start}, which is no Unicode text",
            ) from None
    return value


def as_bare_text(value: Any, name: str) -> str:
    """`as_text`, but no messages that were written as text, as CSV files hold them; raises RowError."""
    text = as_text(value, name)
    if WRITTEN_MESSAGES.match(text) and WRITTEN_ROLE.search(text) and WRITTEN_CONTENT.search(text):
        raise RowError(
            "messages as text",
            f"{name} is text that spells out messages ({' '.join(text[:40].split())} ...); give them as a list of "
            "objects, in JSON Lines or Parquet (json.loads reads JSON, ast.literal_eval Python's repr)",
        )
    return text


def as_messages(value: Any, name: str) -> list[Message]:
    """A list of {"role", "content"}; a single message counts as a list of one. Raises RowError."""
    if value is None:
        raise RowError("no answer" if name in ("chosen", "rejected") else "no prompt", f"{name} is missing")
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise RowError("wrong type", f"{name} is {type(value).__name__}, a list of messages is needed")
    return [as_message(message, f"{name}[{index}]") for index, message in enumerate(messages)]


def as_message(value: Any, name: str) -> Message:
    """{"role", "content"} from an OpenAI-style or ShareGPT-style message; other keys are left out."""
    if not isinstance(value, dict):
        raise RowError("wrong type", f"{name} is {type(value).__name__}, a message with role and content is needed")
    for key, way_out in UNREAD.items():
        if value.get(key):
            raise RowError("wrong type", f"{name} has {key}, which a pair of text would lose; {way_out}")
    keys = ("from", "value") if value.get("role") is None and value.get("from") is not None else ("role", "content")
    role = as_text(value.get(keys[0]), f"{name}.{keys[0]}")
    if role not in ROLES:
        raise RowError("wrong type", f"{name} has the role {role!r}; known roles are {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": as_text(joined_parts(value.get(keys[1])), f"{name}.{keys[1]}")}


def joined_parts(content: Any) -> Any:
    """A content of text parts, [{"type": "text", "text": ...}], as one text, as `qadapter serve` joins them."""
    if not isinstance(content, list) or not content:
        return content
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts: list[str] = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    return "".join(texts) if len(texts) == len(content) else content


def user(content: str) -> list[Message]:
    """A conversation of one user message."""
    return [{"role": "user", "content": content}]


def assistant(content: str) -> list[Message]:
    """A conversation of one assistant message."""
    return [{"role": "assistant", "content": content}]


def split_implicit(chosen: list[Message], rejected: list[Message]) -> Pair:
    """The pair in two full conversations; the prompt is every message before the last.

    The split is made between messages, never inside one, so that both sides share the state in which the
    answer starts (TRL's extract_prompt compares characters and may split inside a word).
    """
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages:
            raise RowError("no answer", f"{name} holds no message")
    if chosen == rejected:
        raise identical_answers()
    if chosen[:-1] != rejected[:-1]:
        shared = leading_messages(chosen, rejected)
        raise RowError(
            "prompts differ",
            f"chosen ({len(chosen)} messages) and rejected ({len(rejected)}) part after message {shared}, "
            "before the last one: both sides have to answer the same prompt with one message",
        )
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def leading_messages(one: list[Message], other: list[Message]) -> int:
    """How many messages both conversations start with."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def split_explicit(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Pair:
    """The pair for a given prompt, which the sides may repeat in front of their answer."""
    return {
        "prompt": prompt,
        "chosen": answer_after(prompt, chosen, "chosen"),
        "rejected": answer_after(prompt, rejected, "rejected"),
    }


def answer_after(prompt: list[Message], side: list[Message], name: str) -> list[Message]:
    """The messages of a side without the prompt it repeats; raises RowError if it starts with another one."""
    if side[: len(prompt)] == prompt:
        return side[len(prompt) :]
    if side and side[0]["role"] != "assistant":
        shared = leading_messages(prompt, side)
        raise RowError("prompts differ", f"{name} repeats another prompt: message {shared + 1} is not the prompt's")
    return side


def with_system(prompt: list[Message], system: str) -> list[Message]:
    """The prompt with `system` as its first message; one that is there already has to be the same."""
    if not prompt or prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"] != system:
        raise RowError("prompts differ", "the system column and the system message of the prompt differ")
    return prompt


def as_chat(pair: Pair) -> Pair:
    """The pair as messages; plain text becomes one user message and one assistant message a side."""
    if not isinstance(pair["prompt"], str):
        return pair
    if not pair["prompt"].strip():
        raise RowError("no prompt", "the prompt is empty; a chat needs a user message: fill a column prompt")
    return {
        "prompt": user(pair["prompt"]),
        "chosen": assistant(pair["chosen"]),
        "rejected": assistant(pair["rejected"]),
    }


def checked_chat(pair: Pair) -> Pair:
    """The pair if each side is one assistant message with text and they differ; raises RowError."""
    check_prompt(pair["prompt"])
    for name in ("chosen", "rejected"):
        check_answer(pair[name], name)
    if pair["chosen"] == pair["rejected"]:
        raise identical_answers()
    return pair


def check_prompt(prompt: list[Message]) -> None:
    if not prompt or not prompt[-1]["content"].strip():
        raise RowError("no prompt", "the prompt is empty")
    if prompt[-1]["role"] == "assistant":
        raise RowError("no prompt", "the prompt ends with an assistant message; a user message has to come last")


def check_answer(answer: list[Message], name: str) -> None:
    if len(answer) > 1:
        raise RowError(
            "several messages",
            f"the {name} answer has {len(answer)} messages; one assistant message after the prompt is needed",
        )
    if not answer or not answer[0]["content"].strip():
        raise RowError("no answer", f"{name} holds no answer")
    if answer[0]["role"] != "assistant":
        raise RowError("no answer", f"{name} ends with the role {answer[0]['role']!r}, the assistant has to answer")


def identical_answers() -> RowError:
    return RowError("identical answers", "chosen and rejected are the same; a pair needs two different answers")
