"""The dial with a threshold, `min_kl`: tokens of which the adapters have little to say stay the base's own."""

import itertools

import models
import numpy as np
import oracle
import pytest
import torch

from qadapter import ConfigError, QAdapterConfig
from qadapter.evaluation.columns import Column
from qadapter.evaluation.drift import measure_texts
from qadapter.evaluation.texts import Text
from qadapter.functional import kl_divergence, shrinkage

IDS = torch.tensor(models.token_ids(9, 9, 9))
# Within the KLs of the tiny policies' tokens, so that some of them stay the base's.
THRESHOLD = 0.35
CONFIGS = {
    "residual": QAdapterConfig(),
    "logits": QAdapterConfig(parametrisation="logits", alpha_tilde=1.3, alpha_0=0.4),
}


@pytest.fixture(scope="module", params=[("llama", "residual"), ("llama", "logits"), ("phi", "residual")], ids="-".join)
def policy(request):
    architecture, form = request.param  # Phi's head has a bias, so no one matmul serves both streams
    return models.tiny_policy(models.tiny_base(architecture), CONFIGS[form])


def logits(model, **settings):
    with torch.no_grad():
        return model(IDS, **settings).logits.double()


def by_definition(policy, strength, threshold, **weights):
    """z_b + λ max(0, 1 − κ / KL) (z_1 − z_b), token by token from two whole passes."""
    base, full = logits(policy, strength=0.0), logits(policy, strength=1.0, **weights)
    strengths = torch.as_tensor(strength, dtype=torch.float64)
    strengths = strengths.view(*strengths.shape, *[1] * (2 - strengths.dim())).expand(base.shape[:2])
    thresholds = torch.as_tensor(threshold, dtype=torch.float64).view(-1, 1).expand(base.shape[:2])
    result = base.clone()
    for row in range(base.shape[0]):
        for t in range(base.shape[1]):
            kl = oracle.kl(full[row, t].tolist(), base[row, t].tolist())
            share = max(0.0, 1.0 - float(thresholds[row, t]) / kl)
            result[row, t] += strengths[row, t] * share * (full[row, t] - base[row, t])
    return result


@pytest.mark.parametrize(
    "strength",
    [1.0, 0.6, 2.5, -0.5, torch.tensor([0.0, 0.5, 2.0]), torch.linspace(-0.5, 1.5, 27).view(3, 9)],
    ids=["whole", "part", "beyond", "negative", "a row", "a token"],
)
@pytest.mark.parametrize("threshold", [THRESHOLD, torch.tensor([0.0, THRESHOLD, 3 * THRESHOLD])], ids=["one", "a row"])
def test_logits_are_those_of_the_definition(policy, strength, threshold):
    expected = by_definition(policy, strength, threshold)
    torch.testing.assert_close(logits(policy, strength=strength, min_kl=threshold), expected, rtol=1e-4, atol=1e-4)


def test_some_tokens_stay_the_bases_and_some_do_not(policy):
    base = logits(policy, strength=0.0)
    moved = kl_divergence(logits(policy, min_kl=THRESHOLD), base) > 1e-9
    far = kl_divergence(logits(policy, strength=1.0), base) > THRESHOLD
    assert torch.equal(moved, far)
    assert 0 < far.sum() < far.numel()


@pytest.mark.parametrize("weights", [{"concise": 0.8, "polite": 0.4}, {"concise": 1.0, "polite": 0.0}])
def test_a_composition_has_one_threshold(composed, weights):
    both, _ = composed
    expected = by_definition(both, 1.5, THRESHOLD, adapter_weights=weights)
    actual = logits(both, strength=1.5, min_kl=THRESHOLD, adapter_weights=weights)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_no_threshold_is_the_plain_dial_and_an_infinite_one_the_base(policy):
    assert torch.equal(logits(policy, strength=0.7, min_kl=0.0), logits(policy, strength=0.7))
    rows = logits(policy, strength=0.7, min_kl=torch.tensor([0.0, torch.inf, THRESHOLD]))
    torch.testing.assert_close(rows[0], logits(policy, strength=0.7)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows[1], logits(policy, strength=0.0)[1], rtol=1e-5, atol=1e-5)


def test_strength_0_is_the_base_bit_by_bit(policy):
    assert torch.equal(logits(policy, strength=0.0, min_kl=THRESHOLD), logits(policy, strength=0.0))
    text = policy.generate(IDS, max_new_tokens=4, do_sample=False, strength=0.0, min_kl=THRESHOLD)
    assert torch.equal(text, policy.generate(IDS, max_new_tokens=4, do_sample=False, strength=0.0))


def test_an_adapter_without_effect_leaves_the_base():
    policy = models.tiny_policy(config=QAdapterConfig(), trained=False)
    for threshold in (0.0, 1e-6):
        actual = logits(policy, strength=1.0, min_kl=torch.tensor([threshold] * 3))
        torch.testing.assert_close(actual, logits(policy, strength=0.0), rtol=1e-5, atol=1e-5)


