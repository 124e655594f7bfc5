"""The trainer: its loss and metrics against the loops of the oracle, what it leaves behind, and what it refuses."""

import json
import math
import traceback

import datasets
import oracle
import pytest
import torch
from datasets import Dataset
from models import (
    APART,
    plain_peft,
    tiny_base,
    tiny_policy,
    tiny_tokenizer,
    tiny_trainer,
    token_pairs,
    two_passes,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from qadapter import (
    QAdapterConfig,
    QAdapterForCausalLM,
    QAdapterTrainer,
    QAdapterTrainingArguments,
    load_preference_dataset,
)
from qadapter.data import token_cache
from qadapter.errors import AdapterFormatError, ConfigError, DataError, TrainingError
from qadapter.modeling.loading import load_adapter_weights
from qadapter.training_log import CURVE_NAME, LOG_NAME, read_log

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
                policy_lse, base_lse = oracle.log_sum_exp(policy), oracle.log_sum_exp(b)
                distribution = [
                    (math.exp(p - policy_lse), p - policy_lse, q - base_lse) for p, q in zip(policy, b, strict=True)
                ]
                logps.append(policy[action] - policy_lse)
                tokens.append(
                    {
                        "entropy": -sum(p * logp for p, logp, _ in distribution),
                        "qadapter/kl": sum(p * (logp - base_logp) for p, logp, base_logp in distribution),
                        "qadapter/value": oracle.value(t, b, *settings),
                    }
                )
            results.append(((rewards, oracle.value(z_theta[0], z_base[0], *settings)), sum(logps)))
    chosen, rejected = sides["chosen"], sides["rejected"]
    returns = [[sum(rewards) - start for (rewards, start), _ in results] for results in (chosen, rejected)]
    margins = [c - r for c, r in zip(*returns, strict=True)]
    return {
        "loss": mean(oracle.pair_loss(c, r, config.beta) for (c, _), (r, _) in zip(chosen, rejected, strict=True)),
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


@pytest.fixture
def base():
    return tiny_base("gpt_neox", dtype=torch.float64)


@pytest.fixture
def policy(base):
    return tiny_policy(base, CONFIG)


# -- loss and metrics ----------------------------------------------------------------------------------------------


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


def test_evaluation_gives_no_logits(policy, tmp_path):
    trainer = tiny_trainer(policy, tmp_path)
    assert trainer.predict(Dataset.from_list(token_pairs(3))).predictions is None


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for the device.

    Those by which transformers chooses a mask are its own affair.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indices = args[1] if function is torch.ops.aten.index.Tensor else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        waits = by_mask or function._schema.name.removeprefix("aten::") in self.WAITING
        if waits and not any("masking_utils" in frame.filename for frame in traceback.extract_stack()):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["gpt_neox", "phi"])
@pytest.mark.parametrize(("packing", "expected"), [(True, []), (False, ["aten.nonzero.default"])])
def test_a_step_does_not_read_the_device(architecture, packing, expected, tmp_path):
    """In padded rows the number of response tokens, which is a shape, must be read; packed batches bring it along."""
    trainer = tiny_trainer(tiny_policy(tiny_base(architecture)), tmp_path, packing=packing)
    batch = trainer.data_collator(token_pairs(5))
    trainer.model.train()
    with HostReads() as reads:
        trainer.compute_loss(trainer.model, batch).backward()
    assert reads.found == expected


class ReadsOfASecondStep(TrainerCallback):
    """Counts the host's reads in a whole step, from its forward pass to the optimiser's and the scheduler's step."""

    def __init__(self):
        self.reads = HostReads()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.reads.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.reads.__exit__(None, None, None)


@pytest.mark.parametrize("micro_batch_tokens", [None, 20])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_whole_step_with_the_optimiser_s_does_not_read_the_device(filtered, micro_batch_tokens, tmp_path):
    """But where transformers' filter of losses that are not finite was asked for."""
    counter = ReadsOfASecondStep()
    options = {"logging_nan_inf_filter": True} if filtered else {}
    tiny_trainer(
        tiny_policy(),
        tmp_path,
        callbacks=[counter],
        max_steps=3,
        logging_steps=3,
        per_device_train_batch_size=4,
        micro_batch_tokens=micro_batch_tokens,
        **options,
    ).train()
    assert counter.reads.found == (["aten._local_scalar_dense.default"] * 2 if filtered else [])


def test_the_optimiser_is_fused_adamw(policy, tmp_path):
    trainer = tiny_trainer(policy, tmp_path)
    assert trainer.args.optim == "adamw_torch_fused"
    optimiser = trainer.create_optimizer()
    assert isinstance(optimiser, torch.optim.AdamW)
    assert optimiser.defaults["fused"] is True


# -- what a run leaves behind --------------------------------------------------------------------------------------


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


def test_checkpoint_is_not_loaded_into_a_model_of_another_base(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    other = tiny_policy(tiny_base("gpt_neox", dtype=torch.float64, seed=8), CONFIG)
    with pytest.raises(AdapterFormatError, match="this checkpoint belongs to another base model"):
        load_adapter_weights(other, tmp_path)


# -- inputs --------------------------------------------------------------------------------------------------------


def test_text_is_tokenised_and_its_report_kept(policy, tmp_path):
    tokenizer = tiny_tokenizer()
    trainer = QAdapterTrainer(
        model=policy,
        args=QAdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, packing=False),
        train_dataset=Dataset.from_list(TEXT_PAIRS),
        eval_dataset={"first": Dataset.from_list(TEXT_PAIRS[:2]), "second": Dataset.from_list(TEXT_PAIRS[1:])},
        processing_class=tokenizer,
    )
    assert trainer.train_dataset.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert trainer.tokenisation_reports["train_dataset"].kept == 3
    assert set(trainer.tokenisation_reports) == {"train_dataset", "eval_dataset/first", "eval_dataset/second"}
    assert trainer.data_collator.pad_token_id == tokenizer.pad_token_id
    assert policy.tokenizer_fingerprint is not None


def test_pairs_from_a_file_train(policy, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in TEXT_PAIRS))
    trainer = QAdapterTrainer(
        model=policy,
        args=QAdapterTrainingArguments(
            output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=1, disable_tqdm=True, max_length=64
        ),
        train_dataset=load_preference_dataset(str(path)),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_cached_tokens_give_the_same_batches(tmp_path, monkeypatch):
    """First made and kept, then read, against `cache_tokens = False`; in training order and in evaluation."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(token_cache, "LEAST_ROWS", 3)
    pairs = [
        {"prompt": f"{n * n}?" * (n % 3 + 1), "chosen": "yes " * (n % 3 + 1), "rejected": f"no {n}"}
        for n in range(1, 24)
    ]
    batches, reports = [], []
    for cached in (False, True, True):
        trainer = QAdapterTrainer(
            model=tiny_policy(),
            args=QAdapterTrainingArguments(
                output_dir=str(tmp_path / "out"), use_cpu=True, cache_tokens=cached, max_length=20, seed=3
            ),
            train_dataset=Dataset.from_list(pairs),
            eval_dataset=Dataset.from_list(pairs[:9]),
            processing_class=tiny_tokenizer(),
        )
        loaders = (trainer.get_train_dataloader(), trainer.get_eval_dataloader())
        batches.append([batch for loader in loaders for batch in loader])
        reports.append(trainer.tokenisation_reports)
        assert len(list(tmp_path.glob("cache/qadapter/*"))) == (2 if cached else 0)
    assert reports[1] == reports[2] == reports[0]
    assert reports[0]["train_dataset"].truncated_prompts
    for again in batches[1:]:
        for batch, expected in zip(again, batches[0], strict=True):
            torch.testing.assert_close(batch, expected, rtol=0, atol=0)


def test_bfloat16_base_trains_a_float32_adapter(tmp_path):
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        policy = tiny_policy(tiny_base(dtype=dtype), CONFIG)
        trainer = tiny_trainer(policy, tmp_path / str(dtype), max_steps=1)
        trainer.train()
        losses[dtype] = trainer.state.log_history[0]["loss"]
        assert {parameter.dtype for parameter in policy.adapter_parameters().values()} == {torch.float32}
    # bfloat16 keeps 8 bits of each logit.
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.05)


def test_mixed_precision_training_stays_near_float32(tmp_path):
    losses = {}
    for bf16 in (False, True):
        policy = tiny_policy(tiny_base(), CONFIG)
        trainer = tiny_trainer(policy, tmp_path / str(bf16), max_steps=1, bf16=bf16)
        trainer.train()
        losses[bf16] = trainer.state.log_history[0]["loss"]
    # bfloat16 keeps 8 bits of each logit.
    assert losses[True] == pytest.approx(losses[False], rel=0.05)
    assert losses[True] != losses[False]


class GradientNorms(TrainerCallback):
    def __init__(self):
        self.norms = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.norms += [logs["grad_norm"]] if "grad_norm" in logs else []


def test_activation_checkpointing_trains_alike(tmp_path):
    norms = {}
    for checkpointing in (False, True):
        recorder = GradientNorms()
        policy = tiny_policy(tiny_base("gpt_neox", dtype=torch.float64), CONFIG)
        options = {"activation_checkpointing": checkpointing, "callbacks": [recorder]}
        tiny_trainer(policy, tmp_path / str(checkpointing), max_steps=2, **options).train()
        norms[checkpointing] = recorder.norms
    assert len(norms[True]) == 2
    assert norms[True] == pytest.approx(norms[False], rel=1e-9)


# -- a loss that is not finite -------------------------------------------------------------------------------------


def policy_with(value):
    """A policy in whose adapter one number is `value`."""
    policy = tiny_policy()
    with torch.no_grad():
        [*policy.adapter_parameters().values()][-1][0, 0] = value
    return policy


@pytest.mark.parametrize(("value", "said"), [(math.nan, "nan"), (math.inf, "nan|inf")])
@pytest.mark.parametrize(("logging_steps", "step"), [(2, 2), (100, 4)])
def test_a_loss_that_is_not_finite_ends_the_run_where_it_is_logged(tmp_path, value, said, logging_steps, step):
    policy = policy_with(value)
    trainer = tiny_trainer(policy, tmp_path, max_steps=4, logging_steps=logging_steps)
    with pytest.raises(
        TrainingError, match=rf"mean loss up to step {step} is ({said}): .* Lower learning_rate \(0.0003"
    ):
        trainer.train()
    last = read_log(tmp_path / LOG_NAME)[-1]
    assert last["step"] == step
    assert last.get("loss", last.get("train_loss")) is None


class Breaks(TrainerCallback):
    """Makes one number of the adapter NaN at the end of a step, after that step's loss."""

    def __init__(self, policy, step):
        self.policy, self.step = policy, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                [*self.policy.adapter_parameters().values()][-1][0, 0] = math.nan


@pytest.mark.parametrize("several", [False, True])
def test_an_evaluation_whose_loss_is_not_finite_ends_the_run_before_its_checkpoint(policy, tmp_path, several):
    name = "eval_hard_loss" if several else "eval_loss"
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    callbacks = [Breaks(policy, 3)]
    trainer = tiny_trainer(
        policy, tmp_path, None, token_pairs(4), max_steps=4, logging_steps=100, callbacks=callbacks, **options
    )
    if several:
        trainer.eval_dataset = {"hard": trainer.eval_dataset}
    with pytest.raises(TrainingError, match=rf"the {name} after step 3 is nan: .* Lower learning_rate \(0.0003"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert read_log(tmp_path / LOG_NAME)[-1][name] is None


def test_a_loss_that_is_not_finite_before_training_is_not_blamed_on_the_steps(tmp_path):
    trainer = tiny_trainer(policy_with(math.nan), tmp_path, None, token_pairs(4))
    with pytest.raises(TrainingError, match=r"eval_loss is nan before any training: load the base in float32"):
        trainer.evaluate()


def test_a_loss_that_is_not_finite_is_left_out_where_the_filter_was_asked_for(tmp_path):
    trainer = tiny_trainer(policy_with(math.nan), tmp_path, max_steps=2, logging_nan_inf_filter=True)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == 0


# -- refusals ------------------------------------------------------------------------------------------------------


def test_fp16_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"fp16 = true: .* Use bf16"):
        QAdapterTrainingArguments(output_dir=str(tmp_path), fp16=True)


def test_model_in_float16_is_refused(tmp_path):
    policy = tiny_policy(tiny_base(dtype=torch.float16))
    with pytest.raises(ConfigError, match=r"the model is in float16, .*dtype=bfloat16"):
        tiny_trainer(policy, tmp_path)


def test_plain_model_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match=r"model is a GPTNeoXForCausalLM: .*from_base"):
        tiny_trainer(base, tmp_path)


def test_plain_arguments_are_refused(policy, tmp_path):
    with pytest.raises(ConfigError, match="args is a TrainingArguments: give QAdapterTrainingArguments"):
        QAdapterTrainer(model=policy, args=TrainingArguments(output_dir=str(tmp_path)))


def test_text_without_a_tokenizer_is_refused(policy, tmp_path):
    with pytest.raises(ConfigError, match="train_dataset holds text but processing_class is missing"):
        tiny_trainer(policy, tmp_path, TEXT_PAIRS)


def test_list_of_rows_is_refused(policy, tmp_path):
    args = QAdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(DataError, match=r"got list; give one split as a Dataset, or Dataset\.from_list"):
        QAdapterTrainer(model=policy, args=args, train_dataset=TEXT_PAIRS, processing_class=tiny_tokenizer())
