"""The policy and the loss of `functional.py` against the loops of `oracle.py`, and the identities of the method."""

import json
import math
from pathlib import Path

import oracle
import pytest
import torch

from benchmarks.experiments.authors import authors_loss
from qadapter import functional
from qadapter.config import QAdapterConfig
from qadapter.fused import TokenStatistics, token_statistics
from qadapter.objective import pair_losses

SHARED = Path(__file__).parents[1].parent / "shared"
SETTINGS = [
    ("residual", 0.1, 0.1),
    ("residual", 0.7, 0.2),
    ("residual", 0.5, 0.0),
    ("residual", 0.3, 1.9),
    ("logits", 1.0, 0.01),
    ("logits", 0.5, 0.5),
    ("logits", 2.0, 0.0),
]


def random_batch(lengths=(7, 3, 1, 5, 2, 7), vocabulary=11, seed=0):
    """Logits (B, T, V), actions (B, T) and mask (B, T) with T = max length, float64."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = len(lengths), max(lengths)
    z_theta = 2 * torch.randn(rows, width, vocabulary, generator=generator, dtype=torch.float64)
    z_base = 2 * torch.randn(rows, width, vocabulary, generator=generator, dtype=torch.float64)
    actions = torch.randint(vocabulary, (rows, width), generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return z_theta, z_base, actions, mask


def rewards_of(z_theta, z_base, actions, mask, parametrisation, alpha_tilde, alpha_0, gamma=1.0, floor=0.0):
    """Rewards (B, T) by the package's functions, from full logits; also log-probabilities of policy and base."""
    coefficients = functional.mix_coefficients(parametrisation, alpha_tilde, alpha_0)
    policy = functional.mix_streams([z_theta, z_base], coefficients)
    pick = lambda logits: logits.gather(-1, actions[..., None]).squeeze(-1)  # noqa: E731
    q = functional.q_values(pick(policy), pick(z_base), alpha_tilde, alpha_0)
    values = functional.soft_values(policy.logsumexp(-1), z_base.logsumexp(-1), alpha_tilde, alpha_0)
    rewards = functional.implied_rewards(q, values, mask, gamma, floor)
    return rewards, q, values, pick(policy.log_softmax(-1)), pick(z_base.log_softmax(-1))


def loss_of(batch, setting, gamma=1.0, beta=0.0, length_normalised=False, label_smoothing=0.0, floor=0.0):
    rewards, _, values, _, _ = rewards_of(*batch, *setting, gamma, floor)
    mask = batch[-1]
    returns = functional.response_returns(rewards, values, mask, gamma, length_normalised, floor)
    penalty = functional.pair_means(rewards.square(), mask)
    return functional.preference_loss(returns, penalty, beta, label_smoothing)


def objective_of(batch, config, retained=None):
    """The loss of each pair as training computes it under the settings of an adapter."""
    z_theta, z_base, actions, mask = batch
    coefficients = functional.mix_coefficients(config.parametrisation, config.alpha_tilde, config.alpha_0)
    policy = functional.mix_streams([z_theta, z_base], coefficients)
    statistics = token_statistics(policy.flatten(0, 1), z_base.flatten(0, 1), actions.flatten())
    return pair_losses(TokenStatistics(*(column.view(mask.shape) for column in statistics)), mask, config, retained)[0]


def sides_of(batch, pair, setting, gamma, floor):
    """Chosen and rejected answer of a pair, each as the oracle takes it: (rewards, V(s_0))."""
    z_theta, z_base, actions, mask = batch
    for row in (pair, pair + 3):
        n = int(mask[row].sum())
        steps = (z_theta[row, :n].tolist(), z_base[row, :n].tolist(), actions[row, :n].tolist())
        start = oracle.value(z_theta[row, 0].tolist(), z_base[row, 0].tolist(), *setting)
        yield oracle.rewards(*steps, *setting, gamma, floor), start


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("gamma", "floor"), [(1.0, 0.0), (0.9, 0.0), (0.9, 0.7), (0.3, 0.1), (0.5, 1.0)])
@pytest.mark.parametrize(
    ("beta", "length_normalised", "label_smoothing"), [(0.0, False, 0.0), (10.0, False, 0.1), (0.1, True, 0.0)]
)
def test_loss_equals_the_plain_python_oracle(setting, gamma, floor, beta, length_normalised, label_smoothing):
    batch = random_batch()
    expected = [
        oracle.pair_loss(
            *sides_of(batch, pair, setting, gamma, floor), gamma, beta, length_normalised, label_smoothing, floor
        )
        for pair in range(3)
    ]
    actual = loss_of(batch, setting, gamma, beta, length_normalised, label_smoothing, floor)
    assert actual.tolist() == pytest.approx(expected, rel=1e-12)
    config = QAdapterConfig(
        *setting,
        gamma=gamma,
        discount_floor=floor,
        beta=beta,
        length_normalised=length_normalised,
        label_smoothing=label_smoothing,
    )
    assert objective_of(batch, config).tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_loss_with_the_kl_and_that_of_texts_equal_the_oracle(setting):
    batch = random_batch()
    z_theta, z_base, _, mask = batch
    kls = [
        [
            oracle.kl(
                oracle.policy_logits(z_theta[row, t].tolist(), z_base[row, t].tolist(), *setting),
                z_base[row, t].tolist(),
            )
            for row in (pair, pair + 3)
            for t in range(int(mask[row].sum()))
        ]
        for pair in range(3)
    ]
    expected = [
        oracle.pair_loss(*sides_of(batch, pair, setting, 0.9, 0.0), 0.9, 0.3, kls=kls[pair]) for pair in range(3)
    ]
    expected[1] = oracle.text_loss(kls[1], retention=0.7)
    config = QAdapterConfig(*setting, gamma=0.9, discount_floor=0.0, beta=0.3, penalty="kl", retention=0.7)
    actual = objective_of(batch, config, retained=[False, True, False])
    assert actual.tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("setting", SETTINGS)
