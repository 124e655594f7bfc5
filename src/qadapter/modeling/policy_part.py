"""What the parts of the policy share: the model's attributes, and the dial that a call takes where it sets none."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypedDict, Unpack

from peft import PeftModel
from torch import Tensor

from qadapter.config import QAdapterConfig
from qadapter.errors import ConfigError
from qadapter.functional import MixCoefficients, mix_coefficients
from qadapter.modeling.heads import Head
from qadapter.modeling.mixing import Strength, checked_weights
from qadapter.modeling.streams import StreamPlan


class DialSettings(TypedDict, total=False):
    """The dial's settings, as `forward` and `generate` take them; `decay` is of `generate` alone."""

    strength: Strength
    adapter_weights: Mapping[str, float | Tensor]
    max_kl: float | Tensor | None
    min_kl: float | Tensor | None
    decay: float
    interpolation: str


DIAL = tuple(DialSettings.__annotations__)
# The settings besides strength and weights, with the values that ask for nothing; the first is the usual one.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "max_kl": (None, math.inf),
    "min_kl": (None, 0),
    "decay": (1.0,),
    "interpolation": ("logits",),
}


class PolicyPart:
    """What each part of `QAdapterForCausalLM` may ask of the whole, whose `__init__` sets it."""

    # The frozen base with the adapters' layers in it, what follows its decoder, and who runs when.
    base: Any  # PreTrainedModel; which attributes it has is the architecture's business
    config: Any
    head: Head
    plan: StreamPlan
    configs: dict[str, QAdapterConfig]
    shared_layers: int
    rows_can_fork: bool
    training: bool
    device: Any
    _peft: tuple[PeftModel]

    # The settings of calls that give none.
    strength: Any
    adapter_weights: Mapping[str, float | Tensor]
    max_kl: Any
    min_kl: Any
    decay: float
    interpolation: str

    @property
    def adapters(self) -> list[str]:
        """The adapters' names, in order."""
        return list(self.configs)

    @property
    def peft_model(self) -> PeftModel:
        """PEFT's view of the base with its adapters, for PEFT's own functions (saving, loading)."""
        return self._peft[0]

    def trained_coefficients(self) -> dict[str, MixCoefficients]:
        """Weights (c_θ, c_b) of each adapter's trained policy."""
        return {
            name: mix_coefficients(config.parametrisation, config.alpha_tilde, config.alpha_0)
            for name, config in self.configs.items()
        }

    def unusual(self) -> dict[str, Any]:
        """The model's own settings of `NEUTRAL` that ask for something."""
        own = {name: getattr(self, name) for name in NEUTRAL}
        return {name: v for name, v in own.items() if isinstance(v, Tensor) or v not in NEUTRAL[name]}

    @contextmanager
    def dial(self, **settings: Unpack[DialSettings]) -> Iterator[Self]:
        """Within the context these settings are the model's own, which calls take that give none.

        For what only calls the model: a harness, a pipeline, a trainer's evaluation. Settings that are not named stay
        as they are; `max_kl=None` is no cap and `min_kl=None` no threshold.

        Raises:
            ConfigError: a setting that the dial does not have; weights that are none by name, or of an adapter that the
                model does not have. Other values are checked where they are used.
        """
        if unknown := sorted(set(settings) - set(DIAL)):
            raise ConfigError(f"dial sets {unknown}; the settings are {', '.join(DIAL)}.")
        if "adapter_weights" in settings:
            weights = settings["adapter_weights"]
            if not isinstance(weights, Mapping):
                raise ConfigError(f"adapter_weights = {weights!r}: give {{name: weight}}.")
            settings["adapter_weights"] = checked_weights(weights, dict.fromkeys(self.adapters, 0.0))
        before = {name: getattr(self, name) for name in settings}
        try:
            for name, value in settings.items():
                setattr(self, name, value)
            yield self
        finally:
            for name, value in before.items():
                setattr(self, name, value)
