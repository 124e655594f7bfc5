"""The authors' released loss with its faults reproduced on purpose, as docs/method.md lists them (a named baseline).

The slow twin, from full logits, of `losses.authors`, which trains the baseline.
"""

import torch
import torch.nn.functional as F

from qadapter.functional import mix_coefficients, mix_streams, soft_values


def authors_loss(q_logits, base_logits, input_ids, response_mask, alpha_tilde, alpha_0, gamma, beta):
    """Scalar loss of 2P padded rows, chosen first.

    Faults: V is taken at s_t instead of s_{t+1}; the mask is read at token t while the reward scores token t+1;
    the sums are divided by the padded width.
    """
    base_logits = base_logits.log_softmax(-1)
    coefficients = mix_coefficients("logits", alpha_tilde, alpha_0)
    policy = mix_streams([q_logits, base_logits], coefficients)
    values = soft_values(policy.logsumexp(-1), base_logits.logsumexp(-1), alpha_tilde, alpha_0)
    q = q_logits[:, :-1].gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    rewards = q - gamma * values[:, :-1]
    mask = response_mask[:, :-1].to(rewards.dtype)
    chosen, rejected = ((rewards * mask).sum(-1) / mask.shape[1]).chunk(2)
    penalty = (rewards.square() * mask).sum() / mask.sum()
    return torch.mean(-F.logsigmoid(chosen - rejected)) + beta * penalty
