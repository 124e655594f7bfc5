"""The method's settings, which travel with the adapter."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from qadapter.errors import ConfigError, require_rules

PRESETS: dict[str, dict[str, Any]] = {
    # The package's defaults: the residual form, started exactly at the base. An answer's first tokens, which settle
    # the rest, count most, and late ones a quarter (docs/results.md, suite discount-small).
    "default": {},
    # All of an answer's tokens count alike, as in the paper: for what shows late, or nowhere in particular.
    "undiscounted": {"gamma": 1.0, "discount_floor": 0.0},
    # Returns a token and the KL from the base as the penalty (docs/results.md, suite kl-small).
    "kl": {
        "alpha_tilde": 3.0,
        "alpha_0": 3.0,
        "gamma": 1.0,
        "beta": 1.0,
        "penalty": "kl",
        "length_normalised": True,
        "discount_floor": 0.0,
    },
    # The numbers of the paper and its released scripts, in their parametrisation. The released loss itself differs
    # further (method.md lists how); it is a named baseline of the benchmarks.
    "authors": {
        "parametrisation": "logits",
        "alpha_tilde": 1.0,
        "alpha_0": 0.01,
        "gamma": 1.0,
        "beta": 0.1,
        "length_normalised": True,
        "discount_floor": 0.0,
    },
}
# Settings that came after the first adapter folders, with the value that those were trained with.
ADDED_LATER: dict[str, Any] = {"penalty": "reward", "discount_floor": 0.0, "retention": 0.0}


@dataclass(frozen=True)
class QAdapterConfig:
    """Settings of the objective and of the policy that it trains (symbols: `qadapter.functional`).

    Args:
        parametrisation: "residual" (Q = α̃ (z_θ − z_b), starts at the base) or "logits" (Q = z_θ, the authors').
        alpha_tilde: α̃ > 0, temperature of the customised policy.
        alpha_0: α₀ ≥ 0, weight of the base policy. Equal to alpha_tilde in the residual form, the untrained policy
            is the base and the trained one needs a single stream.
        gamma: discount γ, 0 < γ ≤ 1: below 1 an answer's first tokens, which settle the rest, count most; at 1 all
            count alike, as in the paper.
        beta: weight β ≥ 0 of the penalty, which limits the drift from the base.
        penalty: what β weighs: "reward" (mean of r², the paper's) or "kl" (mean KL from the base a response token).
        length_normalised: divide a response's sum of rewards by its own length.
        label_smoothing: assumed share of mislabelled pairs, 0 ≤ ε < 0.5.
        discount_floor: with γ < 1, what a token weighs at least in its answer's return, however late, 0 ≤ f ≤ 1.
        retention: weight ρ ≥ 0 of the KL from the base on texts that no pair speaks of (`qadapter.retention`); 0 trains
            on pairs alone.

    Raises:
        ConfigError: a value outside its range.
    """

    parametrisation: str = "residual"
    alpha_tilde: float = 0.1
    alpha_0: float = 0.1
    gamma: float = 0.95
    beta: float = 10.0
    penalty: str = "reward"
    length_normalised: bool = False
    label_smoothing: float = 0.0
    discount_floor: float = 0.25
    retention: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type in (float, "float"):
                self._require_number(field.name)
        require_rules(
            self,
            ("parametrisation", self.parametrisation in ("residual", "logits"), 'must be "residual" or "logits"'),
            ("alpha_tilde", self.alpha_tilde > 0, "must be above 0"),
            ("alpha_0", self.alpha_0 >= 0, "must be 0 or above"),
            ("gamma", 0 < self.gamma <= 1, "must lie in (0, 1]"),
            ("beta", self.beta >= 0, "must be 0 or above"),
            ("penalty", self.penalty in ("reward", "kl"), 'must be "reward" or "kl"'),
            ("label_smoothing", 0 <= self.label_smoothing < 0.5, "must lie in [0, 0.5)"),
            ("discount_floor", 0 <= self.discount_floor <= 1, "must lie in [0, 1]"),
            ("retention", self.retention >= 0, "must be 0 or above"),
            ("length_normalised", isinstance(self.length_normalised, bool), "must be true or false"),
        )

    def _require_number(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{name} = {value!r}: must be a finite number.")
        object.__setattr__(self, name, float(value))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "QAdapterConfig":
        """The settings of a named preset ("default", "undiscounted", "kl", "authors"), with `overrides` on top.

        Raises:
            ConfigError: an unknown preset, or a value outside its range.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QAdapterConfig":
        """The settings in `values`; unknown keys are errors, missing ones are too (no silent defaults on loading).

        Only settings that older folders do not know may be missing: they mean what those were trained with.

        Raises:
            ConfigError: unknown or missing keys, or a value outside its range.
        """
        values = ADDED_LATER | values
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            missing, unknown = sorted(names - set(values)), sorted(map(str, set(values) - names))
            raise ConfigError(f"Q-Adapter settings do not match: missing {missing}, unknown {unknown}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss has a KL from the base, which then needs a gradient."""
        return self.penalty == "kl" or self.retention > 0

    @property
    def single_stream(self) -> bool:
        """Whether the trained policy at full strength needs no base stream: its logits are z_θ (identity 6)."""
        return self.parametrisation == "residual" and self.alpha_0 == self.alpha_tilde
