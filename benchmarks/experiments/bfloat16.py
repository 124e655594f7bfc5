"""Products of bfloat16 matrices on a CPU without instructions for them: in float32, rounded once at the end.

That is what such instructions do (products are exact in float32 and summed there), so cells of the two kinds of machine
differ as two orders of summation do. torch's own way on such a CPU is 4 to 20 times slower.
"""

import warnings
from typing import Any

import torch

_library: list[torch.library.Library] = []  # the overrides last as long as it does


def multiply_in_float32() -> None:
    """From now on, in this process: mm, addmm, bmm and baddbmm of bfloat16 tensors on the CPU."""
    if _library:
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that it overrides
        for name in ("mm", "addmm", "bmm", "baddbmm"):
            library.impl(name, _override(getattr(torch.ops.aten, name).out), "CPU", allow_override=True)
    _library.append(library)


def multiplies_in_float32() -> bool:
    """Whether `multiply_in_float32` was called in this process."""
    return bool(_library)


def _override(product_into: Any) -> Any:
    # The operation's `out` form is another entry of the dispatcher: it still has torch's own kernel.
    def product(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        dtype = tensors[0].dtype
        out = tensors[0].new_empty(0, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
        if dtype != torch.bfloat16:
            return product_into(*tensors, **options, out=out)
        return product_into(*(tensor.float() for tensor in tensors), **options, out=out).to(dtype)

    return product
