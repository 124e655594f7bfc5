"""Which cells make up an experiment: settings, methods with their knobs, seeds, and the ablations."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.experiments.ablations import ABLATIONS, KL_PENALTY
from benchmarks.experiments.bfloat16 import cpu_has_bfloat16
from benchmarks.experiments.cells import Cell
from benchmarks.experiments.medium import MEDIUM_ABLATIONS, MEDIUM_KNOBS, medium_settings
from benchmarks.experiments.methods import MAIN_KNOBS
from benchmarks.experiments.named_settings import capitals, dsp, hh, terse
from benchmarks.experiments.settings import DOMAINS, Measuring, Setting, Training
from benchmarks.experiments.small import CPU_KNOBS, CPU_MEASURING, CPU_TRAINING, cpu_settings
from qadapter.errors import ConfigError


@dataclass(frozen=True)
class Suite:
    """What is run and in which order: all methods of a seed before the next seed, so that a stopped run is balanced.

    Args:
        knobs: {method: its options, one dictionary a cell}.
        ablations: names in ABLATIONS, run on the first setting.
        purpose: one sentence for the results page.
        first: methods that run with all seeds, setting by setting in turn, before anything else.
        further_seeds: how many of the seeds the other methods run with; None for all.
    """

    settings: tuple[Setting, ...]
    knobs: dict[str, list[dict[str, Any]]]
    seeds: tuple[int, ...]
    purpose: str
    ablations: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    further_seeds: int | None = None

    def cells(self) -> Iterator[Cell]:
        """Each cell once."""
        seen = set()
        for cell in (*self._first(), *self._main(), *self._ablations()):
            if cell.key not in seen:
                seen.add(cell.key)
                yield cell

    def _first(self) -> Iterator[Cell]:
        knobs = {method: variants for method, variants in self.knobs.items() if method in self.first}
        for seed in self.seeds:
            for number in range(max(map(len, knobs.values()), default=0)):
                for setting in self.settings:
                    for method, variants in knobs.items():
                        if number < len(variants):
                            yield Cell.of(setting, method, variants[number], seed)

    def _main(self) -> Iterator[Cell]:
        knobs = {method: variants for method, variants in self.knobs.items() if method not in self.first}
        for seed in self.seeds[: self.further_seeds]:
            for setting in self.settings:
                for method, variants in knobs.items():
                    for options in variants:
                        yield Cell.of(setting, method, options, seed)

    def _ablations(self) -> Iterator[Cell]:
        for seed in self.seeds:
            for name in self.ablations:
                for method, options in ABLATIONS[name]:
                    yield Cell.of(self.settings[0], method, options, seed)


def smoke() -> Suite:
    """Every method end to end on a tiny random model."""
    setting = Setting(
        "smoke", "builtin", base="tiny", dtype="float32", max_length=400, train_pairs=8, eval_pairs=6,
        training=Training(pairs_a_step=4, micro_batch=2, learning_rate=3e-3, lora_r=2),
        measuring=Measuring(
            strengths=(0.5, 1.0), scales=(0.5,), sampled_strengths=(1.0,), sampled_scales=(0.5,), sampled_prompts=3,
            max_new_tokens=8, generation_batch=4, batch_tokens=4096, max_text_tokens=32,
        ),
    )  # fmt: skip
    first = {method: knobs[:1] for method, knobs in MAIN_KNOBS.items()}
    return Suite((setting,), first, (0,), "Every method end to end on a tiny random model: its figures mean nothing.")


def full_settings() -> dict[str, Setting]:
    """Settings of the paper's experiments for a GPU."""
    return {setting.name: setting for setting in (*map(dsp, DOMAINS), hh(), terse(), capitals())}


def dsp_small() -> Suite:
    """Every method with two values of its knob and three seeds on one domain, small."""
    purpose = "Every method with two values of its own knob and three seeds: one domain, few short pairs, for a CPU."
    return Suite((cpu_settings()["dsp-entertainment"],), CPU_KNOBS, (0, 1, 2), purpose)


