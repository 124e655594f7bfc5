"""Peak bytes that a stretch of code holds in new tensors, counted and therefore the same on every run."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakAllocations(TorchDispatchMode):
    """Within the context, adds up the storages of tensors that operations return until they are freed.

    `peak` is the largest sum. Memory that a kernel takes and gives back within one operation is not seen; tensors that
    lived before are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {storage_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and storage_of(leaf) not in before:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or place in self._known:
            return
        self._known[place] = size
        self._held += size
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._remove, place)

    def _remove(self, place: int) -> None:
        self._held -= self._known.pop(place, 0)


def storage_of(tensor: torch.Tensor) -> int:
    """The address of a tensor's memory."""
    return tensor.untyped_storage().data_ptr()
