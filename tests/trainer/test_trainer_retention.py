"""Texts that no pair speaks of: their loss, where they come from, and what holding on to the base there does."""

import math
from dataclasses import replace

import oracle
import pytest
import torch
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from models import plain_peft, tiny_base, tiny_policy, tiny_tokenizer, tiny_trainer, token_pairs, two_passes
from tokenizers.processors import TemplateProcessing
from trainer_examples import CONFIG, METRICS, TEXT_PAIRS, expected_metrics

from qadapter import QAdapterConfig, QAdapterTrainer, QAdapterTrainingArguments, retention
from qadapter.data import PackedCollator, PreferenceCollator
from qadapter.data.retained import PAIRS_A_TEXT, RETAINED, retained_rows, with_retained_rows
from qadapter.errors import ConfigError, DataError
from qadapter.generation import end_tokens
from qadapter.training_metrics import RETAINED_KL

TEXTS = ["Rice boils in water.", "Some words of no preference at all.", "One two three."]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(TEXTS))
    return path


def retaining(policy, weight=2.0):
    """The policy with that retention."""
    [name] = policy.adapters
    policy.configs[name] = replace(policy.configs[name], retention=weight)
    return policy


def text_trainer(policy, folder, pairs=None, **options):
    return tiny_trainer(policy, folder, pairs, processing_class=tiny_tokenizer(), **options)


def text_kls(base, policy, config):
    """KL(π̃ ‖ π_b) of every token of TEXTS after its first, text by text, in the oracle's loops."""
    plain, found = plain_peft(base, policy), []
    for ids in tiny_tokenizer()(TEXTS)["input_ids"]:
        z_theta, z_base = (z[0, :-1].tolist() for z in two_passes(plain, input_ids=torch.tensor([ids])))
        form = (config.parametrisation, config.alpha_tilde, config.alpha_0)
        policy_logits = (oracle.policy_logits(t, b, *form) for t, b in zip(z_theta, z_base, strict=True))
        found.append([oracle.kl(p, b) for p, b in zip(policy_logits, z_base, strict=True)])
    return found


# -- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"packing": False}, {"micro_batch_tokens": 40}, {"cache_base_states": "memory"}]
)
def test_loss_and_metrics_equal_the_oracle(base, policy, tmp_path, text_file, options):
    """A text's loss is its mean KL times the weight, and a pair's metrics know nothing of texts."""
    pairs = token_pairs(9)
    expected = expected_metrics(plain_peft(base, policy), pairs)
    kls = text_kls(base, policy, CONFIG)
    losses = [expected.pop("loss")] * 9 + [2.0 * sum(text) / len(text) for text in kls]
    expected |= {"loss": sum(losses) / 12, RETAINED_KL: sum(map(sum, kls)) / sum(map(len, kls))}
    options = {"max_steps": 1, "per_device_train_batch_size": 12, "retention_texts": str(text_file)} | options
    trainer = text_trainer(retaining(policy), tmp_path, pairs, **options)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert set(entry) >= METRICS
    assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def trained_weights(base, folder, text_file, **options):
    policy = retaining(tiny_policy(base, CONFIG))
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.1} | options
    trainer = text_trainer(policy, folder, token_pairs(9), retention_texts=str(text_file), **options)
    trainer.train()
    return policy.adapter_parameters()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3"])
def test_every_way_to_run_a_batch_learns_the_same(tmp_path, text_file, architecture):
    base = tiny_base(architecture, dtype=torch.float64)
    slow = trained_weights(base, tmp_path, text_file, packing=False, fused_head=False, share_trunk=False)
    for options in ({}, {"micro_batch_tokens": 60}, {"cache_base_states": "memory"}):
        fast = trained_weights(base, tmp_path, text_file, **options)
        for name, weight in slow.items():
            torch.testing.assert_close(fast[name], weight, rtol=0, atol=2e-8, msg=f"{options}: {name} differs")


def test_weight_zero_is_training_without(base, tmp_path):
    def weights(**options):
        policy = tiny_policy(base, CONFIG)
        tiny_trainer(policy, tmp_path, token_pairs(9), max_steps=3, **options).train()
        return policy.adapter_parameters()

    plain, with_tokenizer = weights(), weights(processing_class=tiny_tokenizer())
    assert all(torch.equal(plain[name], weight) for name, weight in with_tokenizer.items())


def test_it_holds_the_policy_to_the_base_on_the_texts(tmp_path, text_file):
    """Ever nearer with a larger weight, while the pairs are learnt."""
    drifts, margins = [], []
    for weight in (0.0, 1.0, 10.0):
        base = tiny_base(dtype=torch.float64)
        policy = tiny_policy(base, QAdapterConfig(retention=weight), trained=False)
        texts = {"retention_texts": str(text_file)} if weight else {}
        options = {"max_steps": 24, "logging_steps": 8, "learning_rate": 1e-2} | texts
        trainer = text_trainer(policy, tmp_path, token_pairs(12), **options)
        trainer.train()
        kls = text_kls(base, policy, policy.configs["default"])
        drifts.append(sum(map(sum, kls)) / sum(map(len, kls)))
        margins.append(trainer.state.log_history[-2]["rewards/margins"])
    assert drifts[0] > 1.5 * drifts[1] > 2.25 * drifts[2] > 0
    assert min(margins) > 0.1


