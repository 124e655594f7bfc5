"""Strengths that depend on the text so far: off inside code, JSON, reasoning and tool calls."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qadapter.modeling.mixing import StepState

PROMPT_END = 16  # tokens; more than any tag and the blanks after it


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
        if self.fences and text.count("```") % 2 == 1:
            return True
        if any(text.rfind(f"<{tag}>") > text.rfind(f"</{tag}>") for tag in self.tags):
            return True
        for tag in self.tags:  # what stands after the reasoning is the answer
            if text.strip().startswith(f"<{tag}>"):
                text = text.partition(f"</{tag}>")[2]
        return self.json_answers and open_json(text.strip())


def open_json(text: str) -> bool:
    """Whether `text` starts as a JSON object or array that has not ended yet."""
    if text[:1] not in ("{", "["):
        return False
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError:
        return True
    except RecursionError:
        return True
    return False
