"""The chunked statistics against the full-logits definition: values, gradients, chunk sizes, memory."""

import pytest
import torch

from qadapter import fused
from qadapter.functional import MixCoefficients, mix_streams
from qadapter.fused import (
    default_chunk_size,
    even_chunk_size,
    single_head_statistics,
    token_statistics,
    two_head_chunk_size,
    two_head_statistics,
)

TOKENS, HIDDEN, VOCABULARY = 11, 7, 13
COEFFICIENTS = MixCoefficients(0.8, -0.4)


def tensors(dtype=torch.float64, tokens=TOKENS, hidden=HIDDEN, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(0)
    h_theta, h_base = torch.randn(2, tokens, hidden, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, hidden, generator=generator, dtype=dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return h_theta.requires_grad_(), h_base, weight, targets


def weighted_sum(statistics, with_kl=True):
    """A scalar in which every token's differentiable statistics have gradients of their own."""
    weights = torch.linspace(-1, 1, len(statistics.logits), dtype=statistics.logits.dtype)
    two = (weights * statistics.logits).sum() + (weights.flip(0) * statistics.lse).square().sum()
    return two + (weights.square() * statistics.kl).sum() if with_kl else two


@pytest.mark.parametrize("kl_gradient", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("chunk_size", [1, 3, 11, 64])
def test_single_head_equals_full_logits(chunk_size, scale, kl_gradient):
    h_theta, h_base, weight, targets = tensors()
    slow_theta = h_theta.detach().clone().requires_grad_()
    mixed = mix_streams([h_theta, h_base], COEFFICIENTS)
    fast = single_head_statistics(mixed, h_base, weight, targets, scale, chunk_size, kl_gradient=kl_gradient)
    slow_mixed = mix_streams([slow_theta, h_base], COEFFICIENTS)
    slow = token_statistics(scale * slow_mixed @ weight.T, scale * h_base @ weight.T, targets)
    for name, actual, expected in zip(fast._fields, fast, slow, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, msg=name)
    assert fast.kl.requires_grad == kl_gradient
    weighted_sum(fast, kl_gradient).backward()
    weighted_sum(slow, kl_gradient).backward()
    torch.testing.assert_close(h_theta.grad, slow_theta.grad, rtol=1e-11, atol=1e-12)


def test_single_head_gradcheck():
    h_theta, h_base, weight, targets = tensors()

    def statistics(h):
        mixed = mix_streams([h, h_base], COEFFICIENTS)
        fast = single_head_statistics(mixed, h_base, weight, targets, 0.7, 4, kl_gradient=True)
        return fast.logits, fast.lse, fast.kl

    assert torch.autograd.gradcheck(statistics, h_theta)


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_two_heads_with_bias_and_softcap_equal_full_logits(chunk_size):
    h_theta, h_base, weight, targets = tensors()
    adapted = (weight + 0.1).requires_grad_()
    base_head = lambda h: 5 * torch.tanh((h @ weight.T + 0.2) / 5)  # noqa: E731
    adapter_head = lambda h: 5 * torch.tanh((h @ adapted.T + 0.2) / 5)  # noqa: E731
    fast = two_head_statistics(h_theta, h_base, adapter_head, base_head, COEFFICIENTS, targets, chunk_size)
    policy = mix_streams([adapter_head(h_theta), base_head(h_base)], COEFFICIENTS)
    slow = token_statistics(policy, base_head(h_base), targets)
    for actual, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(weighted_sum(fast), (h_theta, adapted))
    expected_gradients = torch.autograd.grad(weighted_sum(slow), (h_theta, adapted))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-11)


def test_kl_and_entropy_are_those_of_the_distributions():
    h_theta, h_base, weight, targets = tensors()
    statistics = single_head_statistics(h_theta, h_base, weight, targets)
    policy = torch.distributions.Categorical(logits=h_theta.detach() @ weight.T)
    base = torch.distributions.Categorical(logits=h_base @ weight.T)
    torch.testing.assert_close(statistics.entropy, policy.entropy())
    torch.testing.assert_close(statistics.kl, torch.distributions.kl_divergence(policy, base))
    torch.testing.assert_close(statistics.logps, policy.log_prob(targets))
    torch.testing.assert_close(statistics.base_logps, base.log_prob(targets))


def test_bfloat16_is_as_close_to_float64_as_plain_bfloat16_logits():
    h_theta, h_base, weight, targets = tensors(torch.bfloat16, 40, 64, 97)
    exact = token_statistics(h_theta.double() @ weight.double().T, h_base.double() @ weight.double().T, targets)
    plain = token_statistics((h_theta @ weight.T).float(), (h_base @ weight.T).float(), targets)
    fast = single_head_statistics(h_theta.float(), h_base, weight, targets, chunk_size=7)
    error = (fast.logps - exact.logps).abs().max()
    assert error <= (plain.logps - exact.logps).abs().max() + 1e-6
    assert fast.logits.dtype == torch.float32


def test_gradients_of_the_kl_in_bfloat16_are_those_of_float64():
    h_theta, h_base, weight, targets = tensors(torch.bfloat16, 40, 64, 97)
    mixed = h_theta.detach().float().requires_grad_()
    fast = single_head_statistics(mixed, h_base, weight, targets, chunk_size=7, kl_gradient=True)
    (actual,) = torch.autograd.grad(fast.kl.sum(), mixed)
    wide = h_theta.detach().double().requires_grad_()
    exact = token_statistics(wide @ weight.double().T, h_base.double() @ weight.double().T, targets)
    (expected,) = torch.autograd.grad(exact.kl.sum(), wide)
    assert (actual - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("large", ["policy", "base", "both"])
def test_large_logits_do_not_overflow(large):
    h_theta, h_base, weight, targets = tensors(torch.float32)
    h_theta, h_base = h_theta.detach() * (100 if large != "base" else 1), h_base * (100 if large != "policy" else 1)
    assert (h_theta @ weight.T).abs().max().item() > 200 or large == "base"
    fast = single_head_statistics(h_theta, h_base, weight, targets, chunk_size=3)
    slow = token_statistics(h_theta.double() @ weight.double().T, h_base.double() @ weight.double().T, targets)
    for actual, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-3)


def test_rows_of_a_chunk_that_are_widened_one_by_one_give_the_same(monkeypatch):
    h_theta, h_base, weight, targets = tensors(torch.bfloat16, 40, 64, 97)
    results = []
    for elements in (97 * 7, 97 * 3):
        monkeypatch.setattr(fused, "CPU_WIDENED_ELEMENTS", elements)
        statistics = single_head_statistics(h_theta.float(), h_base, weight, targets, chunk_size=7, kl_gradient=True)
        results.append((statistics, torch.autograd.grad(weighted_sum(statistics), h_theta)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_no_tokens_give_empty_statistics_and_zero_gradient():
    h_theta, h_base, weight, targets = tensors()
    none = torch.zeros(TOKENS, dtype=torch.bool)
    statistics = single_head_statistics(h_theta[none], h_base[none], weight, targets[none])
    statistics.logits.sum().backward()
    assert statistics.lse.shape == (0,)
    assert torch.equal(h_theta.grad, torch.zeros_like(h_theta))


@pytest.mark.parametrize(("device", "mebibytes"), [("cpu", 32), ("meta", 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_of_logits_is_bounded_for_any_vocabulary(device, mebibytes, dtype):
    for vocabulary in (97, 49_152, 128_256, 2**30):
        weight = torch.empty(vocabulary, 0, device=device, dtype=dtype)
        rows = default_chunk_size(weight)
        assert rows == 1 or rows * vocabulary * dtype.itemsize <= mebibytes * 2**20
        assert 1 <= two_head_chunk_size(weight) <= rows


def test_autocast_multiplies_in_its_own_type():
    h_theta, h_base, weight, targets = tensors(torch.float32, 40, 64, 97)
    narrow = single_head_statistics(h_theta, h_base, weight.bfloat16(), targets, chunk_size=7)
    expected = torch.autograd.grad(weighted_sum(narrow), h_theta)
    with torch.autocast("cpu", torch.bfloat16):
        statistics = single_head_statistics(h_theta, h_base, weight, targets, chunk_size=7)
    torch.testing.assert_close(statistics, narrow, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(weighted_sum(statistics), h_theta), expected, rtol=1e-2, atol=1e-2)


def test_chunks_of_a_cpu_are_alike():
    weight = torch.empty(49_152, 0)
    most = default_chunk_size(weight)
    sizes = [even_chunk_size(tokens, weight) for tokens in (0, 5, most, most + 1)]
    assert sizes == [most, 5, most, -(-(most + 1) // 2)]
    assert even_chunk_size(5, weight.to("meta")) == default_chunk_size(weight.to("meta"))
