"""What the trainer refuses: losses that are not finite, float16, and models, arguments or data of another kind."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict
from models import tiny_base, tiny_policy, tiny_tokenizer, tiny_trainer, token_pairs
from trainer_examples import TEXT_PAIRS
from transformers import TrainerCallback, TrainingArguments

from qadapter import QAdapterForCausalLM, QAdapterTrainer, QAdapterTrainingArguments
from qadapter.data import PackedCollator
from qadapter.errors import ConfigError, DataError, TrainingError
from qadapter.training_log import LOG_NAME, read_log
from qadapter.training_sharded import fit_sharding

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


@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [
        ("label_smoothing_factor", 0.1, r"label_smoothing \(QAdapterConfig\)"),
        ("neftune_noise_alpha", 5.0, "Leave it out"),
        ("train_sampling_strategy", "group_by_length", "use micro_batch_tokens"),
        ("remove_unused_columns", True, "Leave it out"),
    ],
)
def test_arguments_of_transformers_that_do_not_fit_pairs_are_refused(tmp_path, name, value, way_out):
    with pytest.raises(ConfigError, match=rf"{name} = {value!r}: .*{way_out}"):
        QAdapterTrainingArguments(output_dir=str(tmp_path), **{name: value})


@pytest.mark.parametrize("name", ["dispatch_batches", "split_batches"])
def test_batches_that_processes_would_share_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"accelerator_config: {name} = True: .* Leave it out"):
        QAdapterTrainingArguments(output_dir=str(tmp_path), accelerator_config={name: True})


def test_a_model_for_each_trial_is_refused(policy, tmp_path):
    args = QAdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ConfigError, match="model_init is not supported: .* a new trainer"):
        QAdapterTrainer(model=None, args=args, model_init=lambda: policy)


@pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"])
def test_functions_that_would_never_be_called_are_refused(policy, tmp_path, name):
    args = QAdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ConfigError, match=f"{name} would never be called: .* override compute_loss"):
        QAdapterTrainer(model=policy, args=args, **{name: print})


def test_model_in_float16_is_refused(tmp_path):
    policy = tiny_policy(tiny_base(dtype=torch.float16))
    with pytest.raises(ConfigError, match=r"the model is in float16, .*dtype=bfloat16"):
        tiny_trainer(policy, tmp_path)


def test_a_packed_collator_is_refused_where_the_base_cannot_pack(tmp_path):
    policy = tiny_policy(tiny_base(attn_implementation="eager"))
    with pytest.raises(ConfigError, match="LlamaForCausalLM with this attention cannot run packed rows: leave data_c"):
        tiny_trainer(policy, tmp_path, data_collator=PackedCollator())


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


def test_several_splits_to_train_on_are_refused(policy, tmp_path):
    args = QAdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    splits = DatasetDict({name: Dataset.from_list(TEXT_PAIRS) for name in ("train", "test")})
    with pytest.raises(DataError, match=r"train_dataset has the splits 'train', 'test': .*dataset\['train'\]"):
        QAdapterTrainer(model=policy, args=args, train_dataset=splits, processing_class=tiny_tokenizer())


def test_pairs_that_fill_no_batch_are_refused(policy, tmp_path):
    trainer = tiny_trainer(policy, tmp_path / "run", per_device_train_batch_size=9, dataloader_drop_last=True)
    with pytest.raises(ConfigError, match="dataloader_drop_last = True: 8 pairs do not fill a batch of 9, so none"):
        trainer.train()


def test_held_out_pairs_that_fill_no_batch_are_all_evaluated(policy, tmp_path):
    """Only training drops its last batch."""
    options = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 4}
    for count in (3, 5):
        whole, dropping = (
            tiny_trainer(policy, tmp_path, None, token_pairs(count), dataloader_drop_last=drop, **options)
            for drop in (False, True)
        )
        expected, found = (trainer.evaluate()["eval_rewards/margins"] for trainer in (whole, dropping))
        assert found == pytest.approx(expected, rel=1e-9)
        assert len(dropping.predict(dropping.eval_dataset).metrics) == len(whole.predict(whole.eval_dataset).metrics)
    assert (len(whole.get_train_dataloader()), len(dropping.get_train_dataloader())) == (3, 2)


def test_a_policy_without_weights_to_train_is_refused_and_trains_with_the_way_out(tmp_path):
    tiny_policy().save_pretrained(tmp_path / "adapter")
    loaded = QAdapterForCausalLM.from_pretrained(tmp_path / "adapter", base_model=tiny_base())
    with pytest.raises(ConfigError, match=r"no weight of the model can be trained: .*weight.requires_grad_\(True\)"):
        tiny_trainer(loaded, tmp_path / "run").train()
    before = {name: weight.detach().clone() for name, weight in loaded.adapter_parameters().items()}
    for weight in loaded.adapter_parameters().values():
        weight.requires_grad_(True)
    tiny_trainer(loaded, tmp_path / "run").train()
    assert not all(torch.equal(weight, before[name]) for name, weight in loaded.adapter_parameters().items())


def test_of_a_composition_only_the_first_adapter_can_be_trained(tmp_path):
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    for name in ("one", "two"):
        QAdapterForCausalLM.from_base(tmp_path / "base").save_pretrained(tmp_path / name)
    folders = {name: tmp_path / name for name in ("one", "two")}
    both = QAdapterForCausalLM.from_pretrained(tmp_path / "base", adapters=folders)
    with pytest.raises(ConfigError, match=r"model.adapter_parameters\('one'\).values\(\)"):
        tiny_trainer(both, tmp_path / "run").train()
    for weight in both.adapter_parameters("two").values():
        weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="'two' is set to be trained, but of several only the first, 'one', can be"):
        tiny_trainer(both, tmp_path / "run").train()


# -- sharded over processes ----------------------------------------------------------------------------------------

FSDP = {"activation_checkpointing": False, "state_dict_type": "FULL_STATE_DICT"}
ZERO3 = {"zero_stage": 3, "zero3_save_16bit_model": True}


@pytest.mark.parametrize(
    ("fsdp", "deepspeed", "match"),
    [
        ({"activation_checkpointing": True}, {}, "fsdp_activation_checkpointing = true: .* gradient_checkpointing"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, {}, "fsdp_state_dict_type = SHARDED_.* Set FULL_STATE_DICT"),
        ({}, {"zero3_save_16bit_model": False}, "zero3_save_16bit_model = false: .* Set it to true"),
    ],
)
def test_sharding_with_which_the_adapter_would_be_lost_is_refused(tmp_path, fsdp, deepspeed, match):
    args = QAdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    fit_sharding(args, None, SimpleNamespace(**ZERO3))
    plugins = SimpleNamespace(**FSDP | fsdp) if fsdp else None, SimpleNamespace(**ZERO3 | deepspeed)
    with pytest.raises(ConfigError, match=match):
        fit_sharding(args, *plugins)


# -- pairs that the base cannot run, or was not made for ---------------------------------------------------------------


def tokens(*prompt_ids):
    """One tokenised pair."""
    return Dataset.from_list([{"prompt_ids": list(prompt_ids), "chosen_ids": [2, 1], "rejected_ids": [1]}])


def trainer_of(policy, folder, pairs):
    args = QAdapterTrainingArguments(output_dir=str(folder), use_cpu=True)
    return QAdapterTrainer(model=policy, args=args, train_dataset=pairs)


def test_a_token_without_an_embedding_is_refused(policy, tmp_path):
    rows = policy.config.vocab_size
    trainer_of(policy, tmp_path, tokens(3, rows - 1))
    with pytest.raises(DataError, match=f"the pairs hold token {rows}, but the base's embeddings have {rows} rows"):
        trainer_of(policy, tmp_path, tokens(3, rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "prompt_ids holds no token"),
        ({"chosen_ids": []}, "chosen_ids holds no token"),
        ({"rejected_ids": []}, "rejected_ids holds no token"),
        ({"rejected_ids": None}, "rejected_ids holds no token"),
        ({"chosen_ids": [4, 5], "rejected_ids": [4, 5]}, "both answers are the same tokens"),
        ({"rejected_ids": [4, -100]}, "rejected_ids holds the token -100"),
    ],
)
def test_tokens_that_are_no_pair_are_refused_with_their_row(policy, tmp_path, change, message):
    rows = token_pairs(5)
    rows[3] |= change
    with pytest.raises(DataError, match=f"row 4: {message}"):
        trainer_of(policy, tmp_path, Dataset.from_list(rows))
    with pytest.raises(DataError, match=f"row 4: {message}"):
        tiny_trainer(policy, tmp_path, eval_pairs=rows)
    args = QAdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1)
    streamed = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(DataError, match=f"row 4: {message}"):
        QAdapterTrainer(model=policy, args=args, train_dataset=streamed).train()


def test_no_pairs_at_all_are_refused(policy, tmp_path):
    none = tokens(3).select([])
    with pytest.raises(DataError, match="train_dataset holds no pairs"):
        trainer_of(policy, tmp_path, none)
    with pytest.raises(DataError, match="eval_dataset/style holds no pairs"):
        QAdapterTrainer(
            model=policy,
            args=QAdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True),
            train_dataset=tokens(3),
            eval_dataset={"style": none},
        )


def test_pairs_beyond_the_context_are_warned_of_or_beyond_a_table_refused(tmp_path):
    pairs = tokens(*[3] * 63)  # and an answer of two, where both have 64 positions
    with pytest.warns(UserWarning, match="a pair of 65 tokens is longer than the base's 64 positions"):
        trainer_of(tiny_policy(), tmp_path, pairs)
    with pytest.raises(DataError, match="64 positions .*: give --max-length 64, which cuts prompts"):
        trainer_of(tiny_policy(tiny_base("gpt2")), tmp_path, pairs)


def test_pairs_of_a_stream_are_held_against_the_base_as_they_are_read(policy, tmp_path):
    rows, args = policy.config.vocab_size, {"output_dir": str(tmp_path), "use_cpu": True, "max_steps": 1}
    pairs = {"fitting": tokens(3, rows - 1), "long": tokens(*[3] * 63), "foreign": tokens(3, rows)}

    def train(kind):
        streamed = pairs[kind].to_iterable_dataset()
        QAdapterTrainer(model=policy, args=QAdapterTrainingArguments(**args), train_dataset=streamed).train()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the stream holds")
        train("fitting")
    with pytest.warns(UserWarning, match="the stream holds pairs longer than the base's 64 positions"):
        train("long")
    with pytest.raises(DataError, match=f"the pairs hold token {rows}, but the base's embeddings have {rows} rows"):
        train("foreign")