def test_policy_equals_its_definition(setting):
    z_theta, z_base, _, _ = random_batch(lengths=(3, 3))
    coefficients = functional.mix_coefficients(*setting)
    policy = functional.mix_streams([z_theta, z_base], coefficients).softmax(-1)
    for row in range(2):
        for t in range(3):
            logits = oracle.policy_logits(z_theta[row, t].tolist(), z_base[row, t].tolist(), *setting)
            total = oracle.log_sum_exp(logits)
            expected = [math.exp(logit - total) for logit in logits]
            assert policy[row, t].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("setting", [*SETTINGS[:2], SETTINGS[4]])
def test_gradients_of_the_loss(setting):
    z_theta, z_base, actions, mask = random_batch(lengths=(3, 2, 1, 3), vocabulary=5)

    def loss(z):
        return loss_of((z, z_base, actions, mask), setting, gamma=0.9, beta=0.5, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, z_theta.requires_grad_())


@pytest.mark.parametrize("setting", SETTINGS)
def test_identity_1_advantage_is_the_scaled_log_ratio(setting):
    _, alpha_tilde, alpha_0 = setting
    _, q, values, policy_logps, base_logps = rewards_of(*random_batch(), *setting)
    torch.testing.assert_close(q - values, alpha_tilde * policy_logps - alpha_0 * base_logps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("gamma", "floor"), [(1.0, 0.0), (0.8, 0.0), (0.8, 0.5)])
def test_identity_2_rewards_telescope_to_the_first_value(setting, gamma, floor):
    _, alpha_tilde, alpha_0 = setting
    batch = random_batch()
    mask = batch[-1]
    rewards, _, values, policy_logps, base_logps = rewards_of(*batch, *setting, gamma, floor)
    weights = torch.tensor([max(gamma**t, floor) for t in range(mask.shape[1])], dtype=torch.float64)
    advantages = ((alpha_tilde * policy_logps - alpha_0 * base_logps) * weights * mask).sum(-1)
    torch.testing.assert_close((rewards * weights).sum(-1), advantages + values[:, 0], rtol=1e-11, atol=1e-12)
    returns = functional.response_returns(rewards, values, mask, gamma, discount_floor=floor)
    torch.testing.assert_close(returns, advantages, rtol=1e-11, atol=1e-11)
    # Where the response begins in its row does not matter.
    later = [torch.nn.functional.pad(tensor, (3, 2)) for tensor in (rewards, values, mask)]
    torch.testing.assert_close(functional.response_returns(*later, gamma, discount_floor=floor), returns)


@pytest.mark.parametrize(("gamma", "floor"), [(1.0, 0.0), (0.8, 0.0), (0.8, 0.5)])
@pytest.mark.parametrize("length_normalised", [False, True])
def test_a_shift_of_all_logits_of_a_state_changes_no_return(length_normalised, gamma, floor):
    """No policy knows of it: in the mean too the answers' lengths must not turn it into a preference."""
    z_theta, z_base, actions, mask = random_batch()
    shifts = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    losses = [
        loss_of(
            (z, z_base, actions, mask), ("residual", 0.7, 0.7), gamma, length_normalised=length_normalised, floor=floor
        )
        for z in (z_theta, z_theta + shifts.unsqueeze(-1))
    ]
    torch.testing.assert_close(*losses, rtol=1e-11, atol=1e-11)


