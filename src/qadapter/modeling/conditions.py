"""Strengths that depend on the text so far: off inside code, JSON, reasoning and tool calls."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qadapter.modeling.mixing import StepState

PROMPT_END = 16  # tokens; more than any tag and the blanks after it
# Lines with a fence: what stands before it, its marks, and what follows.
FENCE = re.compile(r"^(.*?)(`{3,}|~{3,})(.*)$", re.MULTILINE)
INFO = re.compile(r"[\w+#.-]*\s*")  # the language, and nothing else: after a fence that opens within a line
# What may follow a bracket in JSON, as far as it is written; so "[Your name]" and "{name}" are none.
JSON_START = re.compile(
    r"\{\s*(?:[\"}]|$)|\[\s*(?:[\]\[{\"\d-]|$|t(?:r|$)(?:u|$)(?:e|$)|f(?:a|$)(?:l|$)(?:s|$)(?:e|$)|n(?:u|$)(?:l|$)(?:l|$))"
)


@dataclass
class OffInside:
    """A strength callable that turns the adapter off where its style would do harm.

    Off inside code fences, JSON (an answer that opens with a brace or bracket, after its reasoning if it has any) and
    tagged regions such as reasoning or tool calls, also where the chat template has opened the region at the end of the
    prompt; `strength` elsewhere. Any callable of a `StepState` can take its place.

    Args:
        tokenizer: decodes the generated part.
        strength: the strength outside.
        fences: off inside ``` fences.
        json_answers: off while an answer that starts as JSON has not closed.
        tags: names of the tags <name> ... </name> inside which it is off.
    """

    tokenizer: Any
    strength: float = 1.0
    fences: bool = True
    json_answers: bool = True
    tags: Sequence[str] = ("think", "tool_call")

    def __call__(self, state: StepState) -> Tensor:
        """The strength of each row (B,)."""
        prompts, answers = state.input_ids[:, : state.prompt_length], state.input_ids[:, state.prompt_length :]
        ends = self.tokenizer.batch_decode(prompts[:, -PROMPT_END:], skip_special_tokens=False)
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=False)
        whole = [self.opened(end) + text for end, text in zip(ends, texts, strict=True)]
        values = [0.0 if self.off(text) else self.strength for text in whole]
        return torch.tensor(values, device=state.input_ids.device)

    def opened(self, prompt: str) -> str:
        """The tag with which `prompt` ends, "" if it ends with none: some templates open the reasoning themselves."""
        return next((f"<{tag}>" for tag in self.tags if prompt.rstrip().endswith(f"<{tag}>")), "")

    def off(self, text: str) -> bool:
        """Whether the end of `text` lies inside a protected region."""
        if any(text.rfind(f"<{tag}>") > text.rfind(f"</{tag}>") for tag in self.tags):
            return True
        for tag in self.tags:  # what stands after the reasoning is the answer
            if text.strip().startswith(f"<{tag}>"):
                text = text.partition(f"</{tag}>")[2]
        return (self.fences and open_fence(text)) or (self.json_answers and open_json(text.strip()))


def open_fence(text: str) -> bool:
    """Whether `text` ends inside a code fence, as CommonMark has them, or one that opens at the end of a line of text.

    A fence is closed by one of the same character that is at least as long, begins its line and names no language.
    """
    opened = ""
    for before, marks, after in FENCE.findall(text):
        begins = not before.strip()
        if opened:
            closes = marks.startswith(opened) and begins and not after[:1].strip()
            opened = "" if closes else opened
        elif "`" not in after and (begins or (marks[0] == "`" and INFO.fullmatch(after))):
            opened = marks
    return bool(opened)


def open_json(text: str) -> bool:
    """Whether `text` starts as a JSON object or array that has not ended yet."""
    if not JSON_START.match(text):
        return False
    try:
        json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):  # the former is JSONDecodeError, too, and that of an endless number
        return True
    return False
