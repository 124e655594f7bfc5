"""What the suites for a CPU are made of: few short pairs, few prompts."""

from dataclasses import replace
from typing import Any

from benchmarks.experiments.ablations import DEFAULT
from benchmarks.experiments.named_settings import capitals, dsp, hh, terse
from benchmarks.experiments.settings import Measuring, Setting, Training
from qadapter.data.dsp import DOMAINS

CPU_MEASURING = Measuring(
    strengths=(0.25, 0.5, 1.0, 1.5, 2.0, 3.0), scales=(), sampled_strengths=(0.5, 1.0, 2.0), sampled_scales=(),
    sampled_prompts=24, max_new_tokens=32, generation_batch=24, batch_tokens=1024, texts=("prose",), max_text_tokens=48,
)  # fmt: skip
CPU_TRAINING = Training(pairs_a_step=4, micro_batch=4, learning_rate=1e-3, lora_layers="upper")
CPU_KNOBS: dict[str, list[dict[str, Any]]] = {
    "qadapter": [{"beta": 10.0}, {"beta": 1.0}, DEFAULT],
    "dpo": [{"beta": 0.3}, {"beta": 0.1}],
    "authors": [{"beta": 0.1}, {"beta": 0.01}],
    "sft": [{}, {"training.learning_rate": 3e-4}],  # it has no knob but how far it goes
    "sft-kl": [{"weight": 1.0}, {"weight": 0.3}],
    "replay": [{"weight": 1.0}, {"weight": 0.3}],
    "ipo": [{"beta": 0.3}, {"beta": 0.1}],
    "simpo": [{"beta": 2.0, "margin": 1.0}, {"beta": 5.0, "margin": 2.5}],
    "kto": [{"beta": 0.1}, {"beta": 0.3}],
    # The last has as many steps as the other methods; with 32 answers a rollout there are six.
    "ppo": [{"kl_coefficient": 0.1}, {"kl_coefficient": 0.03}, {"kl_coefficient": 0.03, "rollouts": 8}],
    "qadapter-logits": [{"preset": "authors", "beta": 0.1}, {"preset": "authors", "beta": 1.0}],
}


def cpu_settings() -> dict[str, Setting]:
    """Settings small enough for a CPU: short pairs, few of them."""
    small: dict[str, Any] = {"max_length": 112, "train_pairs": 96, "eval_pairs": 40}
    domains = {
        f"dsp-{domain}": dsp(domain, **small, training=CPU_TRAINING, measuring=CPU_MEASURING) for domain in DOMAINS
    }
    polite = Setting("polite", "polite", **small, training=CPU_TRAINING, measuring=CPU_MEASURING)
    retaining = replace(CPU_MEASURING, retained_pairs=40)
    helpful = hh(**(small | {"max_length": 128}), training=CPU_TRAINING, measuring=retaining)
    hard: dict[str, Any] = small | {
        "training": replace(CPU_TRAINING, epochs=2.0, lora_r=32),
        "measuring": replace(CPU_MEASURING, texts=("prose", "gsm8k"), max_text_tokens=128),
    }
    settings = (*domains.values(), polite, helpful, terse(**hard), capitals(**hard))
    return {setting.name: setting for setting in settings}
