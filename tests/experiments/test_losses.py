"""The baselines' losses: TRL's own numbers on whole models, and the definitions on full logits."""

import inspect
import warnings
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from models import plain_peft, tiny_base, tiny_policy, tiny_tokenizer, token_pairs, two_passes
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from benchmarks.experiments import losses, objectives
from benchmarks.experiments.authors import authors_loss
from qadapter import QAdapterConfig
from qadapter.data import PreferenceCollator
from qadapter.errors import ConfigError
from qadapter.fused import TokenStatistics, token_statistics
from qadapter.objective import implied, pair_losses, response_mask

PAIRS = [
    {"prompt": "What is the capital of France?", "chosen": " Paris.", "rejected": " I do not know it."},
    {"prompt": "Cook rice?", "chosen": " Rinse it, then boil it.", "rejected": " No"},
    {"prompt": "One and one?", "chosen": " Two.", "rejected": " Three, I think."},
]
PLAIN = QAdapterConfig(alpha_tilde=0.1, alpha_0=0.1)


@pytest.fixture(scope="module")
def base():
    return tiny_base("llama", dtype=torch.float64)


@pytest.fixture
def policy(base):
    return tiny_policy(base, PLAIN)


@pytest.fixture
def batch():
    return PreferenceCollator(pad_token_id=0)(token_pairs(3))


