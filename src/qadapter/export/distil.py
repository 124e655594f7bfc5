"""Any setting of the dial as a plain LoRA: a student trained to the policy's own distribution on the user's prompts."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from qadapter.errors import ConfigError
from qadapter.export.summed import summed_lora
from qadapter.functional import kl_divergence
from qadapter.generation import Sampling, encode, end_tokens, ending_arguments, until_end
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.passes import positions_of
from qadapter.modeling.streams import parts_of

HELD_OUT_SHARE = 0.2
Dial = Mapping[str, Any]  # settings of the dial as `generate` takes them


@dataclass(frozen=True)
class DistilledLora:
    """A student and how far models are from the policy, KL in nats a token on held-out prompts.

    `kl_base` is the bare base's distance, `kl_before` and `kl_after` the student's before and after training.
    """

    student: Any
    kl_base: float
    kl_before: float
    kl_after: float
    train_prompts: int
    held_out_prompts: int


def distil(
    model: QAdapterForCausalLM,
    tokenizer: Any,
    prompts: Sequence[str],
    strength: float = 1.0,
    epochs: int = 3,
    learning_rate: float = 3e-4,
    max_new_tokens: int = 128,
    batch_size: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    dial: Dial = MappingProxyType({}),
) -> DistilledLora:
    """A plain LoRA that minimises KL(policy ‖ student) on answers sampled from the policy.

    A fifth of the prompts, of which repeats are dropped, is held out to measure the gap. `progress` is called with
    (done, total) steps.

    Args:
        dial: settings of the policy besides its strength, as numbers: `adapter_weights`, `max_kl`, `min_kl`, `decay`
            and `interpolation` of `generate`; the model's own where it has none.

    Raises:
        ConfigError: fewer than five different prompts, or a setting that `generate` refuses.
    """
    dial = {**dial, "strength": strength}
    shuffled = list(dict.fromkeys(prompts))
    if len(shuffled) < 5:
        raise ConfigError(
            f"{len(shuffled)} different prompts were given: distilling needs at least 5, better hundreds."
        )
    batch_size = min(batch_size, len(shuffled) // 2)  # one batch at least to train on, and one held out
    random.Random(seed).shuffle(shuffled)
    held_out = max(1, int(HELD_OUT_SHARE * len(shuffled)))
    torch.manual_seed(seed)
    batches = [_sampled(model, tokenizer, part, dial, max_new_tokens) for part in _parts(shuffled, batch_size)]
    # Whole batches are held out: the first ones that cover the share.
    test = batches[: -(-held_out // batch_size)]
    train = batches[len(test) :]
    student = _student(model, dial)
    with student.disable_adapter():
        bare = _gap(model, student, test, dial)
    before = _gap(model, student, test, dial)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    total = epochs * len(train)
    for step in range(total):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * (1 - step / total)
        _divergence(model, student, train[step % len(train)], dial).backward()
        clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if progress is not None:
            progress(step + 1, total)
    after = _gap(model, student, test, dial)
    tests = sum(len(batch["input_ids"]) for batch in test)
    return DistilledLora(student, bare, before, after, len(shuffled) - tests, tests)


def _parts(items: Sequence[str], size: int) -> list[Sequence[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@torch.no_grad()
def _sampled(
    model: QAdapterForCausalLM, tokenizer: Any, prompts: Sequence[str], dial: Dial, max_new_tokens: int
) -> dict[str, Tensor]:
    """Prompts with answers sampled from the policy, and the mask of positions that predict an answer's token."""
    batch = {name: tensor.to(model.device) for name, tensor in encode(tokenizer, prompts).items()}
    ends = end_tokens(model, tokenizer)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=1.0)
    arguments: dict[str, Any] = {**batch, **sampling.to_kwargs(), **ending_arguments(ends, tokenizer)}
    ids = model.generate(**arguments, **dial)
    prompt_length = batch["input_ids"].shape[1]
    alive = until_end(ids[:, prompt_length:], ends)
    attention_mask = torch.cat([batch["attention_mask"], alive.long()], dim=1)
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    predicts[:, prompt_length - 1 : -1] = alive
    return {"input_ids": ids, "attention_mask": attention_mask, "predicts": predicts}


def _divergence(model: QAdapterForCausalLM, student: nn.Module, batch: dict[str, Tensor], dial: Dial) -> Tensor:
    """Mean KL(policy ‖ student) over the answers' tokens."""
    settings = dict(dial)
    decay = settings.pop("decay", model.decay)
    if decay < 1:  # the strength of each answer's t-th token, as `generate` has it
        steps = batch["predicts"].long().cumsum(-1) - 1
        settings["strength"] = settings["strength"] * decay ** steps.clamp(min=0).float()
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "position_ids": positions_of(batch["attention_mask"]),
        "use_cache": False,
    }
    with torch.no_grad():
        target = model(**inputs, **settings).logits[batch["predicts"]].float()
    return kl_divergence(target, student(**inputs).logits[batch["predicts"]].float()).mean()


@torch.no_grad()
def _gap(model: QAdapterForCausalLM, student: nn.Module, batches: Sequence[Any], dial: Dial) -> float:
    tokens = sum(int(batch["predicts"].sum()) for batch in batches)
    total = sum(float(_divergence(model, student, batch, dial)) * int(batch["predicts"].sum()) for batch in batches)
    return total / tokens


def _student(model: QAdapterForCausalLM, dial: Dial) -> Any:
    """A plain LoRA that starts as the sum of the policy's adapters, scaled by the dial.

    To first order in the adapters' updates that is the policy already: distilling mends the rest.
    """
    scaled = {name: dial.get(name) for name in ("strength", "adapter_weights", "interpolation")}
    factors = dict.fromkeys(model.adapters, 0.0) | {
        name: float(coefficient) * float(factor)
        for stream, coefficient in model.stream_coefficients(**scaled).items()
        for name, factor in parts_of(stream)
    }
    return summed_lora(model, factors)
