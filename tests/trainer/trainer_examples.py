"""What the tests of the trainer share: settings, its metrics, by name and by the oracle, and pairs of text."""

import math

import oracle
import torch
from models import two_passes

from qadapter import QAdapterConfig

METRICS = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "entropy",
    "qadapter/kl",
    "qadapter/value",
    "qadapter/penalty",
}
CONFIG = QAdapterConfig(alpha_tilde=0.5, alpha_0=0.2, gamma=0.9, beta=0.7)
TEXT_PAIRS = [
    {"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "I do not know."},
    {"prompt": "How do I cook rice?", "chosen": "Rinse it, then boil it.", "rejected": "Go away!"},
    {"prompt": "One and one?", "chosen": "Two.", "rejected": "Three, I think."},
]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def expected_metrics(plain, pairs, config=CONFIG):
    """Loss and metrics of one batch of pairs, a token at a time in plain Python."""
    settings = (config.parametrisation, config.alpha_tilde, config.alpha_0)
    sides = {"chosen": [], "rejected": []}
    tokens = []
    for pair in pairs:
        for side, results in sides.items():
            prompt, answer = pair["prompt_ids"], pair[f"{side}_ids"]
            z_theta, z_base = two_passes(plain, input_ids=torch.tensor([prompt + answer]))
            states = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            z_theta, z_base = ([z[0, state].tolist() for state in states] for z in (z_theta, z_base))
            rewards = oracle.rewards(z_theta, z_base, answer, *settings, config.gamma)
            logps = []
            for t, b, action in zip(z_theta, z_base, answer, strict=True):
                policy = oracle.policy_logits(t, b, *settings)
                policy_lse = oracle.log_sum_exp(policy)
                distribution = [(math.exp(p - policy_lse), p - policy_lse) for p in policy]
                logps.append(policy[action] - policy_lse)
                tokens.append(
                    {
                        "entropy": -sum(p * logp for p, logp in distribution),
                        "qadapter/kl": oracle.kl(policy, b),
                        "qadapter/value": oracle.value(t, b, *settings),
                    }
                )
            results.append(((rewards, oracle.value(z_theta[0], z_base[0], *settings)), sum(logps)))
    chosen, rejected = sides["chosen"], sides["rejected"]
    returns = [[oracle.discounted_return(*side, config.gamma) for side, _ in results] for results in (chosen, rejected)]
    margins = [c - r for c, r in zip(*returns, strict=True)]
    return {
        "loss": mean(
            oracle.pair_loss(c, r, config.gamma, config.beta) for (c, _), (r, _) in zip(chosen, rejected, strict=True)
        ),
        "rewards/chosen": mean(returns[0]),
        "rewards/rejected": mean(returns[1]),
        "rewards/accuracies": mean(float(margin > 0) for margin in margins),
        "rewards/margins": mean(margins),
        "logps/chosen": mean(logps for _, logps in chosen),
        "logps/rejected": mean(logps for _, logps in rejected),
        "qadapter/penalty": mean(
            mean(r * r for r in c + j) for ((c, _), _), ((j, _), _) in zip(chosen, rejected, strict=True)
        ),
        **{name: mean(token[name] for token in tokens) for name in tokens[0]},
    }