# -- the rows ------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(pairs=st.integers(1, 20), texts=st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=5), min_size=1))
def test_a_text_comes_after_every_third_pair(pairs, texts):
    dataset = Dataset.from_list(token_pairs(pairs))
    rows = list(with_retained_rows(dataset, texts))
    flags = [row.pop(RETAINED) for row in rows]
    assert [row for row, flag in zip(rows, flags, strict=True) if not flag] == list(dataset)
    places = [place for place, flag in enumerate(flags) if flag]
    assert len(places) == retained_rows(pairs) == math.ceil(pairs / PAIRS_A_TEXT)
    assert places[:-1] == [(PAIRS_A_TEXT + 1) * (number + 1) - 1 for number in range(len(places) - 1)]
    for number, place in enumerate(places):
        text = rows[place]
        assert text["prompt_ids"] + text["chosen_ids"] == texts[number % len(texts)]
        assert len(text["prompt_ids"]) == 1
        assert text["rejected_ids"] == []


@pytest.mark.parametrize("collator", [PackedCollator(), PreferenceCollator(0)])
def test_a_batch_says_which_of_its_rows_are_texts(collator):
    rows = list(with_retained_rows(Dataset.from_list(token_pairs(3)), [[1, 2, 3]]))
    assert collator(rows)[RETAINED] == [False, False, False, True]
    assert RETAINED not in collator(rows[:3])
    assert RETAINED not in collator(token_pairs(3))


# -- texts that the base writes ------------------------------------------------------------------------------------


def test_the_base_writes_texts_of_its_own(monkeypatch):
    """Whatever the adapter says, and again the same; torch's generator stays where it was."""
    monkeypatch.setattr(retention, "TEXT_TOKENS", 12)
    policy, tokenizer = tiny_policy(), tiny_tokenizer()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    texts = retention.own_texts(policy.train(), tokenizer, 20)
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.training
    assert texts == retention.own_texts(tiny_policy(trained=False), tokenizer, 20)
    ends = end_tokens(policy, tokenizer)
    assert len(texts) == 20
    for text in texts:
        assert 2 <= len(text) <= 12
        assert text[0] not in tokenizer.all_special_ids
        assert not set(text[:-1]) & set(ends)
        assert len(text) == 12 or text[-1] in ends
    assert {len(text) for text in texts} != {12}


def test_an_end_token_closes_a_text():
    assert retention._until_end([7, 3, 2, 5], [2, 9], 1) == [7, 3, 2]
    assert retention._until_end([7, 3, 5], [2, 9], 1) == [7, 3, 5]


def test_without_a_file_training_takes_the_bases_own_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "TEXT_TOKENS", 12)
    monkeypatch.setattr(retention, "MOST_TEXTS", 2)
    trainer = text_trainer(retaining(tiny_policy()), tmp_path, token_pairs(9), max_steps=4)
    trainer.train()
    texts = [row for row in trainer.train_dataset if row[RETAINED]]
    assert len(texts) == 3
    assert texts[0] == texts[2] != texts[1]
    assert all(entry[RETAINED_KL] > 0 for entry in trainer.state.log_history if RETAINED_KL in entry)


@pytest.mark.parametrize("options", [{}, {"cache_base_states": "memory"}])
def test_texts_are_added_once(tmp_path, text_file, options):
    trainer = text_trainer(
        retaining(tiny_policy()), tmp_path, token_pairs(9), retention_texts=str(text_file), **options
    )
    for _ in range(2):
        trainer.train()
        assert len(trainer.train_dataset) == 12


