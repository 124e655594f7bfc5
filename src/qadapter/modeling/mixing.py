"""The dial in all its forms: strengths a row or a token, weights of several adapters, and a cap on the KL."""

import math
from collections.abc import Callable, Mapping, Sized
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qadapter.errors import ConfigError
from qadapter.functional import beside, kl_divergence, shrinkage

BISECTIONS = 30
KL_ROUNDING = 4e-6  # nats; float32 was seen to be wrong by 1.3e-6 in a KL over 50,000 tokens
MAX_DIAL = 1e4  # beyond it float32 keeps less than 0.01 of a mixed logit


class StepState(NamedTuple):
    """What a strength callable sees before each token.

    Args:
        input_ids: all tokens so far, prompt included, (B, T).
        prompt_length: tokens of the (padded) prompt; the generated ones are `input_ids[:, prompt_length:]`.
    """

    input_ids: Tensor
    prompt_length: int


# The dial: a number, a number a row (B,) or a token (B, T), or a function of the state that returns a number (a row).
Strength = float | Tensor | Callable[[StepState], float | Tensor]


# A weight for each adapter by name, or all of them as (B, K) in the adapters' order.
AdapterWeights = Mapping[str, float | Tensor] | Tensor


def checked_number(value: Any, name: str) -> float:
    """`value` as a float, refused if it is no finite number or larger than any dial.

    Compiled code cannot ask; `generate` has asked before.
    """
    if torch.compiler.is_compiling():
        return value
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):  # numpy's are Real, too
        raise ConfigError(f"{name} = {value!r}: must be a finite number (0 is the base, 1 the policy).")
    number = float(value)
    if abs(number) > MAX_DIAL:
        raise ConfigError(f"{name} = {value!r}: must lie within ±{MAX_DIAL:g} (0 is the base, 1 the policy).")
    return number


def checked_decay(value: Any) -> float:
    """The factor of the strength from one token of the answer to the next as a float.

    Raises:
        ConfigError: it does not lie in (0, 1].
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 < number <= 1:
        raise ConfigError(f"decay = {value!r}: must lie in (0, 1] (1 keeps the strength over the answer).")
    return number


def refuse_changing(what: str) -> None:
    """Raise ConfigError if something makes a strength change along a text, where weights are interpolated."""
    if what:
        raise ConfigError(
            f'{what} cannot be used with interpolation="weights", whose cache holds what the strength made of the text '
            'so far: give a number, or one a row, or take "logits".'
        )


def check_shape(name: str, value: Any, *shapes: tuple[int, ...]) -> None:
    """Refuse a tensor of several numbers that has none of the shapes, of which the first is one number a row.

    Raises:
        ConfigError: it has none; it holds no real numbers; it is a list or an array, not a tensor.
    """
    if isinstance(value, Tensor):
        require_real(name, value)
        if value.numel() != 1 and tuple(value.shape) not in shapes:
            raise ConfigError(f"{name} has the shape {tuple(value.shape)}: give one number, or one a row, {shapes[0]}.")
    elif isinstance(value, Sized) and not isinstance(value, str) and not callable(value):
        raise ConfigError(f"{name} = {value!r}: give one number, or a tensor of one a row, {shapes[0]}.")


def require_real(name: str, value: Tensor) -> None:
    """Raise ConfigError for a tensor of truth values or of complex numbers."""
    if value.dtype == torch.bool or value.is_complex():
        raise ConfigError(f"{name} is a tensor of {value.dtype}: give real numbers, of a float type or integers.")


def checked_weights(
    weights: Mapping[str, float | Tensor] | None, defaults: Mapping[str, float]
) -> dict[str, float | Tensor]:
    """A weight for each adapter: those given, 0 for the others; the defaults if none are given.

    Raises:
        ConfigError: an unknown adapter, or a weight that is not finite.
    """
    if weights is None:
        return dict(defaults)
    unknown = sorted(set(weights) - set(defaults))
    if unknown:
        raise ConfigError(f"adapter_weights names {unknown}; the adapters are {sorted(defaults)}.")
    result: dict[str, float | Tensor] = dict.fromkeys(defaults, 0.0)
    for name, weight in weights.items():
        result[name] = weight if isinstance(weight, Tensor) else checked_number(weight, f"adapter_weights[{name!r}]")
    return result


def checked_nats(
    value: float | Tensor | None, name: str, device: torch.device, rows: int, read: bool = True
) -> Tensor | None:
    """`max_kl` or `min_kl` as a tensor, () or (B,); an infinite cap is none, an infinite threshold leaves the base.

    A number that is 0 is no threshold: None.

    Args:
        read: whether to look at the value; where `generate` has done so, it would hold up every token.

    Raises:
        ConfigError: a negative value or NaN, what is no number, or another number of them than one, or one a row.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):  # numpy's numbers are Real, too
        raise ConfigError(f"{name} = {value!r}: must be a number of nats per token, or a tensor of one a row.")
    check_shape(name, value, (rows,))
    if name == "min_kl" and isinstance(value, Real) and value == 0:
        return None
    nats = torch.as_tensor(value if isinstance(value, Tensor) else float(value), dtype=torch.float32, device=device)
    if nats.numel() == 1:
        nats = nats.reshape(())
    # A number is looked at as one: compiled code would be cut in two by a look into a tensor.
    sound = not read or (bool((nats >= 0).all()) if isinstance(value, Tensor) else value >= 0)  # false for NaN too
    if not sound:
        raise ConfigError(f"{name} = {value!r}: must be 0 or above, in nats per token.")
    return nats


