"""Columns of a table of measurements: which policy, at which setting of the dial. The base is always the first."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

from qadapter.errors import ConfigError
from qadapter.functional import mix_coefficients
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.mixing import checked_decay, checked_number, checked_weights, refuse_changing
from qadapter.modeling.policy_part import NEUTRAL
from qadapter.modeling.stacked import blended
from qadapter.modeling.streams import Stream

BASE = "base"
MAX_STRENGTHS = 1000


class Direction(NamedTuple):
    """d = Σ_k c_k (z_k − z_b) + c z_b, which points from the base to a policy: its logits are z_b + λ d."""

    streams: tuple[tuple[Stream, float], ...]
    base: float


@dataclass(frozen=True)
class Column:
    """A policy to be measured: the adapters of a model under one setting of the dial.

    Args:
        name: the column's heading.
        strength: λ; 0 is the base.
        adapter_weights: of a composition; None takes the model's own.
        max_kl: cap on KL(policy ‖ base) at each token, in nats; None for none.
        min_kl: threshold in nats, as of `QAdapterForCausalLM.forward`; None for none.
        decay: factor ρ of the strength from one token of an answer to the next, 0 < ρ ≤ 1: λ ρᵗ at the t-th.
        interpolation: of "logits" or of "weights", as of `QAdapterForCausalLM.forward`.
        alpha_0: α₀ instead of the trained one, with Q as trained; None for the trained one.

    Raises:
        ConfigError: a value that is no finite number, or a negative cap; another α₀ or a decay with "weights".
    """

    name: str
    strength: float = 1.0
    adapter_weights: Mapping[str, float] | None = None
    max_kl: float | None = None
    min_kl: float | None = None
    decay: float = 1.0
    interpolation: str = "logits"
    alpha_0: float | None = None

    def __post_init__(self) -> None:
        if self.interpolation == "weights":
            refuse_changing("a decay" if self.decay != 1.0 else "min_kl" if self.min_kl else "")
            if self.alpha_0 is not None:
                raise ConfigError(
                    f'alpha_0 = {self.alpha_0!r} mixes logits: it goes with interpolation="logits" alone.'
                )
        checked_number(self.strength, "strength")
        checked_decay(self.decay)
        for name, value in (("max_kl", self.max_kl), ("min_kl", self.min_kl), ("alpha_0", self.alpha_0)):
            number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} = {value!r}: must be a finite number, 0 or above.")

    def settings(self) -> dict[str, Any]:
        """The settings that differ from the defaults, as `forward` and `generate` take them."""
        if self.alpha_0 is not None:
            raise ConfigError(f"column {self.name!r}: alpha_0 is measured on given texts only, not by generating.")
        result: dict[str, Any] = {"strength": self.strength}
        if self.adapter_weights is not None:
            result["adapter_weights"] = dict(self.adapter_weights)
        return result | {name: v for name in NEUTRAL if (v := getattr(self, name)) not in NEUTRAL[name]}

    def weights(self, model: QAdapterForCausalLM) -> dict[str, float]:
        """The adapters with a weight, and that.

        Raises:
            ConfigError: a weight of an adapter that the model does not have.
        """
        given = model.adapter_weights if self.adapter_weights is None else self.adapter_weights
        weights = checked_weights(given, dict.fromkeys(model.adapters, 0.0))  # the model's own may name some alone
        return {name: float(weight) for name, weight in weights.items() if weight != 0.0}

    @property
    def share(self) -> float:
        """λ along `direction`, the strength unless that is in the direction already."""
        return 1.0 if self.interpolation == "weights" else self.strength

    def direction(self, model: QAdapterForCausalLM) -> Direction:
        """The way from the base to the policy at strength 1; where weights are interpolated, at the own strength.

        Raises:
            ConfigError: a weight of an adapter that the model does not have, or that cannot be interpolated so.
        """
        weights = self.weights(model)
        if model.checked_interpolation(self.interpolation) == "weights":
            stream = blended({name: self.strength * weight for name, weight in weights.items()})
            return Direction(() if stream is None else ((stream, 1.0),), 0.0)
        adapters: list[tuple[Stream, float]] = []
        base = 0.0
        for name, weight in weights.items():
            config = model.configs[name]
            alpha_0 = config.alpha_0 if self.alpha_0 is None else self.alpha_0
            trained = mix_coefficients(config.parametrisation, config.alpha_tilde, alpha_0)
            adapters.append((name, weight * trained.adapter))
            base += weight * (trained.adapter + trained.base - 1.0)
        return Direction(tuple(adapters), base)

    @contextmanager
    def applied(self, model: QAdapterForCausalLM) -> Iterator[None]:
        """Within the context these are the settings that the model takes where a call gives none."""
        usual = {name: values[0] for name, values in NEUTRAL.items()}
        with model.dial(**usual | self.settings()):  # type: ignore[typeddict-item]
            yield


def dial_title(settings: Mapping[str, Any]) -> str:
    """A column's settings in words: the strength, and all that is not as usual."""
    return f"{settings['strength']:g}" + further_settings(settings)


def further_settings(settings: Mapping[str, Any]) -> str:
    """The settings besides the strength that are not as usual, as words to follow others; those may be left out."""
    words = []
    if weights := settings.get("adapter_weights"):
        words.append("weights " + " ".join(f"{name}={weight:g}" for name, weight in weights.items()))
    if settings.get("decay", 1.0) != 1.0:
        words.append(f"decay {settings['decay']:g}")
    if settings.get("max_kl") is not None:
        words.append(f"KL cap {settings['max_kl']:g} nats")
    if settings.get("min_kl"):
        words.append(f"threshold {settings['min_kl']:g} nats")
    if settings.get("interpolation") == "weights":
        words.append("weights interpolated")
    return "".join(f", {word}" for word in words)


def parse_strengths(text: str) -> list[float]:
    """Strengths in ascending order from "0.25,0.5,1" or "FIRST:LAST:COUNT" (both ends included).

    Raises:
        ConfigError: anything else.
    """
    try:
        if ":" in text:
            first, last, count = text.split(":")
            points = int(count)
            if not 2 <= points <= MAX_STRENGTHS:
                raise ValueError
            low, high = float(first), float(last)
            values = [low + (high - low) * index / (points - 1) for index in range(points)]
        else:
            values = [float(part) for part in text.split(",")]
        if not all(map(math.isfinite, values)):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--strengths {text!r}: give numbers such as 0.25,0.5,1, or FIRST:LAST:COUNT such as 0:2:21 "
            f"(of 2 to {MAX_STRENGTHS})."
        ) from None
    values = sorted({round(value, 9) + 0.0 for value in values})  # + 0.0: no negative zero
    if len(values) > MAX_STRENGTHS:
        raise ConfigError(f"--strengths names {len(values)} values: at most {MAX_STRENGTHS}.")
    return values


def strength_columns(name: str, strengths: Sequence[float], **settings: Any) -> list[Column]:
    """A column for each strength, called NAME at strength 1 and NAME@STRENGTH elsewhere; 0 is left out."""
    return [
        Column(name if strength == 1.0 else f"{name}@{strength:g}", strength, **settings)
        for strength in strengths
        if strength != 0.0
    ]


def unique_names(paths: Sequence[str]) -> list[str]:
    """A short name for each path: its last part, with as many parents as it takes to tell them apart.

    Raises:
        ConfigError: the same path twice.
    """
    parts = [[part for part in path.replace("\\", "/").split("/") if part not in ("", ".")] or [path] for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names) and BASE not in names:
            return names
    raise ConfigError(f"the same folder is named twice, or one is called {BASE!r}: {', '.join(paths)}.")
