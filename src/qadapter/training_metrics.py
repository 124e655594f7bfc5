"""Metrics of preference pairs, summed where the loss is computed and averaged once they are logged."""

from collections.abc import Callable

import torch
from torch import Tensor

from qadapter.devices import widest_float

# Those that a log entry has; of an evaluation with "eval_" before them.
METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "entropy", "qadapter/penalty", "qadapter/kl", "qadapter/value",
)  # fmt: skip
# With retention, of texts between two log entries; an evaluation has none.
RETAINED_KL = "qadapter/retained_kl"
# Those of which less is better.
SMALLER_IS_BETTER = ("loss", "rewards/rejected", "logps/rejected", "qadapter/penalty", "qadapter/kl")


class PairMetrics:
    """Sums on the device, of as many batches as come between two log entries; adding reads nothing from it."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(
        self,
        quantities: dict[str, Tensor],
        mask: Tensor,
        counted: list[bool] | None = None,
        retained: list[bool] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            quantities: those of `objective.pair_losses`, of 2P sequences (chosen first) or a response token each.
            mask: True on response tokens.
            counted: which of the P pairs count; None: all.
            retained: which are texts, whose mean KL is a metric of its own and which are no pairs; None: no metric.
        """
        if retained is not None:
            kl, tokens = (values.view(2, len(retained), -1)[:, retained] for values in (quantities["kl"] * mask, mask))
            self._add(RETAINED_KL, kl.sum(), tokens.sum())
            counted = [not is_text for is_text in retained]
        if counted is not None and not all(counted):
            both = len(mask)
            quantities = {
                name: values[counted * 2 if len(values) == both else counted] for name, values in quantities.items()
            }
            mask = mask[counted * 2]
        chosen, rejected = quantities["returns"].chunk(2)
        logps_chosen, logps_rejected = quantities["logps"].chunk(2)
        per_pair = {
            "loss": quantities["losses"],
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": logps_chosen,
            "logps/rejected": logps_rejected,
            "qadapter/penalty": quantities["penalty"],
        }
        for name, values in per_pair.items():
            self._add(name, values.sum(), values.new_full((), len(values)))
        tokens = mask.sum()
        for name, key in {"entropy": "entropy", "qadapter/kl": "kl", "qadapter/value": "values"}.items():
            self._add(name, (quantities[key] * mask).sum(), tokens)

    def _add(self, name: str, total: Tensor, weight: Tensor) -> None:
        old_total, old_weight = self._sums.get(name, (0, 0))
        self._sums[name] = (old_total + total, old_weight + weight)

    def averages(self, summed: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What was added since the last call, averaged; `summed` adds up a tensor over all processes."""
        sums, self._sums = self._sums, {}
        if not sums:
            return {}
        device = next(iter(sums.values()))[0].device
        wide = widest_float(device)
        pairs = torch.stack([torch.stack([total.to(wide), weight.to(wide)]) for total, weight in sums.values()])
        totals, weights = summed(pairs).T.tolist()
        found = zip(sums, totals, weights, strict=True)
        return {name: total / weight for name, total, weight in found if weight}
