"""A layer's update: written out as sums, as compiled code runs it on a CPU, it is what the products are."""

import pytest
import torch

from qadapter_vllm.lora import SUMS_RANK, Update

INPUTS, SIZES = 48, (32, 16, 16)  # a packed layer's outputs


def update(ranks, dtype):
    """Random matrices of a packed layer's modules; rank 0 is one that is not adapted."""
    generator = torch.Generator().manual_seed(0)
    lora_a = torch.randn(sum(ranks), INPUTS, generator=generator).to(dtype)
    parts = [torch.randn(size, rank, generator=generator).to(dtype) for size, rank in zip(SIZES, ranks, strict=True)]
    result = Update(lora_a, parts)
    result.pack()
    return result, lora_a.double(), parts


@pytest.mark.parametrize("ranks", [(8, 8, 8), (4, 0, 2), (1, 3, 0), (0, 0, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_sums_and_products_are_the_update(ranks, dtype, tolerance):
    layer, lora_a, parts = update(ranks, dtype)
    x = torch.randn(7, INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)
    blocks = (x.double() @ lora_a.T).split(ranks, dim=-1)
    expected = torch.cat([h @ part.double().T for h, part in zip(blocks, parts, strict=True)], dim=-1)
    for actual in (layer(x), layer.summed(x)):
        assert actual.dtype == dtype
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_large_ranks_stay_products():
    assert update((SUMS_RANK, 0, 1), torch.float32)[0].as_sums
    assert not update((SUMS_RANK + 1, 0, 1), torch.float32)[0].as_sums
