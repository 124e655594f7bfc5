"""All suites by name, those for a GPU among them, and what narrows one down."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.experiments.ablations import ABLATIONS
from benchmarks.experiments.medium import MEDIUM_ABLATIONS, MEDIUM_KNOBS, medium_settings
from benchmarks.experiments.methods import MAIN_KNOBS
from benchmarks.experiments.named_settings import capitals, dsp, hh, terse
from benchmarks.experiments.settings import Measuring, Setting, Training
from benchmarks.experiments.small_suites import (
    ablations_small,
    cpu,
    discount_small,
    dsp_small,
    epochs_small,
    hard_small,
    kl_small,
    longer_rivals_small,
    longer_small,
    noise_small,
    other_base_small,
    rivals_small,
    scales_small,
    threshold_small,
)
from benchmarks.experiments.suite import Suite
from qadapter.data.dsp import DOMAINS
from qadapter.devices import cpu_has_bfloat16
from qadapter.errors import ConfigError


def smoke() -> Suite:
    """Every method end to end on a tiny random model."""
    setting = Setting(
        "smoke", "builtin", base="tiny", dtype="float32", max_length=400, train_pairs=8, eval_pairs=6,
        training=Training(pairs_a_step=4, micro_batch=2, learning_rate=3e-3, lora_r=2),
        measuring=Measuring(
            strengths=(0.5, 1.0), scales=(0.5,), sampled_strengths=(1.0,), sampled_scales=(0.5,), sampled_prompts=3,
            threshold=1e-5, max_new_tokens=8, generation_batch=4, batch_tokens=4096, max_text_tokens=32,
        ),
    )  # fmt: skip
    first = {method: knobs[:1] for method, knobs in MAIN_KNOBS.items()}
    return Suite((setting,), first, (0,), "Every method end to end on a tiny random model: its figures mean nothing.")


def full_settings() -> dict[str, Setting]:
    """Settings of the paper's experiments for a GPU."""
    return {setting.name: setting for setting in (*map(dsp, DOMAINS), hh(), terse(), capitals())}


def full() -> Suite:
    """The paper's experiments: every setting, method and knob, three seeds."""
    knobs = {method: options for method, options in MAIN_KNOBS.items() if method != "dpo-trl"}
    purpose = "The paper's experiments and its rivals: every setting, method and knob, three seeds."
    return Suite(tuple(full_settings().values()), knobs, (0, 1, 2), purpose)


def ablations() -> Suite:
    """Each ablation on one domain, in full size."""
    settings = (full_settings()["dsp-entertainment"],)
    return Suite(settings, {}, (0, 1, 2), "What each part of the objective does.", tuple(ABLATIONS))


def medium() -> Suite:
    """Every setting on one GPU in about ten minutes, Q-Adapter against DPO with three seeds first."""
    purpose = "Pairs of up to 256 tokens, on one GPU: Q-Adapter and DPO with three seeds, the other rivals with one."
    return Suite(
        tuple(medium_settings().values()), MEDIUM_KNOBS, (0, 1, 2), purpose, first=("qadapter", "dpo"), further_seeds=1
    )


def medium_ablations() -> Suite:
    """Each ablation on one domain, in the size of "medium" (a suite of its own: its variants tune no method)."""
    settings = (medium_settings()["dsp-entertainment"],)
    purpose = "What each part of the objective does, on pairs of up to 256 tokens, on one GPU."
    return Suite(settings, {}, (0, 1), purpose, MEDIUM_ABLATIONS)


SUITES: dict[str, Callable[[], Suite]] = {
    "smoke": smoke,
    "dsp-small": dsp_small,
    "rivals-small": rivals_small,
    "cpu": cpu,
    "scales-small": scales_small,
    "threshold-small": threshold_small,
    "noise-small": noise_small,
    "longer-small": longer_small,
    "longer-rivals-small": longer_rivals_small,
    "hard-small": hard_small,
    "other-base-small": other_base_small,
    "ablations-small": ablations_small,
    "kl-small": kl_small,
    "epochs-small": epochs_small,
    "discount-small": discount_small,
    "medium": medium,
    "medium-ablations": medium_ablations,
    "full": full,
    "ablations": ablations,
}


def fast_dtype(dtype: str) -> str:
    """The dtype to compute in: "auto" is bfloat16 where the machine has instructions for it, else float32.

    Without them a CPU is no faster in bfloat16 than in float32 (`bfloat16.py`), and by torch itself far slower.
    """
    if dtype != "auto":
        return dtype
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if cpu_has_bfloat16() else "float32"


def make_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SUITES:
        raise ConfigError(f"suite {name!r} is unknown: choose one of {', '.join(SUITES)}.")
    return SUITES[name]()


def narrowed(
    suite: Suite,
    settings: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    ablations: Sequence[str] = (),
    base: str | None = None,
    dtype: str | None = None,
) -> Suite:
    """The suite with only the named parts, or with another base.

    Raises:
        ConfigError: a name that the suite does not have.
    """
    known: dict[str, Any] = {setting.name: setting for setting in suite.settings}
    for kind, names, all_names in (
        ("setting", settings, known),
        ("method", methods, suite.knobs),
        ("ablation", ablations, ABLATIONS),
    ):
        for name in names:
            if name not in all_names:
                raise ConfigError(f"{kind} {name!r} is not in the suite: choose among {', '.join(all_names)}.")
    chosen = tuple(known[name] for name in settings) or suite.settings
    if base is not None:
        chosen = tuple(replace(setting, base=base) for setting in chosen)
    chosen = tuple(replace(setting, dtype=dtype or fast_dtype(setting.dtype)) for setting in chosen)
    return replace(
        suite,
        settings=chosen,
        knobs={name: suite.knobs[name] for name in methods} or ({} if ablations else suite.knobs),
        seeds=tuple(seeds) or suite.seeds,
        ablations=tuple(ablations) or suite.ablations,
    )
