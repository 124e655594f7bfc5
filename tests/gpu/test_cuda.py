"""What runs otherwise on a GPU than on a CPU, against its slow twin: attention of packed rows, and compiled layers."""

import pytest
import torch
from models import APART, lora, tiny_base, tiny_policy, token_pairs

from qadapter.data import PackedCollator
from qadapter.modeling import varlen
from qadapter.modeling.compiled import compile_layers
from qadapter.modeling.packed import enable_packing
from qadapter.objective import pair_losses

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    # What the compiler itself warns of.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

ARCHITECTURES = ["llama", "qwen3", "mistral", "gemma3"]


def policy_of(architecture, dtype=torch.bfloat16):
    return tiny_policy(tiny_base(architecture, head_dim=16, num_hidden_layers=4).to("cuda", dtype)).train()


def losses_and_gradients(policy, pairs):
    assert enable_packing(policy.base)
    batch = {name: value.cuda() if torch.is_tensor(value) else value for name, value in PackedCollator()(pairs).items()}
    policy.zero_grad()
    losses = pair_losses(policy(**batch), batch["completion_mask"], APART)[0]
    losses.mean().backward()
    gradients = torch.cat([p.grad.flatten().float() for p in policy.adapter_parameters().values()])
    return losses.detach(), gradients


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_kernel_for_all_sequences_equals_one_after_the_other(architecture, monkeypatch):
    policy, pairs = policy_of(architecture), token_pairs(5)
    calls = []
    kernel = varlen.causal_attention
    monkeypatch.setattr(varlen, "causal_attention", lambda *arguments: calls.append(1) or kernel(*arguments))
    losses, gradients = losses_and_gradients(policy, pairs)
    assert calls
    monkeypatch.setattr(varlen, "fits", lambda *arguments: False)
    expected, expected_gradients = losses_and_gradients(policy, pairs)
    # bfloat16 has eight bits: sums in another order differ in the last of them.
    assert error(losses, expected) < 2e-2
    assert error(gradients, expected_gradients) < 5e-2


def test_gradients_of_gathering_and_restoring_are_those_of_indexing():
    batch = PackedCollator()(token_pairs(4))
    gather, restore, repeated = (batch[f"{name}_indices"].cuda() for name in ("gather", "restore", "repeated"))
    states = torch.randn(len(restore), 3, device="cuda", dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(gather), 3, device="cuda", dtype=torch.float64)
    for fast, slow in (
        (varlen.gather(states, gather, restore, repeated) * weights, states[gather] * weights),
        (varlen.restore(states[gather] * weights, restore), (states[gather] * weights)[restore]),
    ):
        torch.testing.assert_close(fast, slow)
        (actual,), (expected,) = (torch.autograd.grad(out.square().sum(), states) for out in (fast, slow))
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("upper", [False, True])
def test_compiled_layers_give_the_loss_and_gradients_of_eager_ones(architecture, upper):
    policy = policy_of(architecture, torch.float32)
    if upper:
        base = tiny_base(architecture, head_dim=16, num_hidden_layers=4).cuda()
        policy = tiny_policy(base, peft_config=lora(layers_to_transform=[2, 3])).train()
    expected, expected_gradients = losses_and_gradients(policy, token_pairs(5))
    compile_layers(policy)
    for pairs in (token_pairs(5), token_pairs(3), token_pairs(5)):
        losses, gradients = losses_and_gradients(policy, pairs)
    assert error(losses, expected) < 1e-4
    assert error(gradients, expected_gradients) < 1e-3
