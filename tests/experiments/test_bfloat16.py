"""Products of bfloat16 in float32: as torch's own to a rounding, and nothing else changes."""

import subprocess
import sys
from pathlib import Path

# In a process of its own: the overrides cannot be taken back.
SCRIPT = """
import torch
from benchmarks.experiments.bfloat16 import multiplies_in_float32, multiply_in_float32

torch.manual_seed(0)
a, b, c = torch.randn(40, 24).bfloat16(), torch.randn(24, 48).bfloat16(), torch.randn(48).bfloat16()
linear = torch.nn.Linear(24, 48).bfloat16()


def products():
    x = a[None].clone().requires_grad_()
    linear.weight.grad = None
    y = linear(x)
    y.float().square().sum().backward()
    both = a[None].expand(2, -1, -1), b[None].expand(2, -1, -1)
    return [
        a @ b, torch.addmm(c, a, b, beta=2, alpha=0.5), torch.bmm(*both), a[None] @ b,
        torch.baddbmm(c[None, None], *both, alpha=0.5, beta=2), y, x.grad, linear.weight.grad,
    ]


own, single = products(), a.float() @ b.float()
assert not multiplies_in_float32()
multiply_in_float32()
multiply_in_float32()  # once is enough, twice does no harm
assert multiplies_in_float32()
for before, now in zip(own, products(), strict=True):
    assert now.dtype == torch.bfloat16 and now.shape == before.shape
    torch.testing.assert_close(now, before, rtol=2**-7, atol=2**-7 * before.abs().max().item())
assert torch.equal(a @ b, single.bfloat16()), "one rounding, at the end"
assert torch.equal(a.float() @ b.float(), single), "float32 is as it was"
assert torch.equal(a.double() @ b.double(), torch.mm(a.double(), b.double(), out=torch.empty(0).double()))
print("done")
"""


def test_products_are_those_of_float32_rounded_once() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
