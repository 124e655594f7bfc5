"""Views of generated tokens: the policy as it was asked, by the call or by the model's own settings."""

import copy

import models
import pytest
import torch

from qadapter import ConfigError, QAdapterConfig
from qadapter.inspection import inspect_tokens

PROMPT = torch.tensor(models.token_ids(5))
LENGTH = PROMPT.shape[1]


def alternating(state):
    return 0.8 if state.input_ids.shape[1] % 2 else 0.2


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": 0.3},
        {"strength": torch.tensor([0.3])},
        {"strength": alternating},
        {"strength": alternating, "decay": 0.5},
        {"strength": 1.5, "max_kl": 0.05},
        {"strength": 1.5, "min_kl": 0.3},
        {"strength": 1.5, "min_kl": 0.3, "max_kl": 0.05},
        {"strength": 0.9, "decay": 0.5},
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_a_view_tells_the_strength_and_the_log_probability_of_each_token(settings, own):
    policy, tokenizer = models.tiny_policy(), models.tiny_tokenizer()
    made = policy.generate(
        PROMPT, do_sample=False, max_new_tokens=6, output_strengths=True, output_logits=True, **settings
    )
    asked = copy.copy(settings)
    if own:
        for name in settings:
            setattr(policy, name, asked.pop(name))
    views = inspect_tokens(policy, tokenizer, made.sequences, LENGTH, asked)
    strengths = [view.strength for view in views]
    # A cap's share is told from the logits, in float32.
    assert strengths == pytest.approx(made.strengths[0].tolist(), rel=1e-3)
    written = made.sequences[0, LENGTH:].tolist()
    expected = [float(step[0].log_softmax(-1)[token]) for step, token in zip(made.logits, written, strict=True)]
    assert [view.logp for view in views] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_a_strength_that_changes_is_refused_where_weights_are_interpolated(decay):
    policy = models.tiny_policy(config=QAdapterConfig())
    policy.interpolation, policy.decay = "weights", decay
    policy.strength = 1.0 if decay < 1 else alternating
    with pytest.raises(ConfigError, match='cannot be used with interpolation="weights"'):
        inspect_tokens(policy, models.tiny_tokenizer(), PROMPT, LENGTH - 2, {})
