"""What the suite "medium" is made of: sizes for one GPU, on which many cells run at once for a few minutes."""

from dataclasses import replace
from typing import Any

from benchmarks.experiments.ablations import DEFAULT
from benchmarks.experiments.likelihood import LIKELIHOOD
from benchmarks.experiments.named_settings import KEPT, TASKS, dsp, hh, terse
from benchmarks.experiments.settings import Measuring, Setting, Training

MEDIUM_MEASURING = Measuring(
    strengths=(0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0), scales=(), sampled_strengths=(0.5, 1.0, 2.0),
    sampled_scales=(), sampled_prompts=64, max_new_tokens=96, generation_batch=64, batch_tokens=8192, texts=KEPT,
    max_text_tokens=128, tasks=tuple(f"{LIKELIHOOD}{task}" for task in TASKS), task_limit=150,
)  # fmt: skip
MEDIUM_TRAINING = Training(pairs_a_step=8, micro_batch=8, learning_rate=5e-4, lora_layers="upper")
MEDIUM_ABLATIONS = ("penalty", "alpha", "value", "gamma", "parametrisation", "length", "lora", "noise")
MEDIUM_KNOBS: dict[str, list[dict[str, Any]]] = {
    "qadapter": [{"beta": 10.0}, {"beta": 1.0}, {"beta": 3.0}, DEFAULT],
    "dpo": [{"beta": 0.1}, {"beta": 0.3}, {"beta": 0.03}],
    "ipo": [{"beta": 0.3}],
    "kto": [{"beta": 0.1}],
    "sft": [{}],
    "sft-kl": [{"weight": 1.0}],
    "simpo": [{"beta": 2.0, "margin": 1.0}],
    "authors": [{"beta": 0.1}],
    "qadapter-logits": [{"preset": "authors", "beta": 0.1}],
    "replay": [{"weight": 1.0}],
    "ppo": [{"kl_coefficient": 0.1}],
}


def medium_settings() -> dict[str, Setting]:
    """Settings for one GPU and a few minutes: full pairs of up to 256 tokens, in float32."""
    common: dict[str, Any] = {
        "dtype": "float32", "max_length": 256, "train_pairs": 600, "eval_pairs": 160, "training": MEDIUM_TRAINING,
        "measuring": MEDIUM_MEASURING,
    }  # fmt: skip
    retaining = replace(MEDIUM_MEASURING, retained_pairs=160)
    no_sciq = tuple(task for task in MEDIUM_MEASURING.tasks if not task.endswith("sciq"))  # it is trained on
    hard = common | {
        "training": replace(MEDIUM_TRAINING, epochs=2.0, lora_r=32),
        "measuring": replace(MEDIUM_MEASURING, texts=("prose", "gsm8k", "lambada"), tasks=no_sciq),
    }
    settings = (
        *(dsp(domain, **common) for domain in ("entertainment", "academy", "business", "literature")),
        hh(**(common | {"measuring": retaining})),
        Setting("polite", "polite", **common),
        terse(**hard),
    )
    return {setting.name: setting for setting in settings}
