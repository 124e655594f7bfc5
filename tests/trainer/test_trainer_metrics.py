"""The trainer's loss and metrics, in training and in evaluation, against the loops of the oracle."""

import pytest
from datasets import Dataset
from models import plain_peft, tiny_tokenizer, tiny_trainer, token_pairs
from trainer_examples import METRICS, expected_metrics

from qadapter import training_metrics
from qadapter.data import tokenise_preferences


@pytest.mark.parametrize("accumulation", [1, 5])
def test_logged_loss_and_metrics_equal_the_oracle(base, policy, tmp_path, accumulation):
    pairs = token_pairs(5)
    expected = expected_metrics(plain_peft(base, policy), pairs)
    trainer = tiny_trainer(
        policy,
        tmp_path,
        pairs,
        max_steps=1,
        per_device_train_batch_size=5 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert set(entry) >= METRICS
    assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_metrics_are_averages_over_the_logging_interval(base, policy, tmp_path):
    pairs = token_pairs(6)
    expected = expected_metrics(plain_peft(base, policy), pairs)
    options = {"max_steps": 3, "logging_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.0}
    trainer = tiny_trainer(policy, tmp_path, pairs, **options)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [5, 2])
def test_evaluation_equals_the_oracle(base, policy, tmp_path, batch_size):
    pairs = token_pairs(5, seed=9)
    expected = expected_metrics(plain_peft(base, policy), pairs)
    trainer = tiny_trainer(policy, tmp_path, eval_pairs=pairs, per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate()
    expected = {f"eval_{name}": value for name, value in expected.items()}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert {f"eval_{name}" for name in METRICS} <= set(trainer.state.log_history[0])


def test_a_streamed_evaluation_counts_each_pair_once(base, policy, tmp_path):
    """Also where the last batch is smaller: the Trainer takes each batch of a stream for a full one."""
    pairs = token_pairs(5, seed=9)
    expected = expected_metrics(plain_peft(base, policy), pairs)["loss"]
    trainer = tiny_trainer(policy, tmp_path, per_device_eval_batch_size=4)
    stream = Dataset.from_list(pairs).to_iterable_dataset()
    assert trainer.evaluate(stream)["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_metrics_of_training_and_evaluation_do_not_mix(base, policy, tmp_path):
    pairs, held_out = token_pairs(4), token_pairs(5, seed=9)
    plain = plain_peft(base, policy)
    options = {"max_steps": 2, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    trainer = tiny_trainer(policy, tmp_path, pairs, held_out, per_device_train_batch_size=2, **options)
    trainer.train()
    logs = trainer.state.log_history
    [train] = [entry for entry in logs if "loss" in entry]
    evaluations = [entry for entry in logs if "eval_loss" in entry]
    assert len(evaluations) == 2
    margins = expected_metrics(plain, pairs)["rewards/margins"]
    assert train["rewards/margins"] == pytest.approx(margins, rel=1e-6)
    for entry in evaluations:
        margins = expected_metrics(plain, held_out)["rewards/margins"]
        assert entry["eval_rewards/margins"] == pytest.approx(margins, rel=1e-6)


def test_each_of_several_evaluation_sets_has_its_own_metrics(base, policy, tmp_path):
    held_out = {"near": token_pairs(3, seed=9), "far": token_pairs(4, seed=11)}
    trainer = tiny_trainer(policy, tmp_path)
    metrics = trainer.evaluate({name: Dataset.from_list(pairs) for name, pairs in held_out.items()})
    for name, pairs in held_out.items():
        margins = expected_metrics(plain_peft(base, policy), pairs)["rewards/margins"]
        assert metrics[f"eval_{name}_rewards/margins"] == pytest.approx(margins, rel=1e-6)


def test_pairs_of_text_may_be_measured_after_training(policy, tmp_path):
    rows = Dataset.from_list([{"prompt": "Why?", "chosen": "So.", "rejected": "Who knows?"}])
    trainer = tiny_trainer(policy, tmp_path, processing_class=tiny_tokenizer())
    expected, _ = tokenise_preferences(rows, tiny_tokenizer())
    loss = trainer.evaluate(expected)["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == loss
    assert trainer.predict(rows).metrics["test_loss"] == loss


def test_metrics_carry_the_prefix_that_was_asked_for(base, policy, tmp_path):
    pairs = token_pairs(3, seed=9)
    trainer = tiny_trainer(policy, tmp_path)
    expected = expected_metrics(plain_peft(base, policy), pairs)["qadapter/kl"]
    dataset = Dataset.from_list(pairs)
    assert trainer.evaluate(dataset, metric_key_prefix="test")["test_qadapter/kl"] == pytest.approx(expected, rel=1e-6)
    assert trainer.predict(dataset).metrics["test_qadapter/kl"] == pytest.approx(expected, rel=1e-6)
    other = Dataset.from_list(token_pairs(4, seed=11))
    expected = expected_metrics(plain_peft(base, policy), token_pairs(4, seed=11))["qadapter/kl"]
    assert trainer.evaluate(other)["eval_qadapter/kl"] == pytest.approx(expected, rel=1e-6)


def test_the_names_of_metrics_are_those_that_an_evaluation_has(policy, tmp_path):
    trainer = tiny_trainer(policy, tmp_path)
    found = trainer.evaluate(Dataset.from_list(token_pairs(3)))
    of_the_trainer = {"epoch", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}
    assert {name.removeprefix("eval_") for name in found} - of_the_trainer == set(training_metrics.METRICS)


def test_evaluation_gives_no_logits(policy, tmp_path):
    trainer = tiny_trainer(policy, tmp_path)
    assert trainer.predict(Dataset.from_list(token_pairs(3))).predictions is None