def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "TEXT_TOKENS", 12)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2}
    once, resumed = (retaining(tiny_policy(trained=False)) for _ in range(2))
    text_trainer(once, tmp_path, token_pairs(9), **options).train()
    text_trainer(resumed, tmp_path, token_pairs(9), **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    for name, weight in once.adapter_parameters().items():
        torch.testing.assert_close(resumed.adapter_parameters()[name], weight, rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*generation flags")
def test_what_the_base_writes_is_drawn_from_it_alone(monkeypatch):
    """Whatever else its generation config asks for (Qwen 2.5: a repetition penalty)."""
    monkeypatch.setattr(retention, "TEXT_TOKENS", 12)
    policy, tokenizer = tiny_policy(), tiny_tokenizer()
    expected = retention.own_texts(policy, tokenizer, 4)
    asked = {"repetition_penalty": 3.0, "min_p": 0.5, "num_beams": 2, "return_dict_in_generate": True, "top_k": 2}
    for name, value in asked.items():
        setattr(policy.generation_config, name, value)
    assert retention.own_texts(policy, tokenizer, 4) == expected


def test_texts_begin_as_the_tokenizer_begins_them(monkeypatch):
    monkeypatch.setattr(retention, "TEXT_TOKENS", 12)
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "</s>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    assert tokenizer("ab")["input_ids"][0] == 1
    texts = retention.own_texts(tiny_policy(), tokenizer, 8)
    assert all(text[0] == 1 and text[1] not in tokenizer.all_special_ids for text in texts)
    assert max(map(len, texts)) == 12


def test_texts_are_no_longer_than_the_base_can_read(tmp_path, text_file):
    short = tiny_base(max_position_embeddings=16)
    trainer = text_trainer(retaining(tiny_policy(short)), tmp_path, token_pairs(3), retention_texts=str(text_file))
    trainer.train()
    assert max(len(row["prompt_ids"] + row["chosen_ids"]) for row in trainer.train_dataset if row[RETAINED]) == 16
    assert max(map(len, retention.own_texts(tiny_policy(short), tiny_tokenizer(), 8))) <= 16


def test_pairs_of_few_bits_leave_room_for_every_token():
    narrow = Features(dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), List(Value("int8"))))
    rows = with_retained_rows(Dataset.from_list(token_pairs(3), features=narrow), [[300, 40_000]])
    assert rows[3]["chosen_ids"] == [40_000]


def test_a_column_of_the_users_is_not_ours(base, policy, tmp_path):
    expected = expected_metrics(plain_peft(base, policy), token_pairs(4))
    pairs = [pair | {"retained": True} for pair in token_pairs(4)]
    trainer = tiny_trainer(policy, tmp_path, pairs, max_steps=1, per_device_train_batch_size=4)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_an_evaluation_on_what_was_trained_on_counts_no_texts(base, policy, tmp_path, text_file):
    pairs, options = token_pairs(9), {"learning_rate": 0.0, "per_device_eval_batch_size": 5}
    expected = expected_metrics(plain_peft(base, policy), pairs)
    trainer = text_trainer(retaining(policy), tmp_path, pairs, retention_texts=str(text_file), max_steps=1, **options)
    trainer.train()
    found = trainer.evaluate(trainer.train_dataset)
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_a_batch_may_be_filled_by_a_text(tmp_path, text_file):
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": 4, "max_steps": 1}
    trainer = text_trainer(
        retaining(tiny_policy()), tmp_path, token_pairs(3), retention_texts=str(text_file), **options
    )
    assert trainer.train().global_step == 1


# -- refusals ------------------------------------------------------------------------------------------------------


def test_texts_without_a_weight_are_refused(policy, tmp_path, text_file):
    with pytest.raises(ConfigError, match=r"retention_texts = '.*texts.txt', but retention = 0"):
        text_trainer(policy, tmp_path, retention_texts=str(text_file))


def test_a_tokenizer_is_needed(policy, tmp_path):
    with pytest.raises(ConfigError, match="retention needs processing_class"):
        tiny_trainer(retaining(policy), tmp_path)


def test_a_stream_is_refused(policy, tmp_path):
    trainer = QAdapterTrainer(
        model=retaining(policy),
        args=QAdapterTrainingArguments(output_dir=str(tmp_path), max_steps=2, use_cpu=True),
        train_dataset=Dataset.from_list(TEXT_PAIRS).to_iterable_dataset(),
        processing_class=tiny_tokenizer(),
    )
    with pytest.raises(ConfigError, match="retention needs a dataset of known length: leave streaming out"):
        trainer.train()


def test_a_sharded_base_writes_no_texts(policy, tmp_path):
    trainer = text_trainer(retaining(policy), tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(
        ConfigError, match="a sharded base cannot write texts before training: give retention_texts a file"
    ):
        trainer.get_train_dataloader()


@pytest.mark.parametrize("content", [None, b"", b"\n\n  \n\n", b"\xff\xfe\x00", b"x"])
def test_files_without_texts_are_refused(policy, tmp_path, content):
    path = tmp_path / "texts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ConfigError, DataError), match="texts.txt"):
        text_trainer(retaining(policy), tmp_path, retention_texts=str(path))


@pytest.mark.parametrize("value", [None, "", 3])
def test_no_name_of_a_file(tmp_path, value):
    with pytest.raises(ConfigError, match='retention_texts = .*: must be "own" or a file of texts'):
        QAdapterTrainingArguments(output_dir=str(tmp_path), retention_texts=value, use_cpu=True)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, True, "1"])
def test_weights_that_are_none(value):
    with pytest.raises(ConfigError, match="retention = "):
        QAdapterConfig(retention=value)