def test_the_mean_of_a_pair_is_over_the_tokens_of_both_answers():
    values = torch.tensor([[1.0, 2.0, 9.0], [5.0, 9.0, 9.0], [6.0, 9.0, 9.0], [3.0, 4.0, 8.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]).bool()
    assert functional.pair_means(values, mask).tolist() == [3.0, 5.0]
    assert functional.pair_means(values.square(), mask).tolist() == pytest.approx([41 / 3, (25 + 9 + 16 + 64) / 4])


def test_an_answer_without_tokens_has_no_return_and_no_penalty():
    ones, mask = torch.ones(4, 3), torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert functional.response_returns(ones, ones, mask, 0.5, length_normalised=True).tolist() == [0.25, 0, 0, 0]
    assert functional.pair_means(ones, mask).tolist() == [1, 0]


def test_half_precision_is_mixed_in_float32():
    streams = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    mixed = functional.mix_streams(streams.unbind(), [1.0, torch.full((5,), -0.9)])
    torch.testing.assert_close(mixed, streams[0].float() - 0.9 * streams[1].float())


def test_identity_3_residual_loss_is_dpo():
    kappa, batch = 0.3, random_batch()
    z_theta, z_base, _, mask = batch
    # DPO needs both sides to share the first state.
    z_theta[3:, 0], z_base[3:, 0] = z_theta[:3, 0], z_base[:3, 0]
    loss = loss_of(batch, ("residual", kappa, kappa))
    _, _, _, policy_logps, base_logps = rewards_of(*batch, "residual", kappa, kappa)
    chosen, rejected = ((policy_logps - base_logps) * mask).sum(-1).chunk(2)
    dpo = [math.log(1 + math.exp(-kappa * margin)) for margin in (chosen - rejected).tolist()]
    assert loss.tolist() == pytest.approx(dpo, rel=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0, 1.7, -0.5])
def test_identity_4_one_head_serves_any_strength(setting, strength):
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(13, 7, generator=generator, dtype=torch.float64)
    h_theta, h_base = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    trained = functional.mix_coefficients(*setting)
    adapters, base = functional.composed_coefficients({"a": trained}, {"a": strength})
    mixed = functional.mix_streams([h_theta, h_base], [adapters["a"], base]) @ head.T
    policy = functional.mix_streams([h_theta @ head.T, h_base @ head.T], trained)
    expected = (1 - strength) * (h_base @ head.T) + strength * policy
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)


def test_identity_6_equal_alphas_leave_the_adapter_stream_alone():
    assert functional.mix_coefficients("residual", 0.37, 0.37) == (1.0, 0.0)


def test_untrained_residual_policy_has_loss_ln_2():
    z_theta, _, actions, mask = random_batch()
    loss = loss_of((z_theta, z_theta, actions, mask), ("residual", 0.1, 0.1), beta=10.0)
    assert loss.tolist() == pytest.approx([math.log(2)] * 3, rel=1e-12)


def test_kl_from_the_base_does_not_decrease_with_strength():
    z_theta, z_base, _, _ = random_batch()
    trained = functional.mix_coefficients("residual", 0.5, 0.2)
    last = torch.full(z_base.shape[:-1], -1e-12, dtype=torch.float64)
    for strength in (0.0, 0.1, 0.5, 1.0, 2.0, 5.0):
        adapters, base = functional.composed_coefficients({"a": trained}, {"a": strength})
        kl = functional.kl_divergence(functional.mix_streams([z_theta, z_base], [adapters["a"], base]), z_base)
        assert (kl >= last - 1e-12).all()
        last = kl


def test_kl_is_taken_under_the_first_distribution():
    z_theta, z_base, _, _ = random_batch()
    expected = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=z) for z in (z_theta, z_base))
    )
    torch.testing.assert_close(functional.kl_divergence(z_theta, z_base), expected, rtol=1e-12, atol=1e-12)


def test_value_after_the_last_token_is_zero_and_padding_is_ignored():
    z_theta, z_base, actions, mask = random_batch()
    rewards = rewards_of(z_theta, z_base, actions, mask, "residual", 0.7, 0.2)[0]
    poisoned = torch.where(mask[..., None], z_theta, torch.tensor(1e30, dtype=torch.float64))
    again = rewards_of(poisoned, z_base, actions, mask, "residual", 0.7, 0.2)[0]
    assert torch.equal(rewards, again)
    q = rewards_of(z_theta, z_base, actions, mask, "residual", 0.7, 0.2)[1]
    last = mask.sum(-1) - 1
    rows = torch.arange(len(last))
    torch.testing.assert_close(rewards[rows, last], q[rows, last])


@pytest.mark.parametrize("case", range(4))
def test_authors_released_loss_is_reproduced(case):
    path = SHARED / "golden" / "authors_loss.json"
    if not path.exists():
        pytest.skip("the authors' golden values are not beside this checkout")
    golden = json.loads(path.read_text())["cases"][case]
    mask = torch.tensor(golden["attention_mask"]).bool()
    mask[:, : golden["prompt_len"]] = False
    loss = authors_loss(
        torch.tensor(golden["q_logits"]),
        torch.tensor(golden["base_logits"]),
        torch.tensor(golden["input_ids"]),
        mask,
        **{name: golden[name] for name in ("alpha_tilde", "alpha_0", "gamma", "beta")},
    )
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-5)