def test_kl_is_monotone_in_strength(policy):
    base = logits(policy, strength=0.0)
    kls = [kl_divergence(logits(policy, strength=s / 4, min_kl=THRESHOLD), base) for s in range(1, 9)]
    for lower, higher in itertools.pairwise(kls):
        assert (higher >= lower - 1e-6).all()


def test_a_cap_holds_on_what_is_left(policy):
    base, free = logits(policy, strength=0.0), logits(policy, strength=2.0, min_kl=THRESHOLD)
    capped = logits(policy, strength=2.0, min_kl=THRESHOLD, max_kl=0.1)
    assert (kl_divergence(capped, base) <= 0.1 + 1e-9).all()
    fits = kl_divergence(free, base) <= 0.1 - 1e-5
    torch.testing.assert_close(capped[fits], free[fits], rtol=1e-4, atol=1e-4)


def test_the_models_own_threshold_counts_where_a_call_gives_none(policy):
    expected = logits(policy, strength=0.7, min_kl=THRESHOLD)
    with policy.dial(min_kl=THRESHOLD):
        assert torch.equal(logits(policy, strength=0.7), expected)
        assert torch.equal(logits(policy, strength=0.7, min_kl=0.0), logits(policy, strength=0.7, min_kl=0))
        assert not torch.equal(logits(policy, strength=0.7, min_kl=0.0), expected)


def test_a_threshold_of_0_holds_against_the_models_own(policy):
    options = {"max_new_tokens": 5, "do_sample": False, "strength": 1.5}
    plain = policy.generate(IDS, **options)
    with policy.dial(min_kl=3 * THRESHOLD):
        assert not torch.equal(policy.generate(IDS, **options), plain)
        for none in (0, 0.0, torch.zeros(3)):
            assert torch.equal(policy.generate(IDS, min_kl=none, **options), plain)
            torch.testing.assert_close(
                logits(policy, min_kl=none, strength=1.5), logits(policy, min_kl=0, strength=1.5), rtol=1e-4, atol=1e-4
            )


def test_gradients_go_through_states_without_any_kl():
    policy = models.tiny_policy(config=QAdapterConfig(), trained=False)
    policy(IDS, labels=IDS, min_kl=0.1, strength=0.7).loss.backward()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


# -- generate ------------------------------------------------------------------------------------------------------


def greedy_by_recomputing(policy, rows, steps, **settings):
    for _ in range(steps):
        with torch.no_grad():
            rows = torch.cat([rows, policy(rows, **settings).logits[:, -1:].argmax(-1)], -1)
    return rows


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generate_equals_recomputing(policy, cache):
    expected = greedy_by_recomputing(policy, IDS, 6, strength=1.5, min_kl=THRESHOLD)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **cache}
    assert torch.equal(policy.generate(IDS, strength=1.5, min_kl=THRESHOLD, **options), expected)


def test_rows_of_a_batch_equal_single_runs_and_say_what_strength_they_used(policy):
    thresholds, strengths = torch.tensor([0.0, THRESHOLD, 4 * THRESHOLD]), torch.tensor([1.5, 0.7, 2.0])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_strengths": True}
    batch = policy.generate(IDS, strength=strengths, min_kl=thresholds, **options)
    for row in range(3):
        alone = policy.generate(
            IDS[row : row + 1], strength=float(strengths[row]), min_kl=float(thresholds[row]), **options
        )
        assert torch.equal(batch.sequences[row], alone.sequences[0])
        torch.testing.assert_close(batch.strengths[row], alone.strengths[0], rtol=1e-3, atol=1e-3)
    used = batch.strengths / strengths.unsqueeze(-1)
    assert (used >= 0).all()
    assert (used <= 1).all()
    assert torch.allclose(used[0], torch.ones(5))
    assert (used[1:] < 1).all()


OTHER_WAYS = {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"guidance_scale": 1.5}


@pytest.mark.parametrize("options", OTHER_WAYS, ids=str)
def test_other_ways_to_generate_know_the_threshold(policy, options):
    rows = IDS[:1] if "prompt_lookup_num_tokens" in options else IDS
    common = {"max_new_tokens": 6, "do_sample": False, "strength": 1.5, **options}
    given = policy.generate(rows, min_kl=THRESHOLD, **common)
    with policy.dial(min_kl=THRESHOLD):
        assert torch.equal(policy.generate(rows, **common), given)
    if "prompt_lookup_num_tokens" in options:
        steps = given.shape[1] - rows.shape[1]
        assert torch.equal(given, greedy_by_recomputing(policy, rows, steps, strength=1.5, min_kl=THRESHOLD))


def test_a_threshold_of_an_assistants_policy():
    policy, assistant = models.tiny_policy(config=QAdapterConfig()), models.tiny_base()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "strength": 1.5, "min_kl": THRESHOLD}
    expected = policy.generate(IDS[:1], **options)
    assert torch.equal(policy.generate(IDS[:1], assistant_model=assistant, **options), expected)


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), torch.tensor([0.1, -1.0, 0.0])], ids=str)
def test_a_threshold_below_zero_is_refused(threshold):
    policy = models.tiny_policy()
    with pytest.raises(ConfigError, match="min_kl = .*: must be 0 or above, in nats per token"):
        policy.generate(IDS, min_kl=threshold, max_new_tokens=1)
    if not isinstance(threshold, torch.Tensor):
        with pytest.raises(ConfigError, match="min_kl = .*: must be 0 or above"):
            policy(IDS, min_kl=threshold)