def cpu() -> Suite:
    """All settings with the two methods that matter most, small."""
    knobs = {"qadapter": CPU_KNOBS["qadapter"], "dpo": CPU_KNOBS["dpo"], "sft": CPU_KNOBS["sft"][:1]}
    return Suite(tuple(cpu_settings().values()), knobs, (0,), "Every setting with few short pairs, for a CPU.")


def ablations_small() -> Suite:
    """Each ablation on one domain, small, by the margin alone: the judge of so few short pairs is near chance."""
    measuring = replace(
        CPU_MEASURING, strengths=(0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0), sampled_strengths=(),
        sampled_prompts=1, texts=(),
    )  # fmt: skip
    setting = replace(cpu_settings()["dsp-entertainment"], train_pairs=128, eval_pairs=120, measuring=measuring)
    purpose = "What each part of the objective does to the margin, on few short pairs."
    return Suite((setting,), {}, (0, 1), purpose, tuple(ABLATIONS))


def kl_small() -> Suite:
    """The KL as penalty beside that of rewards and DPO, small, with many strengths."""
    measuring = replace(
        CPU_MEASURING, strengths=(0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), sampled_prompts=48,
        max_new_tokens=48, texts=(),
    )  # fmt: skip
    names = ("dsp-entertainment", "dsp-academy", "polite")
    settings = tuple(
        replace(
            setting, train_pairs=128, eval_pairs=120,
            measuring=replace(measuring, texts=setting.measuring.texts, sampled_strengths=sampled),
        )
        for setting, sampled in (
            *((cpu_settings()[name], CPU_MEASURING.sampled_strengths) for name in names),
            # Here methods differ tenfold in how far a strength goes.
            (cpu_settings()["terse"], (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)),
        )
    )  # fmt: skip
    knobs: dict[str, list[dict[str, Any]]] = {
        "qadapter": [
            {"beta": 10.0},
            *({**KL_PENALTY, "beta": beta} for beta in (1.0, 0.3)),
            {**KL_PENALTY, "beta": 1.0, "rejected": "own"},
            {**KL_PENALTY, "alpha": 1.0, "beta": 1.0},
        ],
        "dpo": [
            {"beta": 0.1},
            {"beta": 0.3},
            {"beta": 3.0, "length_normalised": True},
            {"beta": 0.1, "rejected": "own"},
        ],
    }
    purpose = (
        "The KL from the base as the penalty, on returns a token, beside that on rewards and DPO; and the base's own "
        "answers in place of the rejected ones; for a CPU."
    )
    return Suite(settings, knobs, (0, 1), purpose, first=("qadapter", "dpo"))


