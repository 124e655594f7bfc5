"""Strengths that switch the adapter off inside code, JSON, reasoning and tool calls."""

import json
import time

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qadapter import OffInside, StepState


@pytest.mark.parametrize(
    ("text", "off"),
    [
        ("plain text", False),
        ("see ```python\nprint(1)", True),
        ("see ```python\nprint(1)\n``` done", False),
        ('{"name": "a", "items": [1, 2', True),
        ('{"name": "a"}', False),
        ('{"name": "a"} and then text', False),
        ("[1, 2", True),
        ("<think>let me see", True),
        ("<think>let me see</think>The answer", False),
        ('<think>let me see</think>\n{"name": ', True),
        ('<think>{</think>{"name": "a"} and', False),
        ('{"name": "</think>', True),
        ("<tool_call>{", True),
        ("a list [1, 2", False),
        ("[" * 100_000, True),  # deeper than the parser goes
        ("[" + "1" * 5000, True),  # longer than numbers are read
        ("<think>a block opens with ``` then</think>The answer", False),
        ("Use ``` to fence code. And now", False),
        ("Use ``` to fence code:\n```\nx", True),
        ("````md\n```python\nx = 1\n```\nstill inside", True),
        ("````md\n```python\nx = 1\n```\n````\nout", False),
        ("~~~python\nx", True),
        ("~~~python\n```\n~~~\nout", False),
        ("1. so:\n   ```python\n   x\n   ```\n2. then", False),
        ("```python\nprint('```')", True),
        ("```x``` is inline", False),
        ("[Your Name]\n[Address]\nDear", False),
        ("[note] this", False),
        ("[nul", True),
        ("[link](http://x) text", False),
        ("{name}, hello!", False),
        ('{ \n "name": ', True),
        ("{", True),
        ("[true, fal", True),
        ("[0-9]+ matches digits", False),
        ("[1. Introduction", False),
        ('["quoted" word] then', False),
        ('{"a": 1, } is broken', False),
        ('{"a": 1}\n{"b": "hel', True),
        ('{"a": 1}; {"b": "hel', True),
        ('Sure, here it is:\n{"a": "hel', True),
        ('Sure: {"a": "hel', True),
        ('Take {"a": 1} for that', False),
        ("> ```python\n> x\n> ```\nprose", False),
        ("> ```python\n> x", True),
        ("```js\n> ```\ncode", True),
        ("```xml\n<think>\n```\nprose", False),
        ("The tag `<think>` opens it", False),
        ('<think reason="x">let me', True),
        ("<thinking>let me</thinking> so", False),
        ("<think>so</think> and <think>again", True),
        ('[TOOL_CALLS][{"name": "f"}]', True),
        ('<|python_tag|>{"name": "f"}', True),
        ('<function=f>{"a": 1', True),
        ('<function=f>{"a": 1}</function> so', False),
        ('<|tool_call|>[{"name": "f"}]<|/tool_call|> so', False),
        ("<|channel|>analysis<|message|>let me", True),
        ("<|channel|>analysis<|message|>let me<|end|><|start|>assistant<|channel|>final<|message|>So", False),
    ],
)
def test_protected_regions_turn_the_adapter_off(text, off):
    assert OffInside(tokenizer=None).off(text) is off


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fences": False}, "see ```x"),
        ({"json_answers": False}, '{"a": '),
        ({"tags": ["plan"]}, "<think>let me see"),
        ({"regions": {}}, "[TOOL_CALLS]f"),
    ],
)
def test_regions_that_are_not_protected_keep_the_strength(options, text):
    assert OffInside(tokenizer=None).off(text)
    assert not OffInside(tokenizer=None, **options).off(text)


def test_marks_of_ones_own_are_protected():
    condition = OffInside(tokenizer=None, tags=(), regions={"BEGIN(": ")END"})
    assert condition.off("so BEGIN(x")
    assert not condition.off("so BEGIN(x)END <think>x")


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
OUTER = st.lists(VALUES, max_size=4) | st.dictionaries(st.text(), VALUES, max_size=4)


@given(OUTER, st.sampled_from([None, 1]), st.sampled_from(["", "So:\n"]))
def test_every_beginning_of_a_json_value_is_protected_and_the_whole_is_not(value, indent, before):
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    condition = OffInside(tokenizer=None)
    assert all(condition.off(before + text[:end]) for end in range(1, len(text)))
    assert not condition.off(before + text)


@given(st.text(alphabet='`~>{}[]"\\<think>/ \n,1a:'))
def test_any_text_is_read(text):
    assert OffInside(tokenizer=None).off(text) in (True, False)


