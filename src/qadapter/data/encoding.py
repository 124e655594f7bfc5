"""A pair as token ids: one prompt that both answers continue, and answers closed by the end-of-turn token.

The loss compares both answers from the same state, so the sides have to leave the prompt at the same token.
Chats are rendered by the tokenizer's template straight to ids; rendering to text and tokenising that again
would add a second beginning-of-sequence token.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from qadapter.data.rows import Message, Pair, RowError
from qadapter.errors import DataError

UNUSABLE_VARIABLES = "unusable variables"  # the reason of a RowError
# What a template raises where a value is of another type, or out of range.
PYTHON_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class EncodedPair(NamedTuple):
    """`stable` is False where the template's generation prompt is not how it opens a finished answer."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    stable: bool = True


class ChatEncoder:
    """Encodes chat pairs with the tokenizer's template.

    The prompt is rendered with the generation prompt; each side is the whole conversation. Where the rendered
    prompt is no prefix of both sides (templates that open a finished answer differently, or text that merges
    over the boundary), the longest token prefix that all three share is the prompt, so that both sides still
    split at the same token. A prompt that loses more than how the answer is opened would be trained as an answer,
    and after another beginning than generation has: it is refused.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ending = template_ending(tokenizer)
        self.marks = template_marks(tokenizer)

    def encode(self, pair: Pair) -> EncodedPair:
        """The ids of a pair of messages; raises RowError for a row that the template cannot express."""
        self.require_bare(pair["prompt"])
        prompt_ids = render(self.tokenizer, pair["prompt"], add_generation_prompt=True)
        sides = [render(self.tokenizer, pair["prompt"] + pair[side]) for side in ("chosen", "rejected")]
        boundary = shared_prefix(prompt_ids, *sides)
        if boundary < len(prompt_ids):
            self.require_whole(pair["prompt"], prompt_ids, boundary)
        chosen_ids, rejected_ids = (self.close(ids[boundary:]) for ids in sides)
        return EncodedPair(prompt_ids[:boundary], chosen_ids, rejected_ids, stable=boundary == len(prompt_ids))

    def require_bare(self, prompt: list[Message]) -> None:
        """Refuse a prompt that was rendered before: its turns would all become one user's message."""
        if found := [mark for mark in self.marks if any(mark in message["content"] for message in prompt)]:
            raise RowError(
                "already rendered",
                f"the prompt's text contains {found[0]}, which the chat template writes itself: if it is already "
                "rendered, give messages, or the bare text",
            )

    def require_whole(self, prompt: list[Message], prompt_ids: list[int], boundary: int) -> None:
        """Refuse a prompt that the template writes otherwise before an answer, but for how it opens that.

        Mistral 7B Instruct v0.3 puts the system message into the last turn, where that is the user's.
        """
        bare = prompt_ids[: shared_prefix(prompt_ids, render(self.tokenizer, prompt))]
        lost = bare[boundary:]
        # One token may be text that merges with the answer's.
        if len(lost) > 1 and self.tokenizer.decode(lost).strip():
            text = " ".join(self.tokenizer.decode(prompt_ids[boundary:]).split())
            raise RowError(
                "prompt changed by its answer",
                f"the chat template writes the prompt's end ({text[:60]!r}) otherwise where an answer follows; if it "
                "moves a system message into the last turn, put that text into the user's message, else give the "
                "tokenizer a template that does not look at what follows",
            )

    def close(self, answer_ids: list[int]) -> list[int]:
        """The answer up to and including its end-of-turn token, without what the template writes after it."""
        if not self.ending:
            return closed(answer_ids, self.tokenizer)
        size = len(self.ending)
        if tuple(answer_ids[-size:]) != self.ending:
            raise RowError("no end of turn", "the chat template does not close this answer as it closes others")
        answer_ids = answer_ids[: len(answer_ids) - size + 1]
        require_single_end(answer_ids)
        return answer_ids