def foreign_loss(kind, base, policy, tmp_path, rows, **options):
    """(loss, batch) of a trainer of TRL on `rows`, with the policy's LoRA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "CPO":
            from trl.experimental.cpo import CPOConfig as Config
            from trl.experimental.cpo import CPOTrainer as Trainer
        else:
            import trl

            Config, Trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
        extra = {} if kind == "CPO" else {"gradient_checkpointing": None}
        trainer = Trainer(
            model=plain_peft(base, tiny_policy(base, PLAIN, trained=False)),
            args=Config(
                output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=len(rows),
                disable_tqdm=True, report_to="none", **extra, **options,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(template=None),
        )  # fmt: skip
        weights = get_peft_model_state_dict(policy.peft_model, save_embedding_layers=False)
        set_peft_model_state_dict(trainer.model, weights)
        trainer.model.eval()
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, batch)
    return loss.detach(), batch


def ours(objective, policy, batch):
    return objective(policy, policy, batch).mean().detach()


def same(ours, theirs):
    # TRL adds up in float32.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize(("kind", "loss"), [("sigmoid", losses.dpo), ("ipo", losses.ipo)])
def test_dpo_and_ipo_are_trls(kind, loss, base, policy, tmp_path):
    pytest.importorskip("trl")
    expected, batch = foreign_loss("DPO", base, policy, tmp_path, PAIRS, beta=0.3, loss_type=kind)
    same(ours(objectives.of_statistics(loss, beta=0.3), policy, batch), expected)


def test_sft_is_trls(base, policy, tmp_path):
    pytest.importorskip("trl")
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    expected, found = foreign_loss("SFT", base, policy, tmp_path, rows, completion_only_loss=True)
    half = {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}
    half["completion_mask"] = found["labels"] != -100
    batch = {name: torch.cat([tensor, tensor.flip(0)]) for name, tensor in half.items()}
    same(ours(objectives.supervised, policy, batch), expected)


def test_simpo_is_trls(base, policy, tmp_path):
    pytest.importorskip("trl")
    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.7, "max_length": 64}
    expected, found = foreign_loss("CPO", base, policy, tmp_path, PAIRS, **options)
    sides = [
        {"prompt_ids": found["prompt_input_ids"][row][found["prompt_attention_mask"][row] == 1].tolist()}
        | {
            f"{side}_ids": [token for token in found[f"{side}_labels"][row].tolist() if token != -100]
            for side in ("chosen", "rejected")
        }
        for row in range(len(PAIRS))
    ]
    batch = PreferenceCollator(pad_token_id=0)(sides)
    same(ours(objectives.of_statistics(losses.simpo, beta=2.0, margin=0.7), policy, batch), expected)


def test_kto_is_trls(base, policy, tmp_path):
    pytest.importorskip("trl")
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
        for pair in PAIRS
    ]
    expected, found = foreign_loss("KTO", base, policy, tmp_path, rows, beta=0.3, train_sampling_strategy="sequential")
    assert found["label"].tolist() == [True] * 3 + [False] * 3
    batch = {name: found[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    mixed = objectives.mismatched(batch)
    width = found["KL_input_ids"].shape[1]
    assert torch.equal(mixed["input_ids"][:, :width] * mixed["attention_mask"][:, :width],
                       found["KL_input_ids"] * found["KL_attention_mask"])  # fmt: skip
    same(ours(objectives.kto(0.3), policy, batch), expected)


# Every setting with another value than the default's.
OTHER = {
    "parametrisation": "logits",
    "alpha_tilde": 0.7,
    "alpha_0": 0.3,
    "gamma": 0.8,
    "beta": 1.0,
    "penalty": "kl",
    "length_normalised": True,
    "label_smoothing": 0.2,
    "discount_floor": 0.5,
    "retention": 1.0,  # of texts, of which the batch has none
}


def test_no_setting_is_taken_for_an_option_of_the_loss():
    options = inspect.signature(losses.qadapter).parameters
    assert set(OTHER) == {setting.name for setting in fields(QAdapterConfig)}
    assert OTHER.keys() & options.keys() == {"penalty"}


@pytest.mark.parametrize("name", OTHER)
def test_the_package_objective_is_the_default_of_ours(policy, batch, name):
    config = QAdapterConfig(**{"alpha_tilde": 0.5, "alpha_0": 0.2, "beta": 3.0, "gamma": 0.9, name: OTHER[name]})
    policy.configs["default"] = config
    statistics = policy.token_statistics(**batch)
    mask = response_mask(batch)
    expected, _ = pair_losses(statistics, mask, config)
    torch.testing.assert_close(losses.qadapter(statistics, mask, config), expected)


def test_variants_of_the_objective_change_what_they_say(policy, batch):
    config = QAdapterConfig.preset("undiscounted", alpha_tilde=0.5, alpha_0=0.2, beta=3.0)
    policy.configs["default"] = config
    statistics, mask = policy.token_statistics(**batch), response_mask(batch)
    q = 0.5 * statistics.logits - 0.2 * statistics.base_logits
    values = 0.5 * statistics.lse - 0.2 * statistics.base_lse
    rewards = (q - values) * mask
    chosen, rejected = rewards.sum(-1).chunk(2)
    squares, counts = (rewards**2).sum(-1).chunk(2), mask.sum(-1).chunk(2)
    penalty = (squares[0] + squares[1]) / (counts[0] + counts[1])
    expected = -F.logsigmoid(chosen - rejected - 0.4) + 3 * penalty  # both share s_0, but V(s_0) is not taken off
    found = losses.qadapter(statistics, mask, config, value_at="current", penalty="advantage", margin=0.4)
    torch.testing.assert_close(found, expected)
    residual = losses.qadapter(statistics, mask, config, penalty="residual")
    plain = losses.qadapter(statistics, mask, replace(config, beta=0.0))
    q_squares = ((q * mask) ** 2).sum(-1).chunk(2)
    torch.testing.assert_close(residual - plain, 3 * (q_squares[0] + q_squares[1]) / (counts[0] + counts[1]))


def test_the_value_at_which_rewards_are_taken_matters_to_the_pair_only_with_a_discount(policy, batch):
    """Σ (Q − V(s_t)) is the sum of log-ratios, as is Σ r − V(s_0) with γ = 1; a policy knows of no shift of a state."""
    mask = response_mask(batch)
    for normalised in (False, True):
        for gamma, alike in ((1.0, True), (0.9, False)):
            config = QAdapterConfig.preset("undiscounted", beta=0.0, gamma=gamma, length_normalised=normalised)
            policy.configs["default"] = config
            statistics = policy.token_statistics(**batch)
            at_next, current = (
                losses.qadapter(statistics, mask, config, value_at=place) for place in ("next", "current")
            )
            assert torch.allclose(at_next, current, rtol=1e-6, atol=1e-6) == alike
    with pytest.raises(ConfigError, match="no floor"):
        losses.qadapter(statistics, mask, replace(config, discount_floor=0.25), value_at="current")


def test_the_authors_loss_from_statistics_is_that_from_logits(base, batch):
    config = QAdapterConfig.preset("authors", alpha_0=0.3, beta=0.7)
    policy = tiny_policy(base, config)
    z_theta, z_base = two_passes(
        plain_peft(base, policy), input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    )
    settings = {name: getattr(config, name) for name in ("alpha_tilde", "alpha_0", "gamma", "beta")}
    expected = authors_loss(z_theta, z_base, batch["input_ids"], batch["completion_mask"], **settings)
    torch.testing.assert_close(ours(objectives.authors, policy, batch), expected, rtol=1e-6, atol=1e-6)


def test_replay_weighs_the_bases_own_answers(policy, batch):
    statistics, mask = policy.token_statistics(**batch), response_mask(batch)
    nll = -(statistics.logps * mask)
    chosen, own = (part.sum() / rows.sum() for part, rows in zip(nll.chunk(2), mask.chunk(2), strict=True))
    torch.testing.assert_close(losses.replay(statistics, mask, 3.0).mean(), (chosen + 3 * own) / 4)


def test_the_kl_penalty_and_its_gradient_are_those_of_full_logits(base, policy, batch):
    half = objectives.chosen_rows(batch)
    policy.configs["default"] = QAdapterConfig(penalty="kl")
    loss = objectives.supervised_with_kl(0.5)(policy, policy, batch).mean()
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in policy.adapter_parameters().items()}
    policy.zero_grad()
    mask = response_mask(half)
    rows = half["input_ids"], half["attention_mask"]
    states = policy.base_pass(*rows)
    streams = policy.adapter_pass(*rows, states.trunk), states.final
    policy_logps, base_logps = (policy.head.logits(hidden)[:, :-1].log_softmax(-1) for hidden in streams)
    targets = half["input_ids"][:, 1:, None]
    nll = -policy_logps.gather(-1, targets).squeeze(-1)
    kl = (policy_logps.exp() * (policy_logps - base_logps)).sum(-1)
    expected = ((nll + 0.5 * kl) * mask).sum() / mask.sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    for name, parameter in policy.adapter_parameters().items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("alpha", [0.1, 3.0])
def test_length_normalised_dpo_is_the_package_objective_without_a_penalty(policy, batch, alpha):
    config = QAdapterConfig.preset("undiscounted", alpha_tilde=alpha, alpha_0=alpha, beta=0.0, length_normalised=True)
    policy.configs["default"] = config
    statistics, mask = policy.token_statistics(**batch), response_mask(batch)
    found = losses.dpo(statistics, mask, alpha, length_normalised=True)
    torch.testing.assert_close(found, losses.qadapter(statistics, mask, config), rtol=1e-5, atol=1e-5)


def test_label_smoothing_of_dpo_mixes_both_labels():
    logits = torch.randn(4, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = [token_statistics(row, torch.zeros_like(row), torch.tensor([1, 2, 3])) for row in logits]
    statistics = TokenStatistics(*(torch.stack(column) for column in zip(*rows, strict=True)))
    mask = torch.ones(4, 3, dtype=torch.bool)
    swapped = TokenStatistics(*(column.roll(2, 0) for column in statistics))
    expected = 0.7 * losses.dpo(statistics, mask, 0.5) + 0.3 * losses.dpo(swapped, mask, 0.5)
    torch.testing.assert_close(losses.dpo(statistics, mask, 0.5, label_smoothing=0.3), expected)


def test_returns_over_the_pair_s_mean_length_weigh_the_tokens_of_both_answers_alike(policy, batch):
    config = QAdapterConfig.preset("undiscounted", alpha_tilde=1.0, alpha_0=1.0, beta=0.0)
    policy.configs["default"] = config
    statistics, mask = policy.token_statistics(**batch), response_mask(batch)
    chosen, rejected = ((statistics.logps - statistics.base_logps) * mask).sum(-1).chunk(2)
    lengths = mask.sum(-1).chunk(2)
    assert not torch.equal(*lengths)
    expected = -F.logsigmoid((chosen - rejected) / ((lengths[0] + lengths[1]) / 2))
    torch.testing.assert_close(losses.qadapter(statistics, mask, config, normalised="pair"), expected)


def test_an_unknown_way_to_normalise_is_refused(policy, batch):
    statistics, mask = policy.token_statistics(**batch), response_mask(batch)
    with pytest.raises(ConfigError, match="normalised = 'pairs': choose pair"):
        losses.qadapter(statistics, mask, QAdapterConfig(), normalised="pairs")


def test_the_chosen_answers_nll_is_added_a_token(base, policy, batch):
    statistics, mask = TokenStatistics(*policy(**batch)), response_mask(batch)
    with torch.no_grad():
        rows = len(batch["input_ids"]) // 2
        logits = policy(input_ids=batch["input_ids"][:rows], attention_mask=batch["attention_mask"][:rows]).logits
    labels = batch["input_ids"][:rows].masked_fill(~batch["completion_mask"][:rows].bool(), -100)
    expected = torch.stack([
        F.cross_entropy(row[:-1], wanted[1:]) for row, wanted in zip(logits, labels, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(losses.chosen_nll(statistics, mask), expected)
    for loss, options in ((losses.dpo, {"beta": 0.1}), (losses.qadapter, {"config": policy.configs["default"]})):
        added = loss(statistics, mask, **options, sft_weight=3.0) - loss(statistics, mask, **options)
        torch.testing.assert_close(added, 3.0 * expected)


@pytest.mark.parametrize("alpha", [0.1, 2.0])
def test_discounted_returns_are_those_of_the_token_mdp(policy, batch, alpha):
    config = QAdapterConfig(alpha_tilde=alpha, alpha_0=alpha, gamma=0.9, beta=0.0, discount_floor=0.0)
    statistics, mask = TokenStatistics(*policy(**batch)), response_mask(batch)
    _, values, rewards, _ = implied(statistics, mask, config)
    returns = []
    for row, value, kept in zip(rewards, values, mask, strict=True):
        steps, (first, *_) = row[kept], value[kept]
        returns.append(sum(0.9**t * reward for t, reward in enumerate(steps)) - first)
    chosen, rejected = torch.stack(returns).chunk(2)
    expected = -F.logsigmoid(chosen - rejected)
    torch.testing.assert_close(losses.qadapter(statistics, mask, config), expected)
    torch.testing.assert_close(losses.dpo(statistics, mask, alpha, discount=0.9), expected)
    torch.testing.assert_close(losses.dpo(statistics, mask, alpha, discount=1.0), losses.dpo(statistics, mask, alpha))
