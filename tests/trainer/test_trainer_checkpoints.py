"""What a run leaves behind: log, curve, adapter folder, checkpoints; and into which models a checkpoint is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import APART, lora, tiny_base, tiny_policy, tiny_tokenizer, tiny_trainer, token_pairs
from trainer_examples import CONFIG, METRICS
from transformers import EarlyStoppingCallback, Trainer

from qadapter import QAdapterForCausalLM, QAdapterTrainingArguments
from qadapter.errors import AdapterFormatError, ConfigError
from qadapter.modeling.resuming import load_adapter_weights
from qadapter.training_log import CURVE_NAME, LOG_NAME, read_log

FILES = ("qadapter_config.json", *(f"adapters/default/adapter_{name}" for name in ("config.json", "model.safetensors")))


def test_run_writes_its_log_and_its_curve(policy, tmp_path):
    trainer = tiny_trainer(policy, tmp_path, eval_pairs=token_pairs(3), eval_strategy="steps", eval_steps=1)
    trainer.train()
    entries = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 1, 2, 2, 2]
    for ours, theirs in zip(entries, trainer.state.log_history, strict=True):
        assert ours.items() >= {name: value for name, value in theirs.items() if name in METRICS}.items()
    curve = (tmp_path / CURVE_NAME).read_text()
    assert curve.startswith("<svg")
    for label in ("loss", "rewards/accuracies", "qadapter/kl", "qadapter/kl (held out)"):
        assert label in curve


def test_log_of_a_new_run_starts_anew_and_that_of_a_resumed_one_goes_on(policy, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    tiny_trainer(policy, tmp_path, **options).train()
    tiny_trainer(policy, tmp_path, **options).train()
    whole = [entry["step"] for entry in read_log(tmp_path / LOG_NAME)]
    assert whole == [1, 2, 3, 3]
    tiny_trainer(policy, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [entry["step"] for entry in read_log(tmp_path / LOG_NAME)] == whole


@pytest.mark.parametrize("best", [False, True])
def test_a_run_that_has_all_its_steps_is_trained_no_further(policy, tmp_path, best):
    """The Trainer would take one more step."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "logging_steps": 100}
    if best:
        options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
        options |= {"metric_for_best_model": "qadapter/kl", "greater_is_better": False}

    def trainer():
        return tiny_trainer(policy, tmp_path, eval_pairs=token_pairs(3), **options)

    trainer().train()
    weights = {name: weight.detach().clone() for name, weight in policy.adapter_parameters().items()}
    log = (tmp_path / LOG_NAME).read_bytes()
    for weight in policy.adapter_parameters().values():
        weight.data.zero_()
    again = trainer()
    result = again.train(resume_from_checkpoint=True)
    assert (result.global_step, result.metrics, again.state.global_step) == (3, {}, 3)
    assert (Path(again.state.best_model_checkpoint or "").name == "checkpoint-1") is best  # its KL is the smallest
    torch.testing.assert_close(dict(policy.adapter_parameters()), weights, rtol=0, atol=0)
    assert (tmp_path / LOG_NAME).read_bytes() == log
    options["max_steps"] = 2
    with pytest.raises(ConfigError, match="checkpoint-3 is of step 3, but this run ends at step 2: give a larger max_"):
        trainer().train(resume_from_checkpoint=True)


def test_log_survives_a_line_that_was_cut_short(policy, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    tiny_trainer(policy, tmp_path, **options).train()
    with (tmp_path / LOG_NAME).open("a") as file:
        file.write('{"step": 2, "los')
    tiny_trainer(policy, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [entry["step"] for entry in read_log(tmp_path / LOG_NAME)] == [1, 2, 2]


def test_saved_run_is_an_adapter_folder(base, tmp_path):
    base.save_pretrained(tmp_path / "base")
    policy = QAdapterForCausalLM.from_base(tmp_path / "base", CONFIG)
    trainer = tiny_trainer(policy, tmp_path / "out", processing_class=tiny_tokenizer())
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / "training_arguments.json").exists()
    assert not (tmp_path / "out" / "training_args.bin").exists()
    loaded = QAdapterForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 9, 4]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, policy.eval()(ids).logits)


