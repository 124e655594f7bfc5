"""The models a server offers, and the streams that a request for one of them needs."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from qadapter.errors import ConfigError
from qadapter.functional import MixCoefficients, composed_coefficients
from qadapter.serving.api_errors import ApiError, bad_request
from qadapter.serving.schema import MAX_REQUEST_DIAL, QAdapterOptions

BASE_NAME = "base"
# What the stream of blended adapters is called here, where each row has factors of its own; no adapter's name has a +.
BLENDED = "+"


def require_free_names(names: Collection[str]) -> None:
    """Raise ConfigError if an adapter is to be served under the base's name."""
    if BASE_NAME in names:
        raise ConfigError(
            f"an adapter is called {BASE_NAME!r}, which is the base model's name here: rename its folder."
        )


def with_strength(name: str) -> tuple[str, float | None]:
    """("formal", 0.5) of "formal@0.5"; a name that gives no strength reads as ("", None)."""
    served, _, number = name.rpartition("@")
    if re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?", number, re.ASCII):
        return served, float(number)
    return "", None


@dataclass(frozen=True)
class Dial:
    """The policy of one answer: logits Σ_k c_k z_k over its streams, with the KL from the base capped if wanted.

    Args:
        coefficients: c_k of every stream that is needed; None names the base, `BLENDED` the adapters blended.
        max_kl: cap in nats per token.
        min_kl: threshold in nats; with it the coefficients are those of strength 1, and `strength` comes on top.
        decay: factor ρ of the way from the base from one token of the answer to the next.
        factors: those of the adapters in the blend.
        conditional: off inside code, JSON, reasoning and tool calls: the way from the base is multiplied by the row's
            share, 0 or 1.
    """

    coefficients: Mapping[str | None, float]
    max_kl: float | None = None
    decay: float = 1.0
    factors: Mapping[str, float] = field(default_factory=dict)
    min_kl: float | None = None
    strength: float = 1.0
    conditional: bool = False

    @property
    def changing(self) -> bool:
        """Whether the coefficients change along the answer."""
        return self.decay < 1 or self.conditional

    def at(self, stream: str | None, step: int, share: float = 1.0) -> float:
        """c_k of a stream at the answer's `step`-th token: the base's is 1 and the others' 0 once nothing is left.

        Args:
            share: of the strength, where the dial is conditional.
        """
        share = share * self.decay**step if self.min_kl is None else 1.0
        coefficient = self.coefficients[stream]
        return share * coefficient + (1 - share if stream is None else 0.0)