def epochs_small() -> Suite:
    """Three epochs instead of one: the KL as penalty bounds the drift, so training can go on.

    Returns a token let the end of the shorter answer weigh most, and so do margins a token: hence the variant with
    returns over the pair's mean length, and the gain without ends (docs/results.md).
    """
    measuring = replace(
        CPU_MEASURING, strengths=(0.03125, 0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
        sampled_strengths=(0.25, 0.5, 1.0, 2.0), sampled_prompts=48, max_new_tokens=48,
    )  # fmt: skip
    names = ("dsp-entertainment", "dsp-academy", "polite", "dsp-literature", "dsp-business")
    settings = tuple(
        replace(
            cpu_settings()[name], max_length=160, train_pairs=192, eval_pairs=150, measuring=measuring,
            training=replace(CPU_TRAINING, epochs=3.0, packed=True),
        )
        for name in names
    )  # fmt: skip
    knobs: dict[str, list[dict[str, Any]]] = {
        "qadapter": [
            {**KL_PENALTY, "alpha": 1.0, "beta": 1.0},
            {"penalty": "kl", "alpha": 1.0, "beta": 0.3, "normalised": "pair"},
            {"beta": 10.0},
            {"beta": 10.0, "sft_weight": 1.0},  # chosen answers as demonstrations, too
            {"beta": 10.0, "sft_weight": 3.0},
        ],
        "dpo": [
            {"beta": 0.1},
            {"beta": 3.0, "length_normalised": True},
            {"beta": 0.1, "training.epochs": 1.0},  # nothing limits its drift: what more epochs cost it
            {"beta": 0.3},
            {"beta": 0.1, "sft_weight": 1.0},
        ],
        "ipo": [{"beta": 0.3}],
        "sft-kl": [{"weight": 1.0}],
        "sft": [{}],
    }
    purpose = "Three epochs of short pairs: the KL from the base as the penalty, that on rewards, and DPO; for a CPU."
    return Suite(settings, knobs, (0, 1, 2), purpose, first=("qadapter", "dpo"), further_seeds=1)


def discount_small() -> Suite:
    """Discounted returns: the answer's first tokens count most, and the base continues what they have settled.

    More sampled prompts and strengths than in `epochs_small`: between few of them the judged curves are noise.
    """
    measuring = replace(
        CPU_MEASURING, strengths=(0.03125, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0),
        sampled_strengths=(0.125, 0.25, 0.5, 0.75, 1.0, 2.0), sampled_prompts=72, max_new_tokens=48,
    )  # fmt: skip
    settings = tuple(replace(setting, measuring=measuring) for setting in epochs_small().settings)
    harmless = replace(
        cpu_settings()["hh-harmless"],
        max_length=160,
        train_pairs=192,
        eval_pairs=150,
        measuring=replace(measuring, retained_pairs=60),
        training=replace(CPU_TRAINING, packed=True),
    )  # one epoch, also of the tuning to helpfulness before
    once = {"training.epochs": 1.0}  # more do DPO no good (epochs-small)
    floor = {"gamma": 0.95, "discount_floor": 0.25}
    knobs: dict[str, list[dict[str, Any]]] = {
        "qadapter": [
            {"beta": 10.0, "gamma": 0.9},
            {"beta": 10.0},
            {"beta": 10.0, "gamma": 0.95},
            {"beta": 10.0, "gamma": 0.95, "discount_floor": 0.25},
            {"beta": 10.0, "gamma": 0.98},
            {"beta": 10.0, "gamma": 0.8},
            {"beta": 30.0, "gamma": 0.9},
            {**floor, "beta": 10.0, "retention": 1.0, **once},
            {**floor, "beta": 10.0, **once},
            {**floor, "beta": 1.0, "retention": 1.0, **once},
        ],
        "dpo": [
            {"beta": 0.1, **once},
            {"beta": 0.1, "discount": 0.9, **once},
            {"beta": 0.3, **once},
            {"beta": 0.1, "discount": 0.9},
            {"beta": 0.1, "retention": 1.0, **once},
        ],
        "sft-kl": [{"weight": 1.0}],
        "sft": [once],
        "ipo": [{"beta": 0.3, **once}],
    }
    purpose = (
        "Discounted returns, with which the first tokens of an answer count most, and retention on texts that the base "
        "writes, beside γ = 1 and DPO."
    )
    return Suite((*settings, harmless), knobs, (0, 1, 2), purpose, first=("qadapter", "dpo"), further_seeds=1)


def scales_small() -> Suite:
    """Averaged weights (WiSE-FT) beside the strength dial at the same values, on the pairs of `discount_small`.

    Each scale needs a pass over the texts, where all strengths come from one: so there are fewer texts and values.
    """
    values = (0.125, 0.25, 0.5, 1.0, 2.0)
    scales = tuple(value for value in values if value != 1.0)  # where both are the same
    known = {setting.name: setting for setting in discount_small().settings}
    settings = tuple(
        replace(
            known[name], eval_pairs=60,
            measuring=replace(
                known[name].measuring, strengths=values, sampled_strengths=values, scales=scales,
                sampled_scales=scales, sampled_prompts=48,
            ),
        )
        for name in ("polite", "dsp-entertainment", "dsp-literature")
    )  # fmt: skip
    once = {"training.epochs": 1.0}
    knobs: dict[str, list[dict[str, Any]]] = {
        "qadapter": [{"beta": 10.0}, {"beta": 10.0, "gamma": 0.95, "discount_floor": 0.25}],
        "dpo": [{"beta": 0.1, **once}, {"beta": 0.3, **once}],
        "sft": [once],
    }
    purpose = (
        "Averaged weights (WiSE-FT) beside the strength dial, on Q-Adapter's adapters, DPO's and SFT's; for a CPU."
    )
    return Suite(settings, knobs, (0, 1, 2), purpose, first=("qadapter", "dpo"))


def short_setting(name: str) -> Setting:
    """A setting with an epoch of 128 short pairs, and strengths down to those that hardly drift."""
    measuring = replace(
        CPU_MEASURING, strengths=(0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0),
        sampled_strengths=(0.125, 0.25, 0.5, 1.0, 2.0), sampled_prompts=48,
    )  # fmt: skip
    training = replace(CPU_TRAINING, packed=True)
    return replace(
        cpu_settings()[name], max_length=128, train_pairs=128, eval_pairs=60, measuring=measuring, training=training
    )


def noise_small() -> Suite:
    """`undiscounted` and DPO on a preference that shows in every answer, with ever more of the pairs swapped."""
    polite = short_setting("polite")
    noisy = (
        replace(polite, name=f"polite-noise-{noise:g}", training=replace(polite.training, label_noise=noise))
        for noise in (0.3, 0.15)
    )
    knobs: dict[str, list[dict[str, Any]]] = {"qadapter": [{"beta": 10.0}], "dpo": [{"beta": 0.1}]}
    purpose = "Does the lead over DPO need pairs that agree? With a share of the answers swapped; for a CPU."
    return Suite((polite, *noisy), knobs, (0, 1, 2), purpose, first=("qadapter", "dpo"))


def longer_small() -> Suite:
    """Answers over twice as long as in `discount_small`, and as much more of them judged: does the floor hold?"""
    settings = tuple(
        replace(
            setting, max_length=320, train_pairs=96, eval_pairs=80,
            measuring=replace(
                setting.measuring, sampled_strengths=(0.25, 0.5, 1.0, 1.5), sampled_prompts=48, max_new_tokens=112
            ),
        )
        for setting in discount_small().settings
        if setting.name.startswith("dsp-")
    )  # fmt: skip
    knobs: dict[str, list[dict[str, Any]]] = {
        "qadapter": [{"beta": 10.0, "gamma": 0.95, "discount_floor": 0.25}, {"beta": 10.0}],
        "dpo": [{"beta": 0.1, "training.epochs": 1.0}, {"beta": 0.1}, {"beta": 0.3, "training.epochs": 1.0}],
    }
    purpose = "The discount with a floor on answers over twice as long as in discount-small, beside γ = 1 and DPO."
    return Suite(settings, knobs, (0, 1, 2), purpose, first=("qadapter", "dpo"))


def other_base_small() -> Suite:
    """`undiscounted` and DPO on whatever base `--base` names, small enough for a CPU and a large vocabulary."""
    settings = tuple(map(short_setting, ("polite", "dsp-entertainment")))
    knobs: dict[str, list[dict[str, Any]]] = {
        "qadapter": [{"beta": 10.0}, {"beta": 3.0}],
        "dpo": [{"beta": 0.1}, {"beta": 0.3}],
    }
    purpose = "Q-Adapter and DPO on another base than the built-in one; few short pairs, for a CPU."
    return Suite(settings, knobs, (0, 1, 2), purpose, first=("qadapter", "dpo"))


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
    "cpu": cpu,
    "scales-small": scales_small,
    "noise-small": noise_small,
    "longer-small": longer_small,
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