def off_by_rest(condition, text):
    """The slow twin: what follows a region's end is a text of its own, in which everything is searched anew."""
    while True:
        openings = [condition._ahead(kind, text, 0) for kind in ("mark", "fence", "json")]
        if not any(openings):
            return False
        end = condition._end(text, min(filter(None, openings), key=lambda opening: opening.start()))
        if end is None:
            return True
        text = text[end:]


PIECES = ["{}", '{"a": 1}', "[1]", "[", "{", '"', "```", "```py\n", "~~~\n", "<think>", "</think>", "\n", " ", "x",
          "> ", "[THINK]", "[/THINK]", "<function=f>", "</function>", "`"]  # fmt: skip


@settings(max_examples=500)
@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_a_text_read_once_is_as_one_read_anew_after_each_region(text):
    condition = OffInside(tokenizer=None)
    assert condition.off(text) == off_by_rest(condition, text)


@pytest.mark.parametrize("region", ['{"a": [1, 2]}\n', "[1]\n", "<think></think>\n", "```\n```\n", "{}", "a ```b\n"])
def test_long_answers_of_many_regions_are_read_in_one_go(region):
    """A served row's token takes so long, and all other rows wait."""
    condition = OffInside(tokenizer=None)

    def seconds(count):
        text = region * count
        start = time.process_time()
        condition.off(text)
        return time.process_time() - start

    condition.off(region)
    assert min(seconds(4000) for _ in range(3)) < 12 * min(seconds(1000) for _ in range(3)) + 0.05


def test_conditional_strength_leaves_the_base_alone_inside_a_fence():
    tokenizer, base = models.tiny_tokenizer(), models.tiny_base()
    policy = models.tiny_policy(base)
    prompt = torch.tensor([tokenizer("ab")["input_ids"]])
    condition = OffInside(tokenizer, strength=0.8)
    fence = torch.cat([prompt, torch.tensor([tokenizer("```x")["input_ids"]])], dim=1)
    assert condition(StepState(fence, prompt.shape[1])).tolist() == [0.0]
    assert condition(StepState(prompt, prompt.shape[1])).tolist() == pytest.approx([0.8])
    cache = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():  # the answer up to here, as if the policy had opened the fence
        inside = policy.generate(fence, strength=lambda state: condition(StepState(state.input_ids, 2)), **cache)
    assert torch.equal(inside, base.generate(fence, **cache))
    assert not torch.equal(inside, policy.generate(fence, strength=0.8, **cache))


def test_reasoning_that_the_template_opens_in_the_prompt_is_protected():
    tokenizer = models.tiny_tokenizer()
    prompt = torch.tensor([tokenizer("why? <think> ")["input_ids"], tokenizer("<think> is it?")["input_ids"][:13]])
    condition = OffInside(tokenizer)
    for answer, strengths in {"so": [0.0, 1.0], "so</think>": [1.0, 1.0], "so</think>[1": [0.0, 1.0]}.items():
        written = torch.tensor([tokenizer(answer)["input_ids"]] * 2)
        state = StepState(torch.cat([prompt, written], dim=1), prompt.shape[1])
        assert condition(state).tolist() == strengths


def test_a_mark_that_opens_and_closes_alike_is_not_opened_by_the_end_of_a_prompt():
    condition = OffInside(models.tiny_tokenizer(), regions={"$$": "$$", "<sql>": "</sql>"})
    assert [condition.off(text) for text in ("so $$x^2", "so $$x^2$$ is", "so $$x$$ and $$y")] == [True, False, True]
    assert [condition.opened(text) for text in ("Solve $$x = 4$$", "Query: <sql>")] == ["", "<sql>"]