def test_a_readme_stays_what_it_is(policy, tmp_path):
    """`push_to_hub` would have the Trainer write its own, of a model of transformers."""
    (tmp_path / "README.md").write_text("mine")
    tiny_trainer(policy, tmp_path).create_model_card(model_name="run")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_push_during_the_run_holds_the_adapter(policy, tmp_path, monkeypatch):
    """The Trainer uploads the output folder, into which it copies what it knows of the checkpoint."""
    pushed = []

    def push(trainer, checkpoint_folder):
        folder = Path(trainer.args.output_dir)
        same = [(folder / file).read_bytes() == (Path(checkpoint_folder) / file).read_bytes() for file in FILES]
        pushed.append((trainer.state.global_step, same))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda *_, **__: None)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    tiny_trainer(policy, tmp_path, push_to_hub=True, **options).train()
    assert pushed == [(2, [True] * 3), (4, [True] * 3)]
    assert not list(tmp_path.glob(".saving-*"))


@pytest.mark.parametrize("options", [{"hub_strategy": "end"}, {}])
def test_no_push_changes_what_an_earlier_one_still_reads(policy, tmp_path, monkeypatch, options):
    """Nor is anything copied where nothing is pushed during the run."""
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda *_: None)
    trainer = tiny_trainer(policy, tmp_path, push_to_hub=True, **options)
    trainer.push_in_progress = None if options else SimpleNamespace(is_done=lambda: False, wait_until_done=lambda: None)
    trainer.train()
    trainer.save_model(tmp_path / "checkpoint-2", _internal_call=True)
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert not (tmp_path / "adapters").exists()


def test_best_model_is_loaded_at_the_end(policy, tmp_path):
    # The learning rate is wild, so that the last checkpoint is not the best.
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/margins", "greater_is_better": True}
    trainer = tiny_trainer(
        policy,
        tmp_path,
        token_pairs(4),
        token_pairs(5, seed=9),
        learning_rate=0.5,
        lr_scheduler_type="constant",
        **options,
        **best,
    )
    trainer.train()
    margins = {
        entry["step"]: entry["eval_rewards/margins"] for entry in trainer.state.log_history if "eval_loss" in entry
    }
    step = max(margins, key=margins.get)
    assert step < 4, "the last checkpoint is the best: the test shows nothing"
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{step}")
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(margins[step], rel=1e-9)


def test_every_metric_knows_whether_its_best_is_its_smallest(tmp_path):
    smallest = {"loss", "rewards/rejected", "logps/rejected", "qadapter/kl", "qadapter/penalty"}
    for name in METRICS | {"loss"}:
        for metric in (name, f"eval_{name}", f"eval_of_style_{name}"):  # the last of one of several evaluation sets
            arguments = QAdapterTrainingArguments(tmp_path, metric_for_best_model=metric)
            assert arguments.greater_is_better == (name not in smallest), metric
    asked_for = QAdapterTrainingArguments(tmp_path, metric_for_best_model="qadapter/kl", greater_is_better=True)
    assert asked_for.greater_is_better
    assert QAdapterTrainingArguments(tmp_path).greater_is_better is None


def test_early_stopping_ends_the_run(policy, tmp_path):
    trainer = tiny_trainer(
        policy,
        tmp_path,
        eval_pairs=token_pairs(5, seed=9),
        max_steps=9,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.global_step == 3


def test_checkpoint_is_not_loaded_into_a_model_of_other_settings(policy, base, tmp_path):
    policy.save_pretrained(tmp_path)
    other = tiny_policy(base, APART)
    with pytest.raises(AdapterFormatError, match="this checkpoint was trained with other settings"):
        load_adapter_weights(other, tmp_path)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"lora_alpha": 32}, r"lora_alpha = 6 instead of 32\."),
        ({"use_rslora": True}, r"use_rslora = False instead of True\."),
        ({"alpha_pattern": {"dense": 3}}, r"lora_alpha = 6 instead of 3 at gpt_neox\.layers\.0\.attention\.dense\."),
    ],
)
def test_checkpoint_is_not_loaded_into_a_model_of_another_scale(policy, base, tmp_path, other, named):
    policy.save_pretrained(tmp_path)
    with pytest.raises(AdapterFormatError, match=f"this checkpoint was trained with {named}"):
        load_adapter_weights(tiny_policy(base, CONFIG, lora(**other)), tmp_path)


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"alpha_pattern": {"dense": 3, "dense_4h_to_h": 4.5}}])
def test_checkpoint_is_loaded_into_a_model_of_the_same_scales(base, tmp_path, settings):
    tiny_policy(base, CONFIG, lora(**settings)).save_pretrained(tmp_path)
    load_adapter_weights(tiny_policy(base, CONFIG, lora(lora_dropout=0.5, **settings)), tmp_path)


def test_checkpoint_is_not_loaded_into_a_model_of_another_base(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    other = tiny_policy(tiny_base("gpt_neox", dtype=torch.float64, seed=8), CONFIG)
    with pytest.raises(AdapterFormatError, match="this checkpoint belongs to another base model"):
        load_adapter_weights(other, tmp_path)
