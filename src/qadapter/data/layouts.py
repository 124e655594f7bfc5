"""The layouts in which preference pairs are published: how each is told from the others and read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qadapter.data.messages import as_bare_text, as_messages, as_text, assistant, split_explicit, split_implicit, user
from qadapter.data.rows import Message, Pair, Row, RowError
from qadapter.data.transcripts import is_transcript, messages_of, prompt_messages_of

SYSTEM_COLUMNS = ("system", "system_prompt")
PROMPT_COLUMNS = (
    "prompt",
    "query",
    "question",
    "instruction",
)  # the first one that is there holds the prompt


CHAT_COLUMNS = ("prompt", "messages", "conversations")  # likewise, of conversations


def filled(value: Any) -> bool:
    """Whether a column's value holds anything."""
    return value is not None and value not in ("", [])


@dataclass(frozen=True)
class Layout:
    """`matches` tells it by an example row, `read` gives a row's pair.

    The first filled column of `prompts` is the prompt, `answers` hold the rest.
    """

    chat: bool
    matches: Callable[[Row], bool]
    read: Callable[[Row], Pair]
    prompts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ("chosen", "rejected")

    def columns_read(self, row: Row) -> set[str]:
        """The columns of a row from which its pair is made."""
        prompt = next((name for name in self.prompts if filled(row.get(name))), None)
        system = next((name for name in SYSTEM_COLUMNS if row.get(name)), None)
        extra = "input" if prompt == "instruction" else None
        return {name for name in (prompt, extra, system, *self.answers) if name is not None and name in row}


def first_present(row: Row, names: tuple[str, ...]) -> Any:
    """The first of the named columns that holds something; else an empty one's value, or None where there is none."""
    values = [row[name] for name in names if row.get(name) is not None]
    return next((value for value in values if filled(value)), values[0] if values else None)


def system_text(row: Row) -> Any:
    """What the first filled system column holds, or None."""
    return next((row[name] for name in SYSTEM_COLUMNS if row.get(name)), None)


def answers(row: Row) -> tuple[Any, Any]:
    return row.get("chosen"), row.get("rejected")


def has_answers(row: Row, kind: type | tuple[type, ...]) -> bool:
    return all(isinstance(answer, kind) for answer in answers(row))


def has_transcripts(row: Row) -> bool:
    return has_answers(row, str) and is_transcript(row["chosen"]) and is_transcript(row["rejected"])


def has_prompt_transcript(row: Row) -> bool:
    return has_answers(row, str) and isinstance(row.get("prompt"), str) and is_transcript(row["prompt"])


def has_prompt_messages(row: Row) -> bool:
    prompt = row.get("prompt")
    return isinstance(prompt, list) or (isinstance(prompt, dict) and not {"role", "from"}.isdisjoint(prompt))


def has_prompt_text(row: Row) -> bool:
    return isinstance(first_present(row, PROMPT_COLUMNS), str)


def has_only_answers(row: Row) -> bool:
    """Without a prompt column another text column may be the prompt under a name we do not know."""
    others = [value for name, value in row.items() if name not in ("chosen", "rejected", *SYSTEM_COLUMNS)]
    return has_answers(row, str) and not any(isinstance(value, str | list | dict) for value in others)


def read_scored_texts(row: Row) -> Pair:
    """DSP as converted for the Q-Adapter paper: two transcripts and their two scores."""
    texts, scores = row.get("text"), row.get("score")
    if not isinstance(texts, list) or not isinstance(scores, list) or not len(texts) == len(scores) == 2:
        raise RowError("wrong type", "text and score have to be lists of two")
    numeric = all(isinstance(score, int | float) for score in scores)
    if not numeric or not (scores[0] > scores[1] or scores[0] < scores[1]):  # a comparison with NaN is never true
        raise RowError("wrong type", "score has to be two different numbers, the higher one for the chosen text")
    chosen, rejected = texts if scores[0] > scores[1] else reversed(texts)
    return read_transcripts({"chosen": chosen, "rejected": rejected})


def read_transcripts(row: Row) -> Pair:
    chosen, rejected = (messages_of(as_text(row.get(name), name), name) for name in ("chosen", "rejected"))
    return split_implicit(chosen, rejected)


def read_prompt_transcript(row: Row) -> Pair:
    prompt = prompt_messages_of(as_text(row.get("prompt"), "prompt"))
    chosen, rejected = (assistant(as_text(row.get(name), name).strip()) for name in ("chosen", "rejected"))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def read_output_list(row: Row) -> Pair:
    output = row.get("output")
    if not isinstance(output, list) or len(output) != 2:
        raise RowError("wrong type", "output has to be the list [chosen, rejected]")
    return read_text({**row, "chosen": output[0], "rejected": output[1]})


def read_text(row: Row) -> Pair:
    chosen, rejected = (as_bare_text(row.get(name), name) for name in ("chosen", "rejected"))
    return {"prompt": prompt_text(row), "chosen": chosen, "rejected": rejected}


