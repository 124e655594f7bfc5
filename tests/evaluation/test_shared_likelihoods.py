"""Likelihoods of many columns from one pass: equal to lm-eval's own, each request measured once."""

import pytest
from models import APART, tiny_base, tiny_policy, tiny_tokenizer

pytest.importorskip("lm_eval", reason="needs the extra eval")

from lm_eval.api.instance import Instance

from qadapter.errors import DataError
from qadapter.evaluation import shared_likelihoods
from qadapter.evaluation.columns import Column
from qadapter.evaluation.harness import PolicyLM
from qadapter.evaluation.progress import silent
from qadapter.evaluation.shared_likelihoods import SharedLikelihoods

COLUMNS = [Column("base", 0.0), Column("half", 0.5), Column("capped", 1.5, max_kl=0.02), Column("whole")]
LENGTH = 32
# Choices that share all but their last token, longer ones, a context that is too long, and the same request twice.
TEXTS = [("2+2=", "4"), ("2+2=", "5"), ("2+2=", "51"), ("a" * 40, " b"), ("one two", " three"), ("2+2=", "4")]
REQUESTS = [Instance("loglikelihood", {}, text, index, ("t", index, 1)) for index, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(tiny_base(max_position_embeddings=LENGTH), config=APART).double()


def test_likelihoods_equal_those_of_a_pass_for_each_column(policy, monkeypatch):
    monkeypatch.setattr(shared_likelihoods, "SLICE", 2)
    shared = SharedLikelihoods(policy, COLUMNS)
    for column in COLUMNS:
        with column.applied(policy):
            own = PolicyLM(policy, tiny_tokenizer(), 2, silent, column.name)
            ours = PolicyLM(policy, tiny_tokenizer(), 2, silent, column.name, shared=shared)
            expected, found = own.loglikelihood(REQUESTS), ours.loglikelihood(REQUESTS)
        # A cap is found in float32.
        tolerance = 1e-5 if column.max_kl is not None else 1e-9
        assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in expected], abs=tolerance)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_what_greedy_decoding_writes_is_known_as_such(policy):
    shared = SharedLikelihoods(policy, COLUMNS)
    vocabulary = range(policy.config.vocab_size)
    requests = [(None, [5, 6], [token]) for token in vocabulary]
    for column in ("base", "whole"):
        found = shared.of(column, requests, LENGTH, lambda done: None)
        best = max(vocabulary, key=lambda token: found[token][0])
        assert [token for token in vocabulary if found[token][1]] == [best]


@pytest.mark.parametrize(("text", "size"), [("a" * (LENGTH + 1), LENGTH + 1), ("", 0)])
@pytest.mark.parametrize("one_pass", [True, False])
def test_answers_that_cannot_be_scored_whole_are_refused(policy, one_pass, text, size):
    shared = SharedLikelihoods(policy, COLUMNS) if one_pass else None
    lm = PolicyLM(policy, tiny_tokenizer(), 2, silent, "base", "essays", shared)
    with pytest.raises(DataError, match=f"essays: an answer of {size} tokens .* 1 to {LENGTH}"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("2+2=", text), 0, ("t", 0, 1))])


def test_nothing_is_measured_twice_and_progress_counts_every_request(policy):
    passes, done = [], []
    handle = policy.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    shared = SharedLikelihoods(policy, COLUMNS)
    requests = [(None, [5, 6], [token]) for token in (7, 8, 9, 7)] + [(None, [5, 6, 7], [3, 4])]
    shared.of("base", requests, LENGTH, done.append)
    assert len(passes) == 2  # a stream each, all requests in one batch
    assert sum(done) == len(requests)
    done.clear()
    shared.of("whole", requests, LENGTH, done.append)
    handle.remove()
    assert len(passes) == 2
    assert sum(done) == len(requests)