class PlainEncoder:
    """Encodes plain text pairs.

    Prompt and answer are tokenised apart, the prompt with the tokenizer's special tokens, the answer without
    and followed by the end-of-sequence token: the boundary is the same for both sides by construction, and
    at generation the prompt is tokenised exactly like this. Of a pair without a prompt, the words that both sides
    begin with are it.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def encode(self, pair: Pair) -> EncodedPair:
        """The ids of a pair of texts; raises RowError for a row without any prompt token."""
        chosen, rejected, prompt = pair["chosen"], pair["rejected"], pair["prompt"]
        shared = "" if prompt else shared_words(chosen, rejected)
        prompt_ids = self.prompt_ids(prompt or shared)
        if not prompt_ids:
            raise RowError("no prompt", "the prompt is empty and the tokenizer adds no token at the beginning")
        sides = (self.ids(side[len(shared) :], add_special_tokens=False) for side in (chosen, rejected))
        chosen_ids, rejected_ids = (closed(ids, self.tokenizer) for ids in sides)
        return EncodedPair(prompt_ids, chosen_ids, rejected_ids)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The prompt, with one beginning-of-sequence token if the tokenizer adds one, and not closed."""
        ids = self.ids(prompt, add_special_tokens=True)
        bare = self.ids(prompt, add_special_tokens=False)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        opened = bos is not None and ids[:1] == [bos] and bare[:1] != [bos]
        if eos is not None and ids[-1:] == [eos] and len(ids) > len(bare) + opened:
            ids = ids[:-1]  # some tokenizers close every text, but a prompt goes on
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def render(
    tokenizer: Any,
    messages: list[Message],
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The token ids of a conversation; `variables` are what the template reads besides, such as `enable_thinking`.

    Raises:
        RowError: the template refuses the conversation, or (`UNUSABLE_VARIABLES`) does not run with the variables.
    """
    from jinja2 import TemplateError, UndefinedError

    require_one_template(tokenizer)

    def ids(given: Mapping[str, Any]) -> list[int]:
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True, **given
        )
        return list(rendered["input_ids"])

    try:
        return ids(variables or {})
    except (TemplateError, *PYTHON_ERRORS) as error:
        # Such as text joined with a number, or a number asked for its length.
        if variables and isinstance(error, (UndefinedError, *PYTHON_ERRORS)):
            with suppress(TemplateError, *PYTHON_ERRORS):
                ids({})
                names = ", ".join(variables)
                raise RowError(UNUSABLE_VARIABLES, f"the chat template fails with {names} as given: {error}") from None
        if not isinstance(error, TemplateError):
            raise
        raise RowError("refused by template", f"the chat template refuses the conversation: {error}") from None


def shared_words(one: str, other: str) -> str:
    """The words that both texts begin with, where both go on: TRL's implicit prompt, which may end inside a word."""
    spaces = [match.start() for match in re.finditer(r"\s+", one[: shared_prefix(one, other)])]
    return one[: next((end for end in reversed(spaces) if one[end:].strip() and other[end:].strip()), 0)]


def require_one_template(tokenizer: Any) -> None:
    """Raise DataError for a tokenizer whose chat templates have names, of which none is the default."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise DataError(
            f"the tokenizer has the chat templates {', '.join(templates)}, and none is named default; set "
            "tokenizer.chat_template to one of them and save the tokenizer"
        )


def trained_end(tokenizer: Any) -> int | None:
    """The token that closes an answer in training: of the chat template, else the tokenizer's eos_token."""
    with suppress(RowError, *PYTHON_ERRORS):  # the template fails with the trial, as it would have in training
        if tokenizer.chat_template and (ending := template_ending(tokenizer)):
            return ending[0]
    return tokenizer.eos_token_id


def shared_prefix(*sequences: Sequence[Any]) -> int:
    """How many tokens (of texts: characters) all sequences start with."""
    columns = zip(*sequences, strict=False)
    return next((index for index, ids in enumerate(columns) if len(set(ids)) > 1), min(map(len, sequences)))


def template_ending(tokenizer: Any) -> tuple[int, ...]:
    """What the template writes after an answer, from its end-of-turn token on; empty if there is none.

    Two answers are rendered, and the tokens both end with are searched for the first added token: <|im_end|>
    and a newline in ChatML, <|eot_id|> in Llama 3, <|end|>, newline, <|endoftext|> in Phi-3.
    """
    question = {"role": "user", "content": "Question"}
    one, other = (
        render(tokenizer, [question, {"role": "assistant", "content": answer}]) for answer in ("one", "two times")
    )
    ending = one[len(one) - shared_prefix(one[::-1], other[::-1]) :]
    ends = {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip() and token_id != tokenizer.unk_token_id
    }
    return next((tuple(ending[index:]) for index, token_id in enumerate(ending) if token_id in ends), ())


def template_marks(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens that the template writes around a user's message; others, as <think>, may be text."""
    special = {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content.strip() and token_id != tokenizer.unk_token_id
    }
    ids = render(tokenizer, [{"role": "user", "content": "Question"}])
    return tuple(dict.fromkeys(special[token_id] for token_id in ids if token_id in special))


def closed(answer_ids: list[int], tokenizer: Any) -> list[int]:
    """The answer with one end-of-sequence token at its end; raises DataError if the tokenizer has none."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no eos_token, so no answer would ever end; set tokenizer.eos_token")
    answer_ids = answer_ids if answer_ids[-1:] == [eos] else [*answer_ids, eos]
    require_single_end(answer_ids)
    return answer_ids


def require_single_end(answer_ids: list[int]) -> None:
    """Generation stops at the first end-of-turn token, so nothing behind it can be an answer."""
    if answer_ids[-1] in answer_ids[:-1]:
        raise RowError(
            "end of turn inside",
            "the answer's text contains the end-of-turn token, which is added here: if it is already rendered, give "
            "messages, or the bare text",
        )
