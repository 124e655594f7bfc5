"""The parts of PPO against plain loops, the reward model's indifference to padding, and that both of them learn."""

import math

import pytest
import torch
from datasets import Dataset
from models import padded, tiny_base, tiny_policy, tiny_tokenizer, token_ids

from benchmarks.experiments import ppo
from benchmarks.experiments.reward_model import RewardModel, pair_accuracy
from benchmarks.experiments.settings import Training
from qadapter import QAdapterConfig
from qadapter.generation import until_end

MASK = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]]).bool()


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_advantages_are_the_sums_of_discounted_errors():
    rewards, values = numbers(3, 6), numbers(3, 6, seed=1)
    discount, trace = 0.9, 0.8
    advantages, returns = ppo.generalised_advantages(rewards * MASK, values * MASK, MASK, discount, trace)
    for row in range(3):
        places = MASK[row].nonzero().flatten().tolist()
        for index, t in enumerate(places):
            expected = 0.0
            for k, u in enumerate(places[index:]):
                following = values[row, u + 1].item() if u + 1 in places else 0.0
                error = rewards[row, u].item() + discount * following - values[row, u].item()
                expected += (discount * trace) ** k * error
            assert advantages[row, t].item() == pytest.approx(expected)
            assert returns[row, t].item() == pytest.approx(expected + values[row, t].item())
    assert not advantages[~MASK].any()
    assert not returns[~MASK].any()


def test_the_score_comes_at_the_last_token_and_the_penalty_at_each():
    logps, base = numbers(3, 6), numbers(3, 6, seed=1)
    rewards = ppo.token_rewards(torch.tensor([5.0, 6.0, 7.0]).double(), logps, base, MASK, 0.1)
    for row, last, score in ((0, 3, 5.0), (1, 5, 6.0), (2, 3, 7.0)):
        for t in range(6):
            penalty = -0.1 * (logps[row, t] - base[row, t]).item() if MASK[row, t] else 0.0
            assert rewards[row, t].item() == pytest.approx(penalty + (score if t == last else 0.0))


def test_policy_and_value_losses_are_clipped_token_by_token():
    logps, old, advantages = numbers(3, 6), numbers(3, 6, seed=1), numbers(3, 6, seed=2)
    values, old_values, returns = numbers(3, 6, seed=3), numbers(3, 6, seed=4), numbers(3, 6, seed=5)
    policy, value, tokens = 0.0, 0.0, 0
    for row, t in MASK.nonzero().tolist():
        ratio, advantage = math.exp(logps[row, t] - old[row, t]), advantages[row, t].item()
        policy -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        near = old_values[row, t] + max(-0.2, min(0.2, (values[row, t] - old_values[row, t]).item()))
        value += 0.5 * max((values[row, t] - returns[row, t]).item() ** 2, (near - returns[row, t]).item() ** 2)
        tokens += 1
    assert ppo.policy_loss(logps, old, advantages, MASK, 0.2).item() == pytest.approx(policy / tokens)
    assert ppo.value_loss(values, old_values, returns, MASK, 0.2).item() == pytest.approx(value / tokens)


def test_whitened_advantages_have_mean_zero_and_variance_one():
    white = ppo.whitened(numbers(3, 6), MASK)
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[MASK].var(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert not white[~MASK].any()


def test_an_answer_ends_with_its_first_end_token():
    ids = torch.tensor([[4, 1, 5, 1], [4, 5, 6, 7], [1, 1, 4, 4]])
    assert until_end(ids, [1]).tolist() == [[True, True, False, False], [True] * 4, [True] + [False] * 3]


def test_the_reward_does_not_depend_on_padding():
    model = RewardModel(tiny_policy())
    torch.nn.init.normal_(model.head.weight)
    rows = token_ids(3, 7, 5)
    expected = torch.cat([model(**padded([row])) for row in rows])
    for side in ("left", "right"):
        torch.testing.assert_close(model(**padded(rows, side, width=11)), expected, rtol=1e-4, atol=1e-5)


def test_the_reward_model_learns_its_pairs(monkeypatch):
    from benchmarks.experiments import reward_model

    def new_policy(base, config, training, dtype, seed):
        return tiny_policy(tiny_base(), config, trained=False)

    monkeypatch.setattr(reward_model, "new_policy", new_policy)
    prompts = token_ids(3, 4, 5, 3, 4, 5, 6, 7)
    pairs = [{"prompt_ids": prompt, "chosen_ids": [7, 8, 9], "rejected_ids": [17, 18]} for prompt in prompts]
    training = Training(epochs=6, pairs_a_step=4, micro_batch=2, learning_rate=1e-2)
    dataset = Dataset.from_list(pairs)
    model = reward_model.train_reward_model("", dataset, training, "float32", 0, torch.device("cpu"))
    assert pair_accuracy(model, dataset) == 1.0


class FewLetters(torch.nn.Module):
    """Rewards the share of answer tokens that are the letter a."""

    def forward(self, input_ids, attention_mask):
        letter = 2 + ord("a") - 32
        return 10 * ((input_ids == letter) * attention_mask).sum(-1).float() / attention_mask.sum(-1)


def test_ppo_raises_the_reward_and_keeps_its_seed():
    def run():
        torch.manual_seed(5)  # of the adapter's first weights
        policy = tiny_policy(tiny_base(), QAdapterConfig(), trained=False)
        settings = ppo.PPOSettings(kl_coefficient=0.01, max_new_tokens=6, rollouts=16, inner_epochs=3)
        trainer = ppo.PPO(policy, FewLetters(), tiny_tokenizer(), settings, lr=3e-2)
        prompts = [[{"role": "user", "content": text}] for text in ("b?", "cd!", "e")] * 32
        return ppo.train_ppo(trainer, prompts, Training(micro_batch=8), seed=1)["curve"]

    curve = run()
    scores = [entry["score"] for entry in curve]
    assert sum(scores[-2:]) / 2 > 3 * sum(scores[:2]) / 2
    assert curve[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert curve == run()