@pytest.mark.parametrize("name", ["min_kl", "max_kl"])
def test_what_is_no_threshold_and_no_cap_is_refused(name):
    policy = models.tiny_policy()
    for strength in (0.0, 1.5):
        for call in (policy, policy.generate):
            with pytest.raises(
                ConfigError, match=name + r" has the shape \(2,\): give one number, or one a row, \(3,\)"
            ):
                call(IDS, strength=strength, **{name: torch.ones(2)})
            with pytest.raises(ConfigError, match=f"{name} = -1.0: must be 0 or above"):
                call(IDS, strength=strength, **{name: -1.0})
            for wrong in ("0.1", [0.1] * 3, True):
                with pytest.raises(ConfigError, match=f"{name} = .*: must be a number of nats per token"):
                    call(IDS, strength=strength, **{name: wrong})


def test_one_threshold_has_any_shape_of_one_number():
    policy = models.tiny_policy()
    expected = logits(policy, min_kl=THRESHOLD)
    for kind in (np.float32, torch.tensor, lambda value: torch.tensor([[[value]]])):
        torch.testing.assert_close(logits(policy, min_kl=kind(THRESHOLD)), expected, rtol=1e-5, atol=1e-5)


def test_interpolated_weights_have_no_threshold():
    policy = models.tiny_policy(config=QAdapterConfig())
    for call in (policy, policy.generate):
        with pytest.raises(ConfigError, match="min_kl cannot be used with interpolation"):
            call(IDS, min_kl=THRESHOLD, interpolation="weights")
    with pytest.raises(ConfigError, match="min_kl cannot be used with interpolation"):
        Column("policy", min_kl=THRESHOLD, interpolation="weights")
    policy.min_kl = THRESHOLD  # and a 0 takes that back
    for none in (0.0, 0, np.float32(0)):
        plain = logits(policy, strength=0.5, min_kl=none, interpolation="weights")
        assert plain.isfinite().all()
        text = policy.generate(IDS, strength=0.5, min_kl=none, interpolation="weights", max_new_tokens=1)
        assert torch.equal(text[:, -1], plain[:, -1].argmax(-1))


# -- measured ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [None, 0.1])
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_drift_equals_full_logits(policy, cap, decay):
    texts = [Text(row[:4].tolist(), row[4:].tolist()) for row in IDS]
    columns = [Column(f"{s:g}", s, min_kl=THRESHOLD, max_kl=cap, decay=decay) for s in (0.5, 1.0, 2.0)]
    columns.append(Column("plain", 1.0))
    found = measure_texts(policy, texts, columns)
    for column in columns:
        strengths = torch.zeros(IDS.shape)
        strengths[:, 3:8] = column.strength * column.decay ** torch.arange(5)
        settings = {"min_kl": column.min_kl, "max_kl": column.max_kl}
        z = logits(policy, strength=strengths, **settings)[:, 3:-1]
        expected = kl_divergence(z, logits(policy, strength=0.0)[:, 3:-1])
        logps = z.log_softmax(-1).gather(-1, IDS[:, 4:].unsqueeze(-1)).squeeze(-1)
        for row, text in enumerate(found):
            torch.testing.assert_close(text.columns[column.name].kl.double(), expected[row], rtol=1e-3, atol=2e-5)
            torch.testing.assert_close(text.columns[column.name].logps.double(), logps[row], rtol=1e-4, atol=1e-4)


def test_a_columns_settings_and_its_context():
    policy, column = models.tiny_policy(), Column("policy", 0.5, min_kl=THRESHOLD)
    assert column.settings() == {"strength": 0.5, "min_kl": THRESHOLD}
    with column.applied(policy):
        assert policy.min_kl == THRESHOLD
    assert policy.min_kl is None
    assert Column("policy", min_kl=0.0).settings() == {"strength": 1.0}
    for wrong in (-1.0, True, "x"):
        with pytest.raises(ConfigError, match="min_kl = .*: must be a finite number, 0 or above"):
            Column("policy", min_kl=wrong)


def test_shrinkage_is_the_best_linear_estimate_of_a_signal_in_noise():
    # Signal and noise of variances 2 S and 2 κ: of all factors, S / (S + κ) leaves the smallest error.
    generator = torch.Generator().manual_seed(0)
    signal, noise = (torch.randn(200_000, generator=generator) * (2 * v) ** 0.5 for v in (0.3, 0.1))
    factors = torch.linspace(0, 1, 101)
    errors = torch.stack([(factor * (signal + noise) - signal).square().mean() for factor in factors])
    best = float(factors[errors.argmin()])
    assert best == pytest.approx(float(shrinkage(torch.tensor(0.4), 0.1)), abs=0.01)
    assert shrinkage(torch.tensor([0.0, 0.05, 0.1, 0.2, 1.0]), 0.1).tolist() == pytest.approx([0, 0, 0, 0.5, 0.9])
