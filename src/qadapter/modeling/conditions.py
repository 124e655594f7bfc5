"""Strengths that depend on the text so far: off inside code, JSON, reasoning and tool calls."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qadapter.modeling.mixing import StepState

PROMPT_END = 16  # tokens; more than any mark and the blanks after it
# What opens reasoning or a tool call, and what closes it: "" if nothing but the answer's end does.
REGIONS = {
    "[TOOL_CALLS]": "",  # Mistral
    "[THINK]": "[/THINK]",
    "<|python_tag|>": "",  # Llama 3
    "<function=": "</function>",
    "<|tool_call|>": "<|/tool_call|>",  # Phi 4; Granite closes it nowhere
    "<|channel|>analysis": "<|end|>",  # gpt-oss
    "<|channel|>commentary": "<|end|>",
    "<|tool_calls_section_begin|>": "<|tool_calls_section_end|>",  # Kimi
    "<\uff5ctool\u2581calls\u2581begin\uff5c>": "<\uff5ctool\u2581calls\u2581end\uff5c>",  # DeepSeek
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command
    "<|START_ACTION|>": "<|END_ACTION|>",
}
# Lines with a fence: what stands before it, its marks, and what follows.
REST_WITH_FENCE = re.compile(r"(.*?)(`{3,}|~{3,})(.*)$", re.MULTILINE)
FENCE = re.compile(f"^{REST_WITH_FENCE.pattern}", re.MULTILINE)
BEFORE_FENCE = " \t>"  # a fence may stand in a quotation
INFO = re.compile(r"[\w+#.-]*\s*")  # the language, and nothing else: after a fence that opens within a line
# What may follow a bracket in JSON, as far as it is written; so "[Your name]", "[0-9]" and "{name}" are none.
NUMBER = r"-?(?:\d+(?:\.\d*)?(?:[eE][+-]?\d*)?)?\s*(?:[,\]]|\Z)"
WORD = r"t(?:r|\Z)(?:u|\Z)(?:e|\Z)|f(?:a|\Z)(?:l|\Z)(?:s|\Z)(?:e|\Z)|n(?:u|\Z)(?:l|\Z)(?:l|\Z)"
JSON_START = rf"(?:\{{\s*(?:[\"}}]|\Z)|\[\s*(?:[\]\[{{\"]|{NUMBER}|{WORD}))"
# At the beginning of a line any JSON, within one an object with a key.
REST_WITH_JSON = re.compile(rf"[ \t>]*(?={JSON_START})")
JSON = re.compile(rf"^{REST_WITH_JSON.pattern}|(?=\{{\s*\")", re.MULTILINE)
STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


@dataclass
class OffInside:
    """A strength callable that turns the adapter off where its style would do harm.

    Off inside code fences, JSON (what begins a line or, for an object, stands within one), and the regions of reasoning
    and tool calls that models mark, also where the chat template has opened the region at the end of the prompt;
    `strength` elsewhere. Any callable of a `StepState` can take its place.

    Args:
        tokenizer: decodes the generated part.
        strength: the strength outside.
        fences: off inside ``` fences.
        json_answers: off while an object or array of JSON has not closed.
        tags: names of the tags <name> ... </name> inside which it is off.
        regions: other marks that open a region, and the mark that closes it; "" if the answer's end does. A mark or tag
            right after a quotation mark or a backtick is only spoken of, and opens none.
    """

    tokenizer: Any
    strength: float = 1.0
    fences: bool = True
    json_answers: bool = True
    tags: Sequence[str] = ("think", "thinking", "reasoning", "thought", "tool_call", "tool_calls")
    regions: Mapping[str, str] = field(default_factory=lambda: dict(REGIONS))

    def __post_init__(self) -> None:
        kinds = [*(rf"<({re.escape(tag)})(?:\s[^<>]*)?>" for tag in self.tags), *map(re.escape, self.regions)]
        self._mark = re.compile(rf"(?<![`'\"])(?:{'|'.join(kinds)})") if kinds else None

    def __call__(self, state: StepState) -> Tensor:
        """The strength of each row (B,)."""
        prompts, answers = state.input_ids[:, : state.prompt_length], state.input_ids[:, state.prompt_length :]
        ends = self.tokenizer.batch_decode(prompts[:, -PROMPT_END:], skip_special_tokens=False)
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=False)
        values = [self._value(end, text) for end, text in zip(ends, texts, strict=True)]
        return torch.tensor(values, device=state.input_ids.device)

    def after(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> float:
        """The strength of the token that follows a row's prompt and answer so far, without padding."""
        end, text = (
            self.tokenizer.decode(list(ids), skip_special_tokens=False)
            for ids in (prompt_ids[-PROMPT_END:], answer_ids)
        )
        return self._value(end, text)

    def _value(self, prompt_end: str, answer: str) -> float:
        return 0.0 if self.off(self.opened(prompt_end) + answer) else self.strength

    def opened(self, prompt: str) -> str:
        """The mark with which `prompt` ends, "" if it ends with none: some templates open the reasoning themselves.

        Of a mark that also closes its region it cannot be said which it does here: it counts as closing.
        """
        marks = [mark.group() for mark in self._mark.finditer(prompt)] if self._mark else []
        last = marks[-1] if marks and prompt.rstrip().endswith(marks[-1]) else ""
        return "" if self.regions.get(last) == last else last

    def off(self, text: str) -> bool:
        """Whether the end of `text` lies inside a protected region."""
        place = 0
        ahead: dict[str, re.Match[str] | None] = {}  # searched for once, not once a region: answers may be long
        while True:
            openings: list[re.Match[str]] = []
            for kind in ("mark", "fence", "json"):
                known = ahead.get(kind)
                if kind not in ahead or (known is not None and known.start() < place):
                    ahead[kind] = self._ahead(kind, text, place)
                openings += filter(None, (self._here(kind, text, place), ahead[kind]))
            if not openings:
                return False
            end = self._end(text, min(openings, key=lambda opening: opening.start()))
            if end is None:
                return True
            place = end

    def _ahead(self, kind: str, text: str, place: int) -> re.Match[str] | None:
        """The first opening of a kind that begins at a place or after it."""
        if kind == "mark":
            return self._mark.search(text, place) if self._mark else None
        if kind == "fence":
            return next(filter(opens_fence, FENCE.finditer(text, place)), None) if self.fences else None
        return JSON.search(text, place) if self.json_answers else None

    def _here(self, kind: str, text: str, place: int) -> re.Match[str] | None:
        """The opening of a kind at a place in a line, after a region's end: what follows is read as a line."""
        if kind == "fence" and self.fences and has_fence(text, place):
            rest = REST_WITH_FENCE.match(text, place)
            return rest if rest is not None and opens_fence(rest) else None
        return REST_WITH_JSON.match(text, place) if kind == "json" and self.json_answers else None

    def _end(self, text: str, opening: re.Match[str]) -> int | None:
        """Where the region ends that begins so; None if it does not."""
        if opening.re in (FENCE, REST_WITH_FENCE):
            lines = FENCE.finditer(text, opening.end())
            return next((line.end() for line in lines if closes_fence(line, opening)), None)
        if opening.re in (JSON, REST_WITH_JSON):
            return json_end(text, opening.end())
        tag = next(filter(None, opening.groups()), None)
        closing = f"</{tag}>" if tag else self.regions[opening.group()]
        place = text.find(closing, opening.end()) if closing else -1
        return None if place < 0 else place + len(closing)


def has_fence(text: str, place: int) -> bool:
    """Whether marks stand in the rest of a line: much faster to tell than what they mean."""
    end = text.find("\n", place)
    return any(text.find(marks, place, len(text) if end < 0 else end) >= 0 for marks in ("```", "~~~"))


def opens_fence(line: re.Match[str]) -> bool:
    """Whether a line with such marks opens a fence, as CommonMark has it, or at the end of a line of text."""
    before, marks, after = line.groups()
    begins = not before.strip(BEFORE_FENCE)
    return "`" not in after and (begins or (marks[0] == "`" and bool(INFO.fullmatch(after))))


def closes_fence(line: re.Match[str], opening: re.Match[str]) -> bool:
    """Whether it closes such a fence: as long at least, first in its line or quotation, and naming no language."""
    before, marks, after = line.groups()
    quoted = ">" in before and ">" not in opening[1]  # a quotation within the code
    return marks.startswith(opening[2]) and not quoted and not before.strip(BEFORE_FENCE) and not after[:1].strip()


def json_end(text: str, start: int) -> int | None:
    """Where the JSON ends that begins with the bracket at `start`, by its brackets alone; None if it does not."""
    depth = 0
    for part in STRING_OR_BRACKET.finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(part.group(), 0)
        if depth == 0:
            return part.end()
    return None