def bounded(value: Tensor, name: str) -> Tensor:
    """`value`; reads the tensor, so not for every token.

    Raises:
        ConfigError: an entry that is no real number, not finite, or larger than any dial.
    """
    require_real(name, value)
    if not bool((value.abs() <= MAX_DIAL).all()):  # false for NaN too
        raise ConfigError(f"{name} = {value.tolist()!r}: every entry must be a finite number within ±{MAX_DIAL:g}.")
    return value


def evaluated(strength: Strength, state: StepState | None) -> float | Tensor:
    """A callable's strength as a tensor (B,), so that the set of streams is the same at every token.

    Raises:
        ConfigError: there is no state, as a pass is given embeddings or a part of the text, or the value does not fit.
    """
    if not callable(strength):
        return strength
    if state is None:
        raise ConfigError(
            "a callable strength reads the text so far: give input_ids, not embeddings, and all of them, without a "
            "cache. `generate` does so at each token; a loop of your own gives the callable's value as a tensor (B,)."
        )
    value, rows = strength(state), state.input_ids.shape[0]
    if not isinstance(value, Tensor):
        value = torch.full((rows,), checked_number(value, "strength (from the callable)"))
    if value.shape != (rows,):
        raise ConfigError(f"the strength callable gave the shape {tuple(value.shape)}; one value a row is ({rows},).")
    return bounded(value, "strength (from the callable)").to(state.input_ids.device)


def times(strength: float | Tensor, weight: float | Tensor) -> float | Tensor:
    """strength · weight, where a weight a row meets a strength a token."""
    if isinstance(weight, Tensor) and isinstance(strength, Tensor) and strength.dim() == 2:
        weight = weight.unsqueeze(-1)
    return strength * weight


def kept_columns(value: float | Tensor, kept: Any) -> float | Tensor:
    """A coefficient a token (B, T) for the kept positions only; others, (B, 1) among them, as they are."""
    return value[:, kept] if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] > 1 else value


def capped_logits(logits: Tensor, base_logits: Tensor, cap: Tensor) -> tuple[Tensor, Tensor]:
    """Logits whose KL from the base stays within `cap`, and the share s ∈ [0, 1] of the way that they go; (B, T).

    z = z_b + s (z − z_b) with the largest s for which KL(π_s ‖ π_b) ≤ cap, by bisection: the KL does not decrease
    with s. The lower end is kept, below the cap by what float32 rounds, so the cap is never exceeded; one as small as
    that leaves the base alone. Logits come back in float32.
    """
    base, delta = base_logits.float(), logits.float() - base_logits.float()
    cap = beside(cap, base.dim() - 1) - KL_ROUNDING  # () or (B, 1)
    low = torch.zeros(base.shape[:-1], device=base.device)
    high = torch.ones_like(low)
    whole = kl_divergence(base + delta, base) <= cap
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fits = kl_divergence(base + middle.unsqueeze(-1) * delta, base) <= cap
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    share = torch.where(whole, torch.ones_like(low), low)
    return base + share.unsqueeze(-1) * delta, share


def thresholded_logits(
    base_logits: Tensor, delta: Tensor, strength: float | Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits z_b + λ s δ, and the share s = max(0, 1 − κ / KL) ∈ [0, 1) of the strength, (B, T).

    KL is that of the policy at strength 1 from the base, so s depends on the text alone: where the adapters would move
    the base by no more than κ nats they are taken to have nothing to say, and the base itself speaks.

    Args:
        base_logits, delta: z_b and z − z_b of the policy at strength 1, (B, T, V).
        strength: λ, a number, (B,) or (B, T).
        threshold: κ in nats, () or (B,).
    """
    share = shrinkage(kl_divergence(base_logits + delta, base_logits), beside(threshold, delta.dim() - 1))
    if isinstance(strength, Tensor):
        strength = beside(strength.to(delta), delta.dim() - 1)
    return base_logits + (strength * share).unsqueeze(-1) * delta, share


def last_strength(strength: float | Tensor, share: float | Tensor, logits: Tensor) -> Tensor:
    """The strength (B,) used at the last position of `logits` (B, T, V), given the share that a cap let through."""
    if isinstance(strength, Tensor) and strength.dim() == 2:
        strength = strength[:, -1]
    if isinstance(share, Tensor):
        share = share[:, -1]
    return torch.as_tensor(strength * share, dtype=torch.float32, device=logits.device).expand(logits.shape[0])