@dataclass(frozen=True)
class Catalogue:
    """What is served under which name.

    Args:
        models: {served name: {adapter of the loaded model: weight}}.
        trained: (c_θ, c_b) of each adapter's trained policy.
        interpolation: of "logits" or of "weights", as of `QAdapterForCausalLM.forward`.
    """

    models: Mapping[str, Mapping[str, float]]
    trained: Mapping[str, MixCoefficients]
    interpolation: str = "logits"

    def __post_init__(self) -> None:
        require_free_names(self.models)
        for name in self.models:
            served, _ = with_strength(name)
            if served in self.models:
                raise ConfigError(
                    f"an adapter is called {name!r}, by which {served!r} is asked for at a strength: rename its folder."
                )
        object.__setattr__(self, "models", MappingProxyType(dict(self.models)))

    @property
    def names(self) -> list[str]:
        """All names, the base's first."""
        return [BASE_NAME, *self.models]

    def named(self, name: str) -> tuple[str, float | None]:
        """The served name in a request's `model`, and the strength if one follows it: "formal@0.5".

        So clients that send no fields but OpenAI's (chat pages, lm-eval) have the dial, too.

        Raises:
            ApiError: 404, no such model is served.
        """
        if name in self.names:
            return name, None
        served, strength = with_strength(name)
        if served in self.models:
            return served, strength
        example = f"; with a strength: {next(iter(self.models))}@0.5" if self.models else ""
        message = f"the model {name!r} does not exist here. Models: {', '.join(self.names)}{example}."
        raise ApiError(404, message, "model_not_found", "model")

    def dial(self, name: str, options: QAdapterOptions) -> Dial:
        """The policy that a request for model `name` with `options` gets.

        Raises:
            ApiError: an unknown name; a dial for the base, which has none; two strengths.
        """
        name, strength = self.named(name)
        if strength is not None and options.strength is not None:
            raise bad_request("the model's name and qadapter both give a strength: leave one out.", "qadapter.strength")
        if name == BASE_NAME:
            if options.weights or options.strength:
                raise bad_request(
                    f"model {BASE_NAME!r} has no adapter to give weight to: name an adapter as the model.", "qadapter"
                )
            for field, nothing in (("max_kl", None), ("min_kl", 0.0), ("decay", 1.0), ("off_inside", False)):
                value = getattr(options, field)
                if value is not None and value != nothing:
                    raise bad_request(
                        f"{field} = {value:g} does nothing for model {BASE_NAME!r}, which has no dial: leave it out "
                        "or name an adapter as the model.",
                        f"qadapter.{field}",
                    )
            return Dial({None: 1.0})
        strength = next((given for given in (strength, options.strength) if given is not None), 1.0)
        served = {name: 1.0} if options.weights is None else options.weights
        whole = self._adapter_weights(served)
        weights = {adapter: strength * weight for adapter, weight in whole.items()}
        if any(abs(weight) > MAX_REQUEST_DIAL for weight in weights.values()):
            raise bad_request(f"strength times weight exceeds {MAX_REQUEST_DIAL:g}.", "qadapter.weights")
        decay, conditional = 1.0 if options.decay is None else options.decay, bool(options.off_inside)
        if self.interpolation == "weights":
            for field, wrong in (("decay", decay < 1), ("min_kl", options.min_kl), ("off_inside", conditional)):
                if wrong:
                    message = f"{field} needs a server that interpolates logits: leave it out."
                    raise bad_request(message, f"qadapter.{field}")
            return _blended(weights, options.max_kl)
        if options.min_kl and any(weights.values()):
            coefficients = self._coefficients(whole, base_needed=True)
            return Dial(coefficients, options.max_kl, decay, {}, options.min_kl, strength, conditional)
        changing = decay < 1 or conditional
        coefficients = self._coefficients(weights, base_needed=options.max_kl is not None or changing)
        if len(coefficients) == 1:  # nothing to lower
            return Dial(coefficients, options.max_kl)
        return Dial(coefficients, options.max_kl, decay, conditional=conditional)

    def _adapter_weights(self, served: Mapping[str, float]) -> dict[str, float]:
        """The weight of each adapter, from weights of served names; adapters served twice add up."""
        weights = dict.fromkeys(self.trained, 0.0)
        for name, weight in served.items():
            if name not in self.models:
                message = f"weights name {name!r}, which is no adapter here. Adapters: {', '.join(self.models)}."
                raise ApiError(404, message, "model_not_found", "qadapter.weights")
            for adapter, share in self.models[name].items():
                weights[adapter] += weight * share
        return weights

    def _coefficients(self, weights: Mapping[str, float], base_needed: bool) -> dict[str | None, float]:
        adapters, base = composed_coefficients(self.trained, weights)
        needed: dict[str | None, float] = {name: float(c) for name, c in adapters.items() if c != 0.0}
        if not needed:
            return {None: 1.0}
        if base != 0.0 or base_needed:
            needed[None] = float(base)
        return needed


def _blended(weights: Mapping[str, float], max_kl: float | None) -> Dial:
    """The dial of one stream of scaled adapters; a cap needs the base's, too."""
    factors = {name: float(weight) for name, weight in weights.items() if weight != 0.0}
    if not factors:
        return Dial({None: 1.0})
    return Dial({BLENDED: 1.0} if max_kl is None else {BLENDED: 1.0, None: 0.0}, max_kl, factors=factors)
