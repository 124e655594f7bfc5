"""Everything that is measured of a trained policy, at each setting of its dials, one number a pair, text or prompt.

Numbers are kept a unit (not only their means), so that the summary can take intervals over prompts and compare methods
on the same resampled prompts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer

from benchmarks.experiments.answers import sample_answers
from benchmarks.experiments.judges import Judge, equal_length_wins, repetition
from benchmarks.experiments.pools import Pools
from benchmarks.experiments.settings import Measuring
from qadapter import QAdapterForCausalLM
from qadapter.evaluation.columns import Column
from qadapter.evaluation.drift import TextDrift, measure_texts
from qadapter.evaluation.preferences import paired, win
from qadapter.evaluation.resampling import group_numbers
from qadapter.evaluation.texts import Prompt, Text, reference_texts
from qadapter.generation import Answer

STRENGTH, SCALE, THRESHOLD = "strength", "scale", "threshold"


@dataclass(frozen=True)
class Material:
    """What policies are measured on, as token ids, and the base's own answers to the held-out prompts.

    Args:
        texts: {name: texts whose loss should not rise}.
        retained: {name: pairs of another preference, chosen and rejected by turns}.
        prompts: of the samples; base_answers: the base's samples for each of them.
        items: {task: items} of the benchmarks of likelihood.py.
    """

    pairs: list[Text]
    groups: list[int]
    texts: Mapping[str, list[Text]]
    retained: Mapping[str, list[Text]]
    prompts: list[Any]
    items: Mapping[str, Any]
    base_answers: list[Answer]


def pair_texts(rows: Sequence[Mapping[str, Any]]) -> list[Text]:
    """Both answers of each tokenised pair, chosen first."""
    return [Text(row["prompt_ids"], row[f"{side}_ids"]) for row in rows for side in ("chosen", "rejected")]


def prompt_groups(pools: Pools) -> list[int]:
    """A number a held-out pair, the same for pairs of one prompt."""
    return group_numbers([json.dumps(pair["prompt"]) for pair in pools.held_out])


def measure(
    policy: QAdapterForCausalLM,
    tokenizer: Any,
    material: Material,
    measuring: Measuring,
    judge: Judge,
    seed: int,
    samples: dict[str, list[Answer]],
) -> list[dict[str, Any]]:
    """The points of the policy's trade-off curves.

    Args:
        samples: filled with the answers drawn at each point, by the point's name.
    """
    judging = policy, tokenizer, material, measuring, judge, seed, samples
    thresholds = {STRENGTH: None, THRESHOLD: measuring.threshold} if measuring.threshold else {STRENGTH: None}
    columns = {
        (dial, value): Column(f"{dial}={value:g}", value, min_kl=min_kl)
        for dial, min_kl in thresholds.items()
        for value in measuring.strengths
    }
    points = _points(policy, material, measuring, columns)
    for dial in thresholds:
        sampled = [place for place in columns if place[0] == dial and place[1] in measuring.sampled_strengths]
        _judge([points[place] for place in sampled], [columns[place] for place in sampled], *judging)
    for value in measuring.scales:
        with scaled(policy, value):
            place = SCALE, value
            column = Column(f"{SCALE}={value:g}", 1.0)
            points |= _points(policy, material, measuring, {place: column})
            if value in measuring.sampled_scales:
                _judge([points[place]], [column], *judging)
    return list(points.values())


def _points(
    policy: QAdapterForCausalLM,
    material: Material,
    measuring: Measuring,
    columns: Mapping[tuple[str, float], Column],
) -> dict[tuple[str, float], dict[str, Any]]:
    """The points of columns by dial and value, from one pass over all texts."""
    parts: dict[tuple[str, str], list[Text]] = {("pairs", ""): material.pairs}
    parts |= {("texts", name): texts for name, texts in material.texts.items()}
    parts |= {("retained", name): texts for name, texts in material.retained.items()}
    everything = [text for texts in parts.values() for text in texts]
    drifts = iter(measure_texts(policy, everything, list(columns.values()), measuring.batch_tokens))
    measured = {name: [next(drifts) for _ in texts] for name, texts in parts.items()}
    points = {}
    for (dial, value), column in columns.items():
        point: dict[str, Any] = {
            "dial": dial,
            "value": value,
            "pairs": _pair_figures(measured["pairs", ""], column.name),
            "texts": {},
            "retained": {},
        }
        for (kind, name), found in measured.items():
            if kind == "texts":
                point["texts"][name] = {
                    "kl": rounded(drift.mean_kl(column.name) for drift in found),
                    "loss_change": rounded(
                        float((drift.base.logps - drift.columns[column.name].logps).double().mean()) for drift in found
                    ),
                }
            elif kind == "retained":
                point["retained"][name] = _pair_figures(found, column.name)
        points[dial, value] = point
    return points


def _pair_figures(drifts: Sequence[TextDrift], column: str) -> dict[str, list[float]]:
    """margin_gain: change of the margin a token; body_gain: the same without the last token of each answer, its end;
    accuracy: by log-ratio; prefers and base_prefers: higher log-prob a token; kl: KL(policy ‖ base) a token, mean of
    both answers; nll_change: of the chosen answer, a token."""
    pairs = paired(drifts)
    return {
        "margin_gain": rounded(pair.token_margin(column) - pair.token_margin("base") for pair in pairs),
        "body_gain": rounded(body_gain(pair.chosen, column) - body_gain(pair.rejected, column) for pair in pairs),
        "accuracy": [win(pair.log_ratio_margin(column)) for pair in pairs],
        "prefers": [win(pair.token_margin(column)) for pair in pairs],
        "base_prefers": [win(pair.token_margin("base")) for pair in pairs],
        "kl": rounded((pair.chosen.mean_kl(column) + pair.rejected.mean_kl(column)) / 2 for pair in pairs),
        "nll_change": rounded((pair.logps["base"][0] - pair.logps[column][0]) / pair.chosen.tokens for pair in pairs),
    }


def body_gain(drift: TextDrift, column: str) -> float:
    """The mean log-ratio a token of an answer without its end, where it stops; 0 for an answer of one token."""
    ratios = (drift.columns[column].logps - drift.base.logps).double()[:-1]
    return float(ratios.mean()) if len(ratios) else 0.0


def _judge(
    points: Sequence[dict[str, Any]],
    columns: Sequence[Column],
    policy: QAdapterForCausalLM,
    tokenizer: Any,
    material: Material,
    measuring: Measuring,
    judge: Judge,
    seed: int,
    samples: dict[str, list[Answer]],
) -> None:
    """Draw answers at each point, judge them, and measure how far the policy is from the base on its own answers."""
    if not columns:
        return
    drawn = sample_answers(
        policy, tokenizer, material.prompts, [column.strength for column in columns], seed, measuring.max_new_tokens,
        measuring.temperature, measuring.generation_batch, columns[0].min_kl,
    )  # fmt: skip
    base_scores = judge.scores(material.prompts, material.base_answers)
    for point, column, answers in zip(points, columns, drawn, strict=True):
        samples[column.name] = answers
        texts = reference_texts(tokenizer, [Prompt(prompt) for prompt in material.prompts], answers)
        drifts = measure_texts(policy, [text for text in texts if text is not None], [column], measuring.batch_tokens)
        point["samples"] = {
            "score": rounded(judge.scores(material.prompts, answers)),
            "base_score": rounded(base_scores),
            "win": equal_length_wins(judge, material.prompts, answers, material.base_answers),
            "kl": rounded(drift.mean_kl(column.name) for drift in drifts),
            "words": [len(answer.text.split()) for answer in answers],
            "finished": [int(answer.finished) for answer in answers],
            "repetition": rounded(repetition(answer.text) for answer in answers),
        }


@contextmanager
def scaled(policy: QAdapterForCausalLM, factor: float) -> Iterator[None]:
    """Within the context the LoRA's update is multiplied: the weights W + factor · ΔW, WiSE-FT's average."""
    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        for name in layer.scaling:
            layer.scaling[name] *= factor
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def lost(scores: Mapping[str, list[float]], column: str) -> list[float]:
    """What the column lost of the base's score, an item."""
    return [before - after for before, after in zip(scores["base"], scores[column], strict=True)]


def rounded(values: Any) -> list[float]:
    """The values with six significant digits."""
    return [float(f"{value:.6g}") for value in values]
