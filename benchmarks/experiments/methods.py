"""The methods, each a function (context, options) -> trained policy; MAIN_KNOBS names what each one is tuned over."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from benchmarks.experiments import losses, objectives
from benchmarks.experiments.ablations import DEFAULT
from benchmarks.experiments.answers import kept_answers
from benchmarks.experiments.objectives import Objective
from benchmarks.experiments.pools import Pools
from benchmarks.experiments.ppo import PPO, PPOSettings, train_ppo
from benchmarks.experiments.reward_model import RewardModel, pair_accuracy, train_reward_model
from benchmarks.experiments.settings import Setting
from benchmarks.experiments.trainer import new_policy, train_pairs
from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.data.encoding import ChatEncoder
from qadapter.devices import default_device
from qadapter.errors import ConfigError


@dataclass
class Context:
    """What a method may use: the setting and its data, the base, and folders for what may be computed once.

    Args:
        base: folder or id to load; the setting's own, or the one that was tuned first (`Setting.prepared`).
        work: scratch folder of this cell; cache: a folder shared by the cells of one base and data.
    """

    setting: Setting
    pools: Pools
    tokenizer: Any
    base: str
    seed: int
    work: Path
    cache: Path
    rewards: dict[int, RewardModel] = field(default_factory=dict)

    def new_policy(self, config: QAdapterConfig | None = None) -> QAdapterForCausalLM:
        """The base with a fresh adapter."""
        return new_policy(
            self.base, config or QAdapterConfig(), self.setting.training, self.setting.dtype, self.seed
        ).to(default_device())


@dataclass(frozen=True)
class Trained:
    """A policy and figures of its training, for the results file."""

    policy: QAdapterForCausalLM
    figures: dict[str, Any]


Method = Callable[..., Trained]
METHOD_SETTINGS = {setting.name for setting in fields(QAdapterConfig)} - {"penalty"}  # the loss takes more penalties


def _train(
    context: Context,
    objective: Objective,
    config: QAdapterConfig | None = None,
    pairs: Any = None,
    rejected: str = "given",
    packed: bool = False,
) -> Trained:
    if rejected not in ("given", "own"):
        raise ConfigError(f"rejected = {rejected!r}: choose given or own.")
    if rejected == "own":
        pairs = with_own_answers(context, "own_answers", context.setting.measuring.temperature)
    policy = context.new_policy(config)
    figures = train_pairs(
        policy,
        context.pools.train_ids if pairs is None else pairs,
        objective,
        context.setting.training,
        context.seed,
        context.work,
        packed,
        context.tokenizer if policy.configs[policy.adapters[0]].retention else None,
    )
    return Trained(policy, figures)


def qadapter(
    context: Context, preset: str = "undiscounted", alpha: float | None = None, rejected: str = "given", **options: Any
) -> Trained:
    """The package's objective.

    Args:
        preset: of the settings that the options leave open. It is the default of the first results, not the package's.
        alpha: sets alpha_tilde and alpha_0 both.
        rejected: "own" puts the base's own sampled answers in place of the rejected ones.
        options: settings of the method, or options of `losses.qadapter`.
    """
    settings = {name: options.pop(name) for name in METHOD_SETTINGS & options.keys()}
    if options.get("penalty") == "kl":
        settings["penalty"] = options.pop("penalty")
    if alpha is not None:
        settings |= {"alpha_tilde": alpha, "alpha_0": alpha}
    config = QAdapterConfig.preset(preset, **settings)
    return _train(context, objectives.of_settings(losses.qadapter, **options), config, rejected=rejected, packed=True)


def authors(context: Context, **options: Any) -> Trained:
    """The authors' released loss; measured as the policy that the paper defines."""
    if options.get("retention"):
        raise ConfigError("retention is not of the authors' loss: leave it out.")
    return _train(context, objectives.authors, QAdapterConfig.preset("authors", **options))


def of_loss(
    loss: Callable[..., Any], context: Context, rejected: str = "given", retention: float = 0.0, **options: Any
) -> Trained:
    """A method whose loss needs the statistics of both answers only; `rejected` and `retention` as for `qadapter`."""
    config, objective = QAdapterConfig(retention=retention), objectives.of_statistics(loss, **options)
    return _train(context, objective, config, rejected=rejected, packed=True)


def sft(context: Context) -> Trained:
    """Supervised fine-tuning on the chosen answers."""
    return _train(context, objectives.supervised)


def sft_kl(context: Context, weight: float = 1.0) -> Trained:
    """The same with a penalty on the KL from the base."""
    return _train(context, objectives.supervised_with_kl(weight), QAdapterConfig(penalty="kl"))


def kto(context: Context, beta: float = 0.1) -> Trained:
    """KTO on both answers of each pair."""
    return _train(context, objectives.kto(beta))


def replay(context: Context, weight: float = 1.0) -> Trained:
    """Supervised on the chosen answers and on the base's own greedy answers to the same prompts."""
    pairs = with_own_answers(context, "replay", 0.0)
    return _train(context, objectives.of_statistics(losses.replay, weight=weight), pairs=pairs)


