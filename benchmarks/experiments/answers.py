"""Answers drawn from a policy: sampled ones to be judged, greedy ones of the base to be replayed; kept in a cache."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from qadapter import QAdapterForCausalLM
from qadapter.generation import Answer, encode, end_tokens, ending_arguments
from qadapter.new_folders import write_ordered_json

Prompt = list[dict[str, str]]


class CommonNoise(LogitsProcessor):
    """Turns greedy decoding into sampling: the largest of logits / temperature + Gumbel noise is a draw from them.

    Rows come in `copies` of a batch of prompts, one a strength. All copies of a prompt get the same noise at the same
    place of the answer, and so does another policy with the same seed and prompts: then answers differ because the
    policies do.
    """

    def __init__(self, temperature: float, copies: int, seed: int) -> None:
        self.temperature, self.copies, self.seed = temperature, copies, seed
        self.generator: torch.Generator | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Noisy scores (copies · prompts, V) in float32."""
        if self.generator is None:
            self.generator = torch.Generator(scores.device).manual_seed(self.seed)
        shape = (len(scores) // self.copies, scores.shape[1])
        waits = torch.empty(shape, device=scores.device).exponential_(generator=self.generator)
        return scores.float() / self.temperature - waits.log().repeat(self.copies, 1)


@torch.no_grad()
def sample_answers(
    policy: QAdapterForCausalLM,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    strengths: Sequence[float],
    seed: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    min_kl: float | None = None,
) -> list[list[Answer]]:
    """For each strength one answer a prompt; the same seed draws the same answers on the same machine.

    Prompts go in order of length, so that a batch holds little padding, and all strengths of a prompt in one batch;
    answers come in the order of `prompts`.

    Args:
        temperature: 0 takes the likeliest token each time.
        batch_size: prompts a batch.
        min_kl: threshold of the dial.
    """
    order = sorted(range(len(prompts)), key=lambda index: (len(json.dumps(prompts[index])), index))
    ends = end_tokens(policy, tokenizer)
    dial: Any = torch.tensor(strengths) if len(strengths) > 1 else strengths[0]
    drawn: list[list[Answer]] = [[] for _ in strengths]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = encode(tokenizer, [prompts[index] for index in rows])
        width = batch["input_ids"].shape[1]
        output = policy.generate(
            **{name: tensor.repeat(len(strengths), 1).to(policy.device) for name, tensor in batch.items()},
            strength=dial.repeat_interleave(len(rows)) if len(strengths) > 1 else dial, min_kl=min_kl,
            max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
            logits_processor=[CommonNoise(temperature, len(strengths), seed + start)] if temperature else [],
            **ending_arguments(ends, tokenizer),
        )  # fmt: skip
        for place, ids in enumerate(output[:, width:].tolist()):
            cut = next((index for index, token in enumerate(ids) if token in ends), None)
            text = tokenizer.decode(ids[:cut], skip_special_tokens=True)
            drawn[place // len(rows)].append(Answer(text.strip(), finished=cut is not None))
    return [[answer for _, answer in sorted(zip(order, own, strict=True), key=lambda pair: pair[0])] for own in drawn]


def kept_answers(
    path: Path,
    make_policy: Callable[[], QAdapterForCausalLM],
    tokenizer: Any,
    prompts: Sequence[Prompt],
    seed: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
) -> list[Answer]:
    """The base's answers: those in the file, or drawn by a new policy at strength 0, and then written to it."""
    if not path.exists():
        (drawn,) = sample_answers(
            make_policy(), tokenizer, prompts, [0.0], seed, max_new_tokens, temperature, batch_size
        )
        write_ordered_json(path, [[answer.text, answer.finished] for answer in drawn])
    return [Answer(text, finished) for text, finished in json.loads(path.read_text(encoding="utf-8"))]
