"""Intervals, the rule judge and scores: against known values, simulated coverage and direct computation."""

import math
import random

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import APART, plain_peft, tiny_base, tiny_policy, token_pairs, two_passes

from qadapter import QAdapterConfig
from qadapter.evaluation.batches import batches_by_beginning, batches_by_length
from qadapter.evaluation.columns import Column
from qadapter.evaluation.drift import measure_texts
from qadapter.evaluation.drift_figures import drift_figures
from qadapter.evaluation.intervals import wilson
from qadapter.evaluation.rules import follows_house_style, sentence_count
from qadapter.evaluation.texts import Text

COLUMNS = [Column("policy")]

# -- intervals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # R: prop.test(successes, n, correct = FALSE)
        (0, 10, 0.0, 0.2775328),
        (5, 10, 0.2365931, 0.7634069),
        (8, 10, 0.4901625, 0.9433178),
        (1, 1, 0.2065493, 1.0),
    ],
)
def test_wilson_equals_known_values(successes, n, low, high):
    interval = wilson(successes, n)
    assert interval == pytest.approx((successes / n, low, high, n), abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(1, 7), (3.5, 11), (15, 148), (147, 148)])
def test_wilsons_ends_are_the_rates_that_the_score_test_just_rejects(successes, n):
    """Wilson (1927): |rate − p| = z √(p (1 − p) / n) at both ends p."""
    interval = wilson(successes, n)
    for end in (interval.low, interval.high):
        assert abs(interval.value - end) == pytest.approx(1.959963985 * math.sqrt(end * (1 - end) / n))


def test_wilson_without_observations_knows_nothing():
    value, *rest = wilson(0, 0)
    assert math.isnan(value)
    assert rest == [0.0, 1.0, 0]


@settings(deadline=None)
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, 2 * n), st.just(n))))
def test_wilson_holds_its_rate_and_stays_a_rate(case):
    halves, n = case
    interval = wilson(halves / 2, n)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


@pytest.mark.parametrize("n", [11, 40])
def test_wilson_covers_rates_about_95_times_in_100(n):
    """Averaged over all rates: for a single rate the coverage of whole numbers jumps."""
    generator = random.Random(7)
    trials = 4000
    covered = 0
    for _ in range(trials):
        rate = generator.random()
        interval = wilson(sum(generator.random() < rate for _ in range(n)), n)
        covered += interval.low <= rate <= interval.high
    assert covered / trials == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


# -- the rule judge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        (" \n", 0),
        ("Paris", 1),
        ("Paris.", 1),
        ("Paris. It is large", 2),
        ("Really?! Yes! Good...", 3),
        ("Pi is 3.14 and e is 2.718.", 1),
        ("See example.com for v1.2.3.", 1),
        ('"Go." She went.', 2),
        ("(It rains.) We stay. ", 2),
        ("Yes.\nNo.", 2),
        ("It costs 5 ... 7 euros.", 2),
        ("Ask Dr. Smith.", 2),  # an abbreviation counts as an end: the rule errs against the answer
    ],
)
def test_sentences_end_at_marks_before_white_space(text, count):
    assert sentence_count(text) == count


@pytest.mark.parametrize(
    "answer",
    [
        "Paris.",
        "Paris",
        "  The capital is Paris. It has two million people.  ",
        "-5 degrees is cold.",
        "The #1 rule: breathe.",
        "Use 2 * 3 = 6.",
        "Well-known - and true.",
    ],
)
def test_one_or_two_plain_sentences_follow_the_house_style(answer):
    assert follows_house_style(answer, finished=True)
    assert not follows_house_style(answer, finished=False)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "  ",
        "One. Two. Three.",
        "One. Two. Three",
        "First line.\nSecond line.",
        "- Paris",
        "* Paris",
        "• Paris",
        "# Paris",
        "> Paris",
        "1. Paris",
        "2) Paris",
        "It is **Paris**.",
        "Run ```ls```.",
    ],
)
def test_more_sentences_lines_lists_and_markup_do_not(answer):
    assert not follows_house_style(answer, finished=True)


# -- scores --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return tiny_base(dtype=torch.float64)


@pytest.fixture(scope="module")
def policy(base):
    return tiny_policy(base)


def direct_sums(plain, context, answer):
    """Log-probabilities of policy and base, KL and entropy, one token and one vocabulary entry at a time."""
    z_theta, z_base = two_passes(plain, input_ids=torch.tensor([context + answer]))
    logps = base_logps = kl = entropy = 0.0
    for position, token in enumerate(answer, start=len(context) - 1):
        b = z_base[0, position].tolist()
        settings = (APART.parametrisation, APART.alpha_tilde, APART.alpha_0)
        p = oracle.policy_logits(z_theta[0, position].tolist(), b, *settings)
        p, b = ([z - oracle.log_sum_exp(zs) for z in zs] for zs in (p, b))
        logps, base_logps = logps + p[token], base_logps + b[token]
        kl += sum(math.exp(x) * (x - y) for x, y in zip(p, b, strict=True))
        entropy -= sum(math.exp(x) * x for x in p)
    return logps, base_logps, kl, entropy


def test_measured_texts_equal_direct_computation(base, policy):
    plain = plain_peft(base, policy)
    texts = [Text(pair["prompt_ids"], pair[side]) for pair in token_pairs(5) for side in ("chosen_ids", "rejected_ids")]
    for text, measured in zip(texts, measure_texts(policy, texts, COLUMNS), strict=True):
        own = measured.columns["policy"]
        sums = [column.sum().item() for column in (own.logps, measured.base.logps, own.kl, own.entropy)]
        assert sums == pytest.approx(direct_sums(plain, text.context, text.answer), rel=1e-9)


def test_measuring_nothing_gives_nothing(policy):
    assert measure_texts(policy, [], COLUMNS) == []


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 120))
def test_batches_hold_each_text_once_and_keep_to_their_size(lengths, batch_tokens):
    batches = list(batches_by_length([[0] * length for length in lengths], batch_tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= batch_tokens


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=20), st.integers(1, 30))
def test_batches_of_texts_that_begin_alike_hold_each_once_and_keep_to_their_size(texts, batch_tokens):
    batches = list(batches_by_beginning(texts, batch_tokens))
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(texts)))
    assert [texts[index] for index in order] == sorted(texts)
    for batch in batches:
        assert len(batch) == 1 or sum(len(texts[index]) for index in batch) <= batch_tokens


def test_an_untrained_adapter_has_not_drifted(base):
    """The residual form with α₀ = α̃ starts at the base, exactly."""
    untrained = tiny_policy(base, QAdapterConfig(), trained=False)
    measured = measure_texts(untrained, [Text([1], [2, 3]), Text([4, 5], [6])], COLUMNS)
    figures = drift_figures(measured)["policy"]
    assert (figures["kl"].value, figures["loss_change"].value) == (0.0, 0.0)
