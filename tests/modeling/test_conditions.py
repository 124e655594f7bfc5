"""Strengths that switch the adapter off inside code, JSON, reasoning and tool calls."""

import models
import pytest
import torch

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
    ],
)
def test_protected_regions_turn_the_adapter_off(text, off):
    assert OffInside(tokenizer=None).off(text) is off


@pytest.mark.parametrize(
    ("options", "text"),
    [({"fences": False}, "see ```x"), ({"json_answers": False}, '{"a": '), ({"tags": ["plan"]}, "<think>let me see")],
)
def test_regions_that_are_not_protected_keep_the_strength(options, text):
    assert OffInside(tokenizer=None).off(text)
    assert not OffInside(tokenizer=None, **options).off(text)


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
    for answer, strengths in {"so": [0.0, 1.0], "so</think>": [1.0, 1.0], 'so</think>{"a': [0.0, 1.0]}.items():
        written = torch.tensor([tokenizer(answer)["input_ids"]] * 2)
        state = StepState(torch.cat([prompt, written], dim=1), prompt.shape[1])
        assert condition(state).tolist() == strengths
