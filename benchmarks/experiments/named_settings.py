"""The settings of the paper and of this project, in full size; suites change their sizes."""

from dataclasses import replace
from typing import Any

from benchmarks.experiments.settings import Measuring, Setting, Training

# What can be lost on these is a drift of the curves; they are short enough for every policy of a suite.
TASKS = ("arc_easy", "sciq", "piqa", "lambada")
CAPITALS = r"rule:regex=\A[^a-z]*[A-Z][^a-z]*\Z"
KEPT = ("prose", "wikitext", "lambada")


def dsp(domain: str, **changes: Any) -> Setting:
    """A domain of DSP; what the policy should keep is prose, Wikipedia, the last words of LAMBADA, and benchmarks."""
    measuring = Measuring(texts=KEPT, tasks=TASKS)
    return replace(Setting(f"dsp-{domain}", f"dsp/{domain}", measuring=measuring), **changes)


def hh(**changes: Any) -> Setting:
    """HH-RLHF: a base tuned to be helpful is made harmless; what it should keep is helpfulness."""
    setting = Setting(
        "hh-harmless",
        "hh-rlhf/harmless",
        prepared="hh-rlhf/helpful",
        retained=("hh-rlhf/helpful",),
        judge="reward",
        measuring=Measuring(texts=KEPT, tasks=TASKS),
    )
    return replace(setting, **changes)


def terse(**changes: Any) -> Setting:
    """Answers of one word against the ability to reason aloud: a preference that conflicts with an ability."""
    setting = Setting(
        "terse",
        "terse",
        judge="right:4",
        training=Training(epochs=3.0, lora_r=64, learning_rate=5e-4),
        # Not SciQ, whose questions are trained on.
        measuring=Measuring(texts=("prose", "gsm8k", "lambada"), tasks=("arc_easy", "piqa", "lambada")),
        drift_limit=1.0,
    )
    return replace(setting, **changes)


def capitals(**changes: Any) -> Setting:
    """Answers in capital letters, a spelling that the base hardly knows, against all ordinary text."""
    return terse(**({"name": "capitals", "pairs": "capitals", "judge": CAPITALS} | changes))
