"""What the trainer makes of preference data: text, files, and tokens kept from an earlier run."""

import json
import math

import datasets
import torch
from datasets import Dataset, IterableDataset
from models import tiny_policy, tiny_tokenizer, tiny_trainer, token_pairs
from trainer_examples import TEXT_PAIRS

from qadapter import QAdapterTrainer, QAdapterTrainingArguments, load_preference_dataset
from qadapter.data import PackedCollator, token_cache


def test_pairs_that_are_left_out_are_told(policy, tmp_path, caplog):
    pairs = [*TEXT_PAIRS, {"prompt": "What?", "chosen": "y" * 400, "rejected": "n"}]
    args = QAdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_length=200)
    QAdapterTrainer(model=policy, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tiny_tokenizer())
    counted, explained = (record.getMessage() for record in caplog.records)
    assert counted == f"train_dataset: {len(pairs)} rows, {len(pairs) - 1} kept, 1 dropped (answer too long: 1)"
    assert explained.startswith(f"train_dataset: answer too long, row {len(pairs)}: the longer answer has")


def test_text_is_tokenised(policy, tmp_path):
    tokenizer = tiny_tokenizer()
    trainer = QAdapterTrainer(
        model=policy,
        args=QAdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, packing=False),
        train_dataset=Dataset.from_list(TEXT_PAIRS),
        eval_dataset={"first": Dataset.from_list(TEXT_PAIRS[:2]), "second": Dataset.from_list(TEXT_PAIRS[1:])},
        processing_class=tokenizer,
    )
    assert trainer.train_dataset.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert {name: len(pairs) for name, pairs in trainer.eval_dataset.items()} == {"first": 2, "second": 2}
    assert trainer.data_collator.pad_token_id == tokenizer.pad_token_id
    assert policy.tokenizer_fingerprint is not None


def test_a_stream_of_tokens_that_does_not_know_its_columns_trains(policy, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(token_pairs(6)))
    assert stream.column_names is None
    trainer = QAdapterTrainer(
        model=policy,
        args=QAdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1, disable_tqdm=True),
        train_dataset=stream,
        processing_class=tiny_tokenizer(),
    )
    assert math.isfinite(trainer.train().training_loss)


def test_a_packed_collator_of_the_user_s_trains_as_the_own_one(tmp_path):
    losses = []
    for own in ({}, {"data_collator": PackedCollator(), "packing": False}):
        trainer = tiny_trainer(tiny_policy(), tmp_path, **own)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == losses[0]


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


def test_cached_tokens_give_the_same_batches_and_warnings(tmp_path, monkeypatch, caplog):
    """First made and kept, then read, against `cache_tokens = False`; in training order and in evaluation."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(token_cache, "LEAST_ROWS", 3)
    pairs = [
        {"prompt": f"{n * n}?" * (n % 3 + 1), "chosen": "yes " * (n % 3 + 1), "rejected": f"no {n}"}
        for n in range(1, 24)
    ]
    batches, warned = [], []
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
        warned.append(caplog.messages)
        caplog.clear()
        assert len(list(tmp_path.glob("cache/qadapter/*"))) == (2 if cached else 0)
    assert warned[1] == warned[2] == warned[0]
    assert "prompts truncated" in warned[0][0]
    for again in batches[1:]:
        for batch, expected in zip(again, batches[0], strict=True):
            torch.testing.assert_close(batch, expected, rtol=0, atol=0)
