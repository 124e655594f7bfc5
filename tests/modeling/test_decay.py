"""A strength that decays along the answer, against a loop that recomputes whole texts, and against full logits."""

import models
import pytest
import torch

from qadapter import ConfigError
from qadapter.evaluation.columns import Column
from qadapter.evaluation.drift import measure_texts
from qadapter.evaluation.texts import Text
from qadapter.modeling.policy_part import DIAL

IDS = torch.tensor(models.token_ids(6, 6, 6))
STEPS = 6


@pytest.fixture(scope="module")
def policy():
    return models.tiny_policy()


def written_by_hand(policy, strength, decay, **settings):
    """Greedy tokens, each from a whole pass at strength · decayᵗ."""
    text = IDS
    for step in range(STEPS):
        now = torch.as_tensor(strength * decay**step, dtype=torch.float32).expand(len(text))
        with torch.no_grad():
            following = policy(text, strength=now, use_cache=False, **settings).logits[:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, following], dim=1)
    return text


def generated(policy, **settings):
    return policy.generate(IDS, do_sample=False, max_new_tokens=STEPS, **settings)


@pytest.mark.parametrize(
    ("strength", "settings"),
    [(1.0, {}), (2.5, {}), (torch.tensor([0.0, 1.0, 3.0]), {}), (2.0, {"max_kl": 0.05})],
    ids=["1", "2.5", "a row", "capped"],
)
def test_a_decaying_strength_equals_a_loop_over_whole_texts(policy, strength, settings):
    assert torch.equal(
        generated(policy, strength=strength, decay=0.6, **settings), written_by_hand(policy, strength, 0.6, **settings)
    )


def test_the_strengths_on_record_fall_by_the_factor(policy):
    strengths = generated(policy, strength=2.0, decay=0.5, output_strengths=True).strengths
    assert strengths.tolist() == [[2.0 * 0.5**step for step in range(STEPS)]] * 3


def test_a_callable_strength_decays_too(policy):
    record = generated(policy, strength=lambda state: 3.0, decay=0.5, output_strengths=True).strengths
    assert record[0].tolist() == [3.0 * 0.5**step for step in range(STEPS)]


def test_a_decay_of_one_and_a_strength_of_zero_leave_one_stream(policy):
    rows = []
    layer = policy.base.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    base = generated(policy, strength=0.0)
    assert torch.equal(generated(policy, strength=0.0, decay=0.5), base)
    hook.remove()
    assert set(rows) == {len(IDS)}


def test_beams_and_several_answers_a_prompt_take_the_decay_along(policy):
    several = generated(policy, strength=2.0, decay=0.5, num_beams=3, num_return_sequences=3)
    assert several.shape == (9, IDS.shape[1] + STEPS)
    plain = generated(policy, strength=2.0, num_beams=3, num_return_sequences=3)
    assert not torch.equal(several, plain)


def test_the_models_own_decay_is_taken_where_a_call_gives_none(policy):
    expected = generated(policy, strength=2.5, decay=0.6)
    with policy.dial(decay=0.6):
        assert torch.equal(generated(policy, strength=2.5), expected)


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.01, float("nan"), True, "0.9"])
def test_a_decay_outside_its_range_is_refused(policy, decay):
    with pytest.raises(ConfigError, match=r"decay = .*: must lie in \(0, 1\]"):
        generated(policy, decay=decay)
    with pytest.raises(ConfigError, match=r"decay = .*: must lie in \(0, 1\]"):
        Column("policy", decay=decay)


def test_forward_knows_no_beginning_of_an_answer(policy):
    with pytest.raises(ConfigError, match=r"decay is of generate.* Give strength \(B, T\)"):
        policy(IDS, decay=0.9)


def test_steps_of_several_tokens_are_refused(policy):
    for options, named in (
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"guidance_scale": 1.5}, ""),
    ):
        with pytest.raises(ConfigError, match=f"a decay cannot be used with {named}"):
            policy.generate(IDS[:1], max_new_tokens=2, decay=0.9, **options)


@pytest.mark.parametrize("max_kl", [None, 0.02])
def test_drift_of_a_decaying_strength_equals_full_logits(max_kl):
    policy = models.tiny_policy(config=models.APART).double()
    texts = [Text(ids[:split], ids[split:]) for ids, split in zip(models.token_ids(5, 9, 7), (2, 1, 6), strict=True)]
    column = Column("policy", 1.7, decay=0.7, max_kl=max_kl)
    for text, drift in zip(texts, measure_texts(policy, texts, [column, Column("even", 1.7)]), strict=True):
        ids, start = torch.tensor([[*text.context, *text.answer]]), len(text.context) - 1
        strengths = torch.zeros(ids.shape, dtype=torch.float64)
        strengths[0, start:-1] = 1.7 * 0.7 ** torch.arange(len(text.answer), dtype=torch.float64)
        with torch.no_grad():
            logps, base = (
                policy(ids, **settings).logits[0, start:-1].double().log_softmax(-1)
                for settings in ({"strength": strengths, "max_kl": max_kl}, {"strength": 0.0})
            )
        expected = (logps.exp() * (logps - base)).sum(-1)
        tolerance = 1e-11 if max_kl is None else 1e-5  # caps are found in float32
        torch.testing.assert_close(drift.columns["policy"].kl, expected, rtol=0, atol=tolerance)
        targets = torch.tensor(text.answer).unsqueeze(-1)
        torch.testing.assert_close(
            drift.columns["policy"].logps, logps.gather(-1, targets)[:, 0], rtol=0, atol=tolerance
        )


def test_benchmarks_know_the_setting():
    assert "decay" in DIAL
    assert Column("policy", 2.0, decay=0.9).settings() == {"strength": 2.0, "decay": 0.9}
