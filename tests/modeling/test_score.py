"""What an adapter says of given answers: rewards and returns by the definition, and the ranking that they give."""

import re
from pathlib import Path

import models
import pytest
import torch
from transformers import set_seed

from qadapter import ConfigError

IDS = torch.tensor(models.token_ids(9, 9, 9))
DOCUMENT = (Path(__file__).parents[2] / "docs" / "dial.md").read_text()


@pytest.fixture(scope="module")
def policy():
    return models.tiny_policy()


def test_score_equals_the_definition(policy):
    mask = torch.zeros_like(IDS, dtype=torch.bool)
    mask[:, 4:] = True
    score = policy.score(IDS, torch.ones_like(IDS), mask)
    config = policy.configs["default"]
    plain = models.plain_peft(models.tiny_base(), policy)
    z_theta, z_base = models.two_passes(plain, input_ids=IDS)
    for row in range(3):
        states = slice(3, 8)  # the states before tokens 4 to 8
        steps = (z_theta[row, states].tolist(), z_base[row, states].tolist(), IDS[row, 4:].tolist())
        expected = models.oracle.rewards(
            *steps, config.parametrisation, config.alpha_tilde, config.alpha_0, config.gamma
        )
        assert score.rewards[row, 3:].tolist() == pytest.approx(expected, abs=1e-4)
        start = models.oracle.value(
            steps[0][0], steps[1][0], config.parametrisation, config.alpha_tilde, config.alpha_0
        )
        expected_return = models.oracle.discounted_return(expected, start, config.gamma)
        assert float(score.returns[row]) == pytest.approx(expected_return, abs=1e-3)


@pytest.mark.parametrize("shape", [(3, 8), (3, 5), (1, 9)])
def test_a_mask_of_another_shape_is_refused(policy, shape):
    rest = torch.ones_like(IDS)
    with pytest.raises(ConfigError, match=rf"completion_mask has the shape \({shape[0]}, {shape[1]}\)"):
        policy.score(IDS, rest, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ConfigError, match="attention_mask has the shape"):
        policy.score(IDS, torch.ones(shape, dtype=torch.long), rest)


def test_a_response_in_two_pieces_is_refused(policy):
    mask = torch.zeros_like(IDS)
    mask[:, 4:] = 1
    mask[1, 6] = 0
    with pytest.raises(ConfigError, match=r"marks \[1, 2, 1\] runs"):
        policy.score(IDS, torch.ones_like(IDS), mask)


def test_a_trained_adapter_ranks_the_chosen_answers_first(tmp_path):
    pairs = models.token_pairs(8)
    policy = models.tiny_policy(trained=False)
    options = {"max_steps": 40, "learning_rate": 0.02, "per_device_train_batch_size": 8}
    models.tiny_trainer(policy, tmp_path, pairs, **options).train()
    for pair in pairs:
        rows = [pair["prompt_ids"] + pair[side] for side in ("chosen_ids", "rejected_ids")]
        batch = models.padded(rows, side="right")
        written = batch["attention_mask"].bool()
        written[:, : len(pair["prompt_ids"])] = False
        chosen, rejected = policy.score(**batch, completion_mask=written).returns.tolist()
        assert chosen > rejected


def test_the_documented_best_of_eight_takes_the_answer_of_the_highest_return():
    example = next(code for code in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL) if ".score(" in code)
    policy = models.tiny_policy(models.tiny_base(eos_token_id=1))
    inputs = {"input_ids": IDS[:1], "attention_mask": torch.ones_like(IDS[:1])}
    names = {"torch": torch, "policy": policy, "inputs": inputs, "tokenizer": models.tiny_tokenizer()}
    set_seed(0)
    exec(example.replace("max_new_tokens=60", "max_new_tokens=30"), names)
    returns = []
    for text in names["texts"].tolist():
        ids = torch.tensor([text[: text.index(1, 9) + 1] if 1 in text[9:] else text])
        written = torch.arange(ids.shape[1]).unsqueeze(0) >= 9
        returns.append(float(policy.score(ids, torch.ones_like(ids), written).returns))
    assert any(1 in text[9:-1] for text in names["texts"].tolist())  # rows end apart
    assert len(set(returns)) > 1
    assert names["best"].tolist() == names["texts"][returns.index(max(returns))].tolist()
