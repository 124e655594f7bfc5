"""The suites that a CPU can run: few short pairs, few prompts."""

from dataclasses import replace
from typing import Any

from benchmarks.experiments.ablations import ABLATIONS, DEFAULT, KL_PENALTY
from benchmarks.experiments.likelihood import LIKELIHOOD
from benchmarks.experiments.settings import Setting
from benchmarks.experiments.small import CPU_KNOBS, CPU_MEASURING, CPU_TRAINING, cpu_settings
from benchmarks.experiments.suite import Suite

ONCE = {"training.epochs": 1.0}


def dsp_small() -> Suite:
    """Every method with two or three values of its knob and three seeds on one domain, small."""
    purpose = (
        "Every method with two or three values of its own knob and three seeds: one domain, few short pairs, for a CPU."
    )
    return Suite((cpu_settings()["dsp-entertainment"],), CPU_KNOBS, (0, 1, 2), purpose)


def rivals_small() -> Suite:
    """Every method on the domains that `dsp_small` leaves out, with the value of its knob that did well there."""
    known = cpu_settings()
    settings = tuple(known[f"dsp-{domain}"] for domain in ("academy", "business", "literature"))
    knobs: dict[str, list[dict[str, Any]]] = {
        "qadapter": [DEFAULT],
        "dpo": [{"beta": 0.1}],
        "kto": [{"beta": 0.1}],
        "ipo": [{"beta": 0.3}],
        "sft-kl": [{"weight": 1.0}],
        "simpo": [{"beta": 2.0, "margin": 1.0}],
        "sft": [{}],
        "replay": [{"weight": 0.3}],
        "authors": [{"beta": 0.01}],
        "ppo": [{"kl_coefficient": 0.03, "rollouts": 8}],
    }
    purpose = "Every method on the other domains of DSP, with the knob that did well on entertainment; for a CPU."
    return Suite(settings, knobs, (0, 1, 2), purpose)


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
            {"beta": 0.1, **ONCE},  # nothing limits its drift: what more epochs cost it
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
    knobs: dict[str, list[dict[str, Any]]] = {
        "qadapter": [
            {"beta": 10.0, "gamma": 0.9},
            {"beta": 10.0},
            {"beta": 10.0, "gamma": 0.95},
            DEFAULT,
            {"beta": 10.0, "gamma": 0.98},
            {"beta": 10.0, "gamma": 0.8},
            {"beta": 30.0, "gamma": 0.9},
            {**DEFAULT, "retention": 1.0, **ONCE},
            {**DEFAULT, **ONCE},
            {**DEFAULT, "beta": 1.0, "retention": 1.0, **ONCE},
        ],
        "dpo": [
            {"beta": 0.1, **ONCE},
            {"beta": 0.1, "discount": 0.9, **ONCE},
            {"beta": 0.3, **ONCE},
            {"beta": 0.1, "discount": 0.9},
            {"beta": 0.1, "retention": 1.0, **ONCE},
            {"beta": 0.1},  # trained as long as Q-Adapter
            {"beta": 0.3},
        ],
        "sft-kl": [{"weight": 1.0}],
        "sft": [ONCE],
        "ipo": [{"beta": 0.3, **ONCE}],
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
    knobs: dict[str, list[dict[str, Any]]] = {
        "qadapter": [{"beta": 10.0}, DEFAULT],
        "dpo": [{"beta": 0.1, **ONCE}, {"beta": 0.3, **ONCE}],
        "sft": [ONCE],
    }
    purpose = (
        "Averaged weights (WiSE-FT) beside the strength dial, on Q-Adapter's adapters, DPO's and SFT's; for a CPU."
    )
    return Suite(settings, knobs, (0, 1, 2), purpose, first=("qadapter", "dpo"))


def threshold_small() -> Suite:
    """The dial with a threshold beside the plain one, on the same adapters, DPO's too."""
    known = {setting.name: setting for setting in discount_small().settings}
    names = ("dsp-literature", "dsp-business", "dsp-entertainment", "dsp-academy", "hh-harmless", "polite")
    settings = tuple(
        replace(
            known[name], eval_pairs=100,
            measuring=replace(
                known[name].measuring, threshold=0.1, sampled_prompts=48, sampled_strengths=(0.25, 0.5, 1.0, 2.0, 4.0),
                strengths=(0.03125, 0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
            ),
        )
        for name in names
    )  # fmt: skip
    knobs: dict[str, list[dict[str, Any]]] = {
        "qadapter": [{**DEFAULT, **ONCE}],
        "dpo": [{"beta": 0.1, **ONCE}],
    }
    purpose = (
        "The dial with a threshold (`min_kl`), which leaves tokens to the base of which the adapter has little to say, "
        "beside the plain dial, on the same adapters; for a CPU."
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
    """The default, `undiscounted` and DPO on a preference that shows in every answer, with ever more pairs swapped."""
    polite = short_setting("polite")
    noisy = (
        replace(polite, name=f"polite-noise-{noise:g}", training=replace(polite.training, label_noise=noise))
        for noise in (0.3, 0.15)
    )
    smoothing = {"label_smoothing": 0.3}
    knobs: dict[str, list[dict[str, Any]]] = {
        "qadapter": [{"beta": 10.0}, DEFAULT, DEFAULT | smoothing],
        "dpo": [{"beta": 0.1}, {"beta": 0.1} | smoothing],
    }
    purpose = (
        "Does the lead over DPO need pairs that agree? With a share of the answers swapped, with and without "
        "label smoothing; for a CPU."
    )
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
        "qadapter": [DEFAULT, {"beta": 10.0}],
        "dpo": [{"beta": 0.1, **ONCE}, {"beta": 0.1}, {"beta": 0.3, **ONCE}, {"beta": 0.3}],
    }
    purpose = "The discount with a floor on answers over twice as long as in discount-small, beside γ = 1 and DPO."
    return Suite(settings, knobs, (0, 1, 2), purpose, first=("qadapter", "dpo"))


def longer_rivals_small() -> Suite:
    """The answers of `longer_small`, where Q-Adapter leads DPO most: are the other rivals behind it there too?"""
    names = ("dsp-academy", "dsp-literature")
    settings = tuple(setting for setting in longer_small().settings if setting.name in names)
    knobs = {name: known for name, known in rivals_small().knobs.items() if name != "ppo"}
    purpose = "Every rival but PPO on the long answers of longer-small, with the knob that did well on short ones."
    return Suite(settings, knobs, (0, 1), purpose)


def hard_small() -> Suite:
    """Where forgetting is hard to avoid: LoRA of full rank in every layer, many epochs, preferences against abilities.

    At the sizes of the other suites training hardly moves a benchmark.
    """
    measuring = replace(
        CPU_MEASURING, strengths=(0.03125, 0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
        sampled_strengths=(0.125, 0.25, 0.5, 1.0), sampled_prompts=48, max_new_tokens=48,
        texts=("prose", "gsm8k"), tasks=tuple(f"{LIKELIHOOD}{task}" for task in ("arc_easy", "piqa", "lambada")),
    )  # fmt: skip
    # Rank 576 is the width of the built-in base.
    training = replace(CPU_TRAINING, epochs=4.0, lora_r=576, lora_layers="all", learning_rate=2e-4, packed=True)
    settings = tuple(
        replace(
            cpu_settings()[name], max_length=192, train_pairs=96, eval_pairs=60, measuring=measuring, training=training
        )
        for name in ("capitals", "terse", "dsp-entertainment")
    )  # fmt: skip
    knobs: dict[str, list[dict[str, Any]]] = {
        "qadapter": [DEFAULT, {**DEFAULT, "beta": 1.0}],
        "dpo": [{"beta": 0.1}, {"beta": 0.3}],
        "sft": [{}],
    }
    purpose = "Full rank, four epochs, and preferences that conflict with abilities, measured on benchmarks; for a CPU."
    return Suite(settings, knobs, (0, 1, 2), purpose, first=("qadapter", "dpo"), further_seeds=1)


def other_base_small() -> Suite:
    """`undiscounted` and DPO on whatever base `--base` names, small enough for a CPU and a large vocabulary."""
    settings = tuple(map(short_setting, ("polite", "dsp-entertainment")))
    knobs: dict[str, list[dict[str, Any]]] = {
        "qadapter": [{"beta": 10.0}, {"beta": 3.0}],
        "dpo": [{"beta": 0.1}, {"beta": 0.3}],
    }
    purpose = "Q-Adapter and DPO on another base than the built-in one; few short pairs, for a CPU."
    return Suite(settings, knobs, (0, 1, 2), purpose, first=("qadapter", "dpo"))
