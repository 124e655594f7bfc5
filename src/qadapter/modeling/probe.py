"""The logit probe: a few log-probabilities that an adapter folder stores, and that loading computes again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qadapter.errors import AdapterFormatError, TrainingError
from qadapter.modeling.passes import in_eval_mode
from qadapter.modeling.policy import QAdapterForCausalLM

PROBE_TOKENS = 12
PROBE_VALUES = 4
PROBE_TOLERANCE = {"float64": 5e-3, "float32": 5e-3, "bfloat16": 0.25, "float16": 0.1}
# Between dtypes rounding differs at every layer: SmolLM2-135M saved in bfloat16 and loaded in float32 was off by 0.31.
OTHER_DTYPE_FACTOR = 4


def probe_logps(model: QAdapterForCausalLM, ids: list[int]) -> dict[str, Tensor]:
    """Log-probabilities (V,) after `ids` of the base ("") and of each adapter's trained policy."""
    result = {}
    with in_eval_mode(model), torch.no_grad():
        for name in ["", *model.adapters]:
            batch = torch.tensor([ids], device=model.device)
            weights = {adapter: float(adapter == name) for adapter in model.adapters}
            with model.dial(strength=1.0, adapter_weights=weights, max_kl=None, min_kl=None, interpolation="logits"):
                logits = model(batch, use_cache=False, logits_to_keep=1).logits[0, -1]
            result[name] = logits.float().log_softmax(-1).cpu()
    return result


def make_probe(model: QAdapterForCausalLM) -> dict[str, Any]:
    """Token ids and the likeliest tokens' log-probabilities after them, for base and policy.

    Raises:
        TrainingError: they are not finite: a folder with such numbers could not be loaded.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = [(7919 * (index + 1)) % vocabulary for index in range(PROBE_TOKENS)]
    logps = {}
    for name, values in probe_logps(model, ids).items():
        top = values.topk(min(PROBE_VALUES, vocabulary))
        if not bool(top.values.isfinite().all()):
            part, way_out = (
                (f"adapter {name!r}", "lower learning_rate, or take an earlier checkpoint")
                if name
                else ("the base", "load it in float32, or check its files")
            )
            raise TrainingError(f"the log-probabilities of {part} are not finite, so nothing is saved: {way_out}.")
        logps[name] = {
            str(index): value for index, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        }
    return {"input_ids": ids, "dtype": str(model.dtype).removeprefix("torch."), "logps": logps}


def probe_tolerance(stored: str, dtype: torch.dtype) -> float:
    """Largest difference of a stored and a recomputed log-probability, by the coarser of the dtypes they are from."""
    own = str(dtype).removeprefix("torch.")
    tolerance = max(PROBE_TOLERANCE.get(name, 0.25) for name in (stored, own))
    return tolerance if stored == own else OTHER_DTYPE_FACTOR * tolerance


def check_probe(model: QAdapterForCausalLM, probe: dict[str, Any], folder: Path, names: Mapping[str, str]) -> None:
    """Raise AdapterFormatError unless base and adapters give the stored log-probabilities.

    Args:
        names: {name in the folder: name in the model}.
    """
    tokens = [*probe["input_ids"], *(int(index) for stored in probe["logps"].values() for index in stored)]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if max(tokens) >= vocabulary:
        raise AdapterFormatError(
            f"{folder}: the probe names the token {max(tokens)}, but the base model knows {vocabulary}: the file is "
            "damaged, or of another base model."
        )
    tolerance = probe_tolerance(probe["dtype"], model.dtype)
    actual = probe_logps(model, probe["input_ids"])
    for name, stored in probe["logps"].items():
        known_as = name and names[name]
        error = max(abs(actual[known_as][int(index)].item() - value) for index, value in stored.items())
        if not error <= tolerance:
            part = f"adapter {name!r}" if name else "base model"
            raise AdapterFormatError(
                f"{folder}: the {part} gives other log-probabilities than when it was saved (off by {error:.3g}, "
                f"allowed {tolerance:g}): a file or the software differs. "
                "Load the original files, or pass verify=False (--no-verify)."
            )
