"""How far the policy moved each token of a text, and what both models would have said instead."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qadapter.functional import kl_divergence
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.mixing import StepState, Strength, evaluated, refuse_changing

ALTERNATIVES = 5


@dataclass(frozen=True)
class TokenView:
    """One generated token under policy and base.

    Args:
        text: the token's own text.
        logp, base_logp: its log-probability under policy and base, in nats.
        kl: KL(policy ‖ base) of the distribution it was drawn from.
        strength: the strength used there (lower than asked for where it has decayed or a cap binds).
        top, base_top: the likeliest tokens as (text, probability), under policy and base.
    """

    text: str
    logp: float
    base_logp: float
    kl: float
    strength: float
    top: list[tuple[str, float]]
    base_top: list[tuple[str, float]]


@torch.no_grad()
def inspect_tokens(
    model: QAdapterForCausalLM, tokenizer: Any, ids: Tensor, prompt_length: int, settings: Mapping[str, Any]
) -> list[TokenView]:
    """A view of each token of `ids` (1, T) after the prompt, under the policy at `settings` (as of `generate`).

    Where a setting is not given, the model's own counts.
    """
    kept = ids.shape[1] - prompt_length + 1
    if kept < 2:
        return []
    own = {name: getattr(model, name) for name in ("strength", "max_kl", "min_kl", "decay")}
    settings = own | {name: value for name, value in settings.items() if value is not None}
    if model.checked_interpolation(settings.get("interpolation")) == "weights":
        changing = "a callable strength" if callable(settings["strength"]) else "a decay"
        refuse_changing(changing if callable(settings["strength"]) or settings["decay"] < 1 else "")
    asked = _asked(settings["strength"], settings.pop("decay"), ids, prompt_length)
    if callable(settings["strength"]) or not torch.equal(asked, asked[:1].expand_as(asked)):
        settings["strength"] = torch.zeros(ids.shape)
        settings["strength"][0, prompt_length - 1 : -1] = asked
    used = model(ids, use_cache=False, logits_to_keep=kept, **settings)
    policy = used.logits[0, :-1].float().log_softmax(-1)  # (answer tokens, V)
    base = model(ids, use_cache=False, logits_to_keep=kept, strength=0.0).logits[0, :-1].float().log_softmax(-1)
    kl = kl_divergence(policy, base)
    strengths = (asked * _share(policy, base, model, ids, settings)).tolist()
    views = []
    for index, token in enumerate(ids[0, prompt_length:].tolist()):
        views.append(
            TokenView(
                text=tokenizer.decode([token]),
                logp=float(policy[index, token]),
                base_logp=float(base[index, token]),
                kl=max(0.0, float(kl[index])),
                strength=strengths[index],
                top=_likeliest(tokenizer, policy[index]),
                base_top=_likeliest(tokenizer, base[index]),
            )
        )
    return views


def _asked(strength: Strength, decay: float, ids: Tensor, prompt_length: int) -> Tensor:
    """The strength asked for at each answer token, on the CPU."""
    ends = range(prompt_length, ids.shape[1])
    if callable(strength):
        seen = [torch.as_tensor(evaluated(strength, StepState(ids[:, :end], prompt_length))) for end in ends]
        strength = torch.cat(seen)
    return torch.as_tensor(strength).cpu() * decay ** torch.arange(len(ends))


def _share(
    policy: Tensor, base: Tensor, model: QAdapterForCausalLM, ids: Tensor, settings: Mapping[str, Any]
) -> Tensor:
    """The share of the strength that a threshold left and a cap let through at each answer token, on the CPU."""
    if settings.get("max_kl") is None and not settings.get("min_kl"):
        return torch.ones(len(policy))
    free = {**settings, "max_kl": math.inf, "min_kl": 0.0}  # None would take the model's own
    whole = model(ids, use_cache=False, logits_to_keep=len(policy) + 1, **free).logits[0, :-1].float().log_softmax(-1)
    # On the path from the base, centred logits move in proportion to the strength.
    moved, full = ((x - base) - (x - base).mean(-1, keepdim=True) for x in (policy, whole))
    return ((moved * full).sum(-1) / full.square().sum(-1).clamp(min=1e-12)).clamp(0.0, 1.0).cpu()


def _likeliest(tokenizer: Any, logps: Tensor) -> list[tuple[str, float]]:
    top = logps.topk(min(ALTERNATIVES, len(logps)))
    return [
        (tokenizer.decode([token]), value)
        for token, value in zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
    ]