def with_own_answers(context: Context, name: str, temperature: float) -> Dataset:
    """The training pairs, with the base's own answer to the prompt in place of the rejected one.

    Args:
        name: of the file in the cache that keeps the answers.
    """
    prompts = list({json.dumps(pair["prompt"]): pair["prompt"] for pair in context.pools.train}.values())
    measuring = context.setting.measuring
    answers = kept_answers(
        context.cache / f"{name}.json", context.new_policy, context.tokenizer, prompts, 0,
        2 * measuring.max_new_tokens, temperature, measuring.generation_batch,
    )  # fmt: skip
    by_prompt = {json.dumps(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)}
    encoder = ChatEncoder(context.tokenizer)
    rows = []
    for pair, ids in zip(context.pools.train, context.pools.train_ids, strict=True):
        answer = by_prompt[json.dumps(pair["prompt"])]
        own = [{"role": "assistant", "content": answer.text or " "}]
        own_ids = encoder.encode({"prompt": pair["prompt"], "chosen": pair["chosen"], "rejected": own}).rejected_ids
        if not answer.finished:
            own_ids = own_ids[:-1]  # it was cut: the end that the template adds would be learnt from
        rows.append(ids | {"rejected_ids": own_ids})
    return Dataset.from_list(rows, features=context.pools.train_ids.features)


def ppo(context: Context, **options: Any) -> Trained:
    """PPO against a reward model trained on the same pairs, with as many sampled answers as there are pairs."""
    training = context.setting.training
    device = torch.device(default_device())
    if context.seed not in context.rewards:
        context.rewards[context.seed] = train_reward_model(
            context.base, context.pools.train_ids, training, context.setting.dtype, context.seed, device
        )
    reward = context.rewards[context.seed]
    policy = context.new_policy()
    settings = PPOSettings(max_new_tokens=context.setting.measuring.max_new_tokens, **options)
    prompts = [pair["prompt"] for pair in context.pools.train]
    figures = train_ppo(
        PPO(policy, reward, context.tokenizer, settings, training.learning_rate), prompts, training, context.seed
    )
    figures["reward_model_accuracy"] = pair_accuracy(reward, context.pools.held_out_ids)
    return Trained(policy, figures)


def dpo_trl(context: Context, beta: float = 0.1) -> Trained:
    """DPO by TRL's own trainer on the same pairs: a check of the fast path, not a rival of its own."""
    from benchmarks.experiments.trl_dpo import train_with_trl

    return Trained(*train_with_trl(context, beta))


METHODS: dict[str, Method] = {
    "qadapter": qadapter,
    "authors": authors,
    "sft": sft,
    "sft-kl": sft_kl,
    "replay": replay,
    "dpo": partial(of_loss, losses.dpo),
    "dpo-trl": dpo_trl,
    "ipo": partial(of_loss, losses.ipo),
    "simpo": partial(of_loss, losses.simpo),
    "kto": kto,
    "ppo": ppo,
}
# The option that a method is tuned over, and its values, from the mildest customisation to the strongest.
MAIN_KNOBS: dict[str, list[dict[str, Any]]] = {
    "qadapter": [DEFAULT, *({"beta": beta} for beta in (30.0, 10.0, 3.0, 1.0, 0.3))],
    "qadapter-logits": [{"preset": "authors", "beta": beta} for beta in (1.0, 0.1)],
    "authors": [{"beta": beta} for beta in (1.0, 0.1, 0.01)],
    "sft": [{}],
    "sft-kl": [{"weight": weight} for weight in (3.0, 1.0, 0.3)],
    "replay": [{"weight": weight} for weight in (3.0, 1.0, 0.3)],
    "dpo": [{"beta": beta} for beta in (1.0, 0.3, 0.1, 0.05, 0.02)],
    "dpo-trl": [{"beta": 0.1}],
    "ipo": [{"beta": beta} for beta in (1.0, 0.3, 0.1)],
    "simpo": [{"beta": beta, "margin": beta / 2} for beta in (1.0, 2.0, 5.0)],
    "kto": [{"beta": beta} for beta in (0.3, 0.1, 0.03)],
    "ppo": [{"kl_coefficient": coefficient} for coefficient in (0.3, 0.1, 0.03)],
}
TITLES = {
    "qadapter": "Q-Adapter",
    "qadapter-logits": "Q-Adapter (the paper's form)",
    "authors": "authors' released loss",
    "sft": "SFT",
    "sft-kl": "SFT + KL",
    "replay": "Replay",
    "dpo": "DPO",
    "dpo-trl": "DPO (TRL)",
    "ipo": "IPO",
    "simpo": "SimPO",
    "kto": "KTO",
    "ppo": "PPO",
}


def train(method: str, context: Context, options: dict[str, Any]) -> Trained:
    """The policy of a method; "qadapter-logits" is the method "qadapter" with other options.

    Raises:
        ConfigError: no such method.
    """
    name = method.split(":")[0].removesuffix("-logits")
    if name not in METHODS:
        raise ConfigError(f"method {method!r} is unknown: choose one of {', '.join(METHODS)}.")
    return METHODS[name](context, **options)
