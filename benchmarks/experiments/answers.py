"""Answers drawn from a policy: sampled ones to be judged, greedy ones of the base to be replayed; kept in a cache."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qadapter import QAdapterForCausalLM
from qadapter.evaluation.part_store import write_ordered_json
from qadapter.generation import Answer, Sampling, generate_texts

Prompt = list[dict[str, str]]


def sample_answers(
    policy: QAdapterForCausalLM,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    strength: float,
    seed: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
) -> list[Answer]:
    """One answer a prompt; the same seed draws the same answers on the same machine.

    Prompts go in order of length, so that a batch holds little padding; answers come in the order of `prompts`.
    """
    order = sorted(range(len(prompts)), key=lambda index: (len(json.dumps(prompts[index])), index))
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    drawn = generate_texts(
        policy, tokenizer, [prompts[index] for index in order], sampling, strength, batch_size=batch_size
    )
    return [answer for _, answer in sorted(zip(order, drawn, strict=True), key=lambda pair: pair[0])]


def cached_answers(path: Path, draw: Callable[[], list[Answer]]) -> list[Answer]:
    """The answers in the file, or those that `draw` gives, which are then written to it."""
    if not path.exists():
        write_ordered_json(path, [[answer.text, answer.finished] for answer in draw()])
    return [Answer(text, finished) for text, finished in json.loads(path.read_text(encoding="utf-8"))]