def prompt_text(row: Row) -> str:
    """The prompt; Alpaca's optional input follows its instruction on a new line."""
    prompt = as_bare_text(first_present(row, PROMPT_COLUMNS), "prompt")
    if row.get("instruction") is None or prompt != row["instruction"]:
        if row.get("input"):
            raise RowError(
                "wrong type",
                "input is filled, but it continues an instruction only: name the prompt's column instruction in the "
                "data, or leave input out with --columns prompt=NAME",
            )
        return prompt
    if row.get("history"):
        raise RowError("wrong type", "history is not supported; give the conversation as a messages column")
    extra = as_text(row.get("input") or "", "input")
    return f"{prompt}\n{extra}" if extra else prompt


def read_text_without_prompt(row: Row) -> Pair:
    if first_present(row, PROMPT_COLUMNS):
        raise RowError("wrong type", "a prompt, but the first rows have none and were taken as answers only")
    chosen, rejected = (as_bare_text(row.get(name), name) for name in ("chosen", "rejected"))
    return {"prompt": "", "chosen": chosen, "rejected": rejected}


def read_conversations(row: Row) -> Pair:
    """Prompt messages under prompt, messages or conversations; answers as messages, one message or text."""
    chosen, rejected = (answer_messages(row.get(name), name) for name in ("chosen", "rejected"))
    prompt = first_present(row, CHAT_COLUMNS)
    beside = next((name for name in CHAT_COLUMNS[1:] if isinstance(row.get(name), list)), None)
    if isinstance(prompt, str) and beside is not None:
        raise RowError(
            "wrong type",
            f"prompt is text and {beside} holds messages: say which is the prompt, --columns prompt=prompt or "
            f"prompt={beside}",
        )
    prompt = as_messages(prompt, "prompt")
    # UltraFeedback's messages column holds the chosen answer once more.
    if prompt and chosen and prompt[-1] == chosen[-1] and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    return split_explicit(prompt, chosen, rejected)


def answer_messages(value: Any, name: str) -> list[Message]:
    return assistant(as_bare_text(value, name)) if isinstance(value, str) else as_messages(value, name)


def read_answers_with_prompt_text(row: Row) -> Pair:
    """UltraFeedback: the prompt as text, and sides that are full conversations or only the answer."""
    prompt = prompt_text(row)
    chosen, rejected = (as_messages(row.get(name), name) for name in ("chosen", "rejected"))
    if len(chosen) == len(rejected) == 1:
        return {"prompt": user(prompt), "chosen": chosen, "rejected": rejected}
    pair = split_implicit(chosen, rejected)
    asked = [message["content"].strip() for message in pair["prompt"] if message["role"] == "user"]
    if prompt.strip() not in asked:
        raise RowError("prompts differ", "the prompt column is none of the user messages of chosen and rejected")
    return pair


def read_answers(row: Row) -> Pair:
    chosen, rejected = (as_messages(row.get(name), name) for name in ("chosen", "rejected"))
    return split_implicit(chosen, rejected)


# Tried in this order; the first that matches is taken.
LAYOUTS = {
    "dsp": Layout(  # text: two transcripts, score: two numbers
        True,
        lambda row: isinstance(row.get("text"), list) and isinstance(row.get("score"), list),
        read_scored_texts,
        answers=("text", "score"),
    ),
    "alpaca-output": Layout(  # instruction, optional input, output: [chosen, rejected]
        False,
        lambda row: isinstance(row.get("instruction"), str) and isinstance(row.get("output"), list),
        read_output_list,
        PROMPT_COLUMNS,
        ("output",),
    ),
    "hh-rlhf": Layout(  # chosen, rejected: transcripts starting with '\n\nHuman:'
        True, has_transcripts, read_transcripts
    ),
    "hh-rlhf-prompt": Layout(  # prompt: transcript ending with '\n\nAssistant:', chosen, rejected: text
        True,
        has_prompt_transcript,
        read_prompt_transcript,
        ("prompt",),
    ),
    "chat": Layout(  # prompt: messages or one, chosen, rejected: messages
        True,
        lambda row: has_prompt_messages(row) and has_answers(row, (list, dict, str)),
        read_conversations,
        CHAT_COLUMNS,
    ),
    "ultrafeedback": Layout(  # prompt: text, chosen, rejected: messages
        True,
        lambda row: has_prompt_text(row) and has_answers(row, (list, dict)),
        read_answers_with_prompt_text,
        PROMPT_COLUMNS,
    ),
    "messages": Layout(  # messages: messages, chosen, rejected: messages, one message or text
        True,
        lambda row: isinstance(row.get("messages"), list) and has_answers(row, (list, dict, str)),
        read_conversations,
        CHAT_COLUMNS,
    ),
    "sharegpt": Layout(  # conversations: list of {from, value}, chosen, rejected: {from, value}
        True,
        lambda row: isinstance(row.get("conversations"), list) and has_answers(row, (list, dict, str)),
        read_conversations,
        CHAT_COLUMNS,
    ),
    "chat-implicit": Layout(  # chosen, rejected: conversations that differ in the last message
        True,
        lambda row: has_answers(row, (list, dict)),
        read_answers,
    ),
    "plain": Layout(  # prompt, query, question or instruction with input, chosen, rejected: text
        False,
        # Of any type: that a prompt is a number, say, is an error of its row.
        lambda row: all(value is not None for value in (first_present(row, PROMPT_COLUMNS), *answers(row))),
        read_text,
        PROMPT_COLUMNS,
    ),
    "plain-implicit": Layout(  # chosen, rejected: text, and no other text column
        False, has_only_answers, read_text_without_prompt
    ),
}
