"""Texts measured token by token against direct computation, and the batches in which they run."""

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import APART, plain_peft, tiny_base, tiny_policy, token_pairs, two_passes

from qadapter import QAdapterConfig
from qadapter.evaluation.batches import batches_by_beginning, batches_by_length
from qadapter.evaluation.columns import Column
from qadapter.evaluation.drift import measure_texts
from qadapter.evaluation.drift_figures import drift_figures
from qadapter.evaluation.texts import Text

COLUMNS = [Column("policy")]


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


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 120))
def test_batches_hold_each_text_once_and_keep_to_their_size(lengths, batch_tokens):
    batches = list(batches_by_length([[0] * length for length in lengths], batch_tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= batch_tokens


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
