"""The method once more, in plain Python loops over floats: slow, obvious, written from the paper."""

import math


def log_sum_exp(xs):
    top = max(xs)
    return top + math.log(sum(math.exp(x - top) for x in xs))


def policy_logits(z_theta, z_base, parametrisation, alpha_tilde, alpha_0):
    """exp of these, normalised, is π̃: (Q + α₀ log π_b) / α̃ from the definition, one state."""
    q = all_q(z_theta, z_base, parametrisation, alpha_tilde)
    base_lse = log_sum_exp(z_base)
    return [(q_a + alpha_0 * (b - base_lse)) / alpha_tilde for q_a, b in zip(q, z_base, strict=True)]


def all_q(z_theta, z_base, parametrisation, alpha_tilde):
    if parametrisation == "residual":
        return [alpha_tilde * (t - b) for t, b in zip(z_theta, z_base, strict=True)]
    return list(z_theta)


def value(z_theta, z_base, parametrisation, alpha_tilde, alpha_0):
    return alpha_tilde * log_sum_exp(policy_logits(z_theta, z_base, parametrisation, alpha_tilde, alpha_0))


def kl(logits, reference):
    """KL(softmax(logits) ‖ softmax(reference)) of one state."""
    lse, reference_lse = log_sum_exp(logits), log_sum_exp(reference)
    return sum(math.exp(x - lse) * (x - lse - y + reference_lse) for x, y in zip(logits, reference, strict=True))


def weight(t, gamma, floor):
    """What the reward of the token at t = 0, 1, ... counts."""
    return max(gamma**t, floor)


def rewards(z_theta, z_base, actions, parametrisation, alpha_tilde, alpha_0, gamma, floor=0.0):
    """r_t of one response; z_theta and z_base hold one row of logits a state s_0 ... s_{n-1}."""
    result = []
    for t, action in enumerate(actions):
        q = all_q(z_theta[t], z_base[t], parametrisation, alpha_tilde)[action]
        if t + 1 < len(actions):
            next_value = value(z_theta[t + 1], z_base[t + 1], parametrisation, alpha_tilde, alpha_0)
        else:
            next_value = 0.0
        result.append(q - weight(t + 1, gamma, floor) / weight(t, gamma, floor) * next_value)
    return result


def discounted_return(rewards, start, gamma, floor=0.0):
    """Σ_t w_t r_t above the value V(s_0) of the state it starts in."""
    return sum(weight(t, gamma, floor) * reward for t, reward in enumerate(rewards)) - start


def pair_loss(chosen, rejected, gamma, beta, length_normalised=False, label_smoothing=0.0, floor=0.0, kls=None):
    """Loss of one pair from two sides (rewards, V(s_0)); β weighs the KL of both sides' tokens, `kls`, or r²."""
    total_chosen, total_rejected = (discounted_return(*side, gamma, floor) for side in (chosen, rejected))
    (chosen, _), (rejected, _) = chosen, rejected
    if length_normalised:
        total_chosen, total_rejected = total_chosen / len(chosen), total_rejected / len(rejected)
    margin = total_chosen - total_rejected
    bradley_terry = (1 - label_smoothing) * math.log(1 + math.exp(-margin))
    bradley_terry += label_smoothing * math.log(1 + math.exp(margin))
    weighed = [r * r for r in chosen + rejected] if kls is None else kls
    return bradley_terry + beta * sum(weighed) / len(weighed)


def text_loss(kls, retention):
    """Loss of a text that no pair speaks of, from the KL of its tokens."""
    return retention * sum(kls) / len(kls)
