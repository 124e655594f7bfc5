"""Tokens are drawn by each row's own rules, whatever else is in the batch."""

from collections import Counter

import pytest
import torch

from qadapter.serving.sampling import Sampler, SamplingRules, choose_tokens, drawn, nucleus

ROWS, TOKENS = 5, 11


def some_logits(rows=ROWS, seed=0):
    return 2 * torch.randn(rows, TOKENS, generator=torch.Generator().manual_seed(seed))


def tokens_of(logits, samplers):
    return [chosen.token for chosen in choose_tokens(logits, samplers)]


@pytest.mark.parametrize("temperature", [0.0, 1e-9])
def test_temperature_zero_takes_the_likeliest_token(temperature):
    logits = some_logits()
    samplers = [Sampler(SamplingRules(temperature), seed) for seed in range(ROWS)]
    assert tokens_of(logits, samplers) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.6, 0.8)])
def test_frequencies_are_the_probabilities(temperature, top_p):
    draws = 20_000
    logits = some_logits(1)
    samplers = [Sampler(SamplingRules(temperature, top_p), seed) for seed in range(draws)]
    counts = Counter(tokens_of(logits.expand(draws, -1), samplers))
    probs = nucleus((logits / temperature).softmax(-1), torch.tensor([[top_p]]))[0]
    probs = probs / probs.sum()
    for token, prob in enumerate(probs.tolist()):
        # Five standard deviations of a binomial count; a token without probability is never drawn.
        assert abs(counts[token] - draws * prob) <= 5 * (draws * prob * (1 - prob)) ** 0.5


def test_a_row_draws_the_same_tokens_in_any_company():
    def story(company):
        sampler = Sampler(SamplingRules(0.9, 0.95, frequency_penalty=0.5), "7:0")
        others = [Sampler(SamplingRules(1.3, 0.5), seed) for seed in range(company)]
        tokens = []
        for step in range(20):
            logits = torch.cat([some_logits(company, seed=100 + step), some_logits(1, seed=step)])
            tokens.append(tokens_of(logits, [*others, sampler])[-1])
        return tokens

    assert story(0) == story(3) == story(8)


def test_different_seeds_draw_different_tokens():
    logits = some_logits(1).expand(50, -1)
    assert len(set(tokens_of(logits, [Sampler(SamplingRules(), seed) for seed in range(50)]))) > 3


def test_the_nucleus_is_the_smallest_set_of_likeliest_tokens_that_reaches_top_p():
    probs = some_logits(6).double().softmax(-1)
    top_p = torch.tensor([[0.0], [0.05], [0.3], [0.6], [0.95], [1.0]], dtype=torch.float64)
    kept = nucleus(probs, top_p)
    for row, limit in enumerate(top_p.squeeze(-1).tolist()):
        expected, mass = set(), 0.0
        for token in sorted(range(TOKENS), key=lambda token: -probs[row, token].item()):
            if mass < limit or not expected:
                expected.add(token)
            mass += probs[row, token].item()
        assert {token for token in range(TOKENS) if kept[row, token] > 0} == expected


def test_the_ends_of_the_unit_interval_draw_tokens_with_probability():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]] * 2, dtype=torch.float64)
    assert drawn(probs, torch.tensor([[0.0], [1.0]], dtype=torch.float64)).tolist() == [1, 3]


def test_penalties_are_openais_formula():
    logits = torch.zeros(1, TOKENS)
    sampler = Sampler(SamplingRules(0.0, presence_penalty=0.5, frequency_penalty=0.25, top_logprobs=2), 0)
    said = Counter()
    for _ in range(30):
        scores = [-(0.5 * (said[token] > 0) + 0.25 * said[token]) for token in range(TOKENS)]
        (chosen,) = choose_tokens(logits, [sampler])
        assert scores[chosen.token] == max(scores)
        said[chosen.token] += 1
    assert max(said.values()) - min(said.values()) <= 1


def test_logprobs_are_the_policys_before_temperature_and_penalties():
    logits = some_logits(2)
    logits = logits[[0, 1, 0, 1]]
    rules = [SamplingRules(0.3, 0.5, 1.0, 1.0, top_logprobs=3), *(SamplingRules(top_logprobs=n) for n in (None, 1, 0))]
    samplers = [Sampler(own, seed) for seed, own in enumerate(rules)]
    for _ in range(3):
        reported, silent, brief, alone = choose_tokens(logits, samplers)
        logps = logits[0].log_softmax(-1)
        assert reported.logprob == pytest.approx(logps[reported.token].item())
        assert [token for token, _ in reported.top] == logps.topk(3).indices.tolist()
        assert [logprob for _, logprob in reported.top] == pytest.approx(logps.topk(3).values.tolist())
        assert silent.logprob is None
        assert silent.top == ()
        assert brief.top == reported.top[:1]
        assert alone.logprob == pytest.approx(logits[1].log_softmax(-1)[alone.token].item())
        assert alone.top == ()
