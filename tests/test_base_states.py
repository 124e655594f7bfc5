"""The base's states kept over the epochs: same loss and gradients as without, and refusals where they do not belong."""

import json

import pytest
import torch
from datasets import Dataset
from models import FAST_PATHS, lora, tiny_base, tiny_policy, tiny_trainer, token_pairs
from safetensors.torch import save_file
from transformers import Trainer

from qadapter import QAdapterConfig
from qadapter.base_states import (
    MANIFEST,
    BaseStatesCollator,
    check_size,
    estimated_bytes,
    keep_base_states,
)
from qadapter.data import PackedCollator, PreferenceCollator
from qadapter.data.tokenisation import pairs_digest
from qadapter.errors import ConfigError
from qadapter.modeling.packed import enable_packing

ARCHITECTURES = [*FAST_PATHS, "gpt_neox"]
UPPER = lora(target_modules=["v_proj", "down_proj"], layers_to_transform=[2, 3])


def upper_policy(architecture="llama", dtype=torch.float64, **options):
    base = tiny_base(architecture, dtype=dtype, num_hidden_layers=4)
    return tiny_policy(base, peft_config=UPPER if architecture != "gpt_neox" else None, **options)


def collator_of(policy, packing):
    if packing:
        assert enable_packing(policy.base)
        return PackedCollator()
    return PreferenceCollator(pad_token_id=0)


def loss_and_gradients(policy, batch):
    policy.zero_grad()
    statistics = policy(**batch)
    (statistics.logits.sum() - 0.3 * statistics.lse.square().sum()).backward()
    return statistics, {name: p.grad.clone() for name, p in policy.adapter_parameters().items()}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kept", ["memory", "folder"])
def test_statistics_and_gradients_equal_those_of_a_pass_of_the_base(architecture, packing, kept, tmp_path, monkeypatch):
    monkeypatch.setattr("qadapter.base_states.SHARD_PAIRS", 4)
    policy, pairs = upper_policy(architecture), Dataset.from_list(token_pairs(7))
    collator = collator_of(policy, packing)
    where = "memory" if kept == "memory" else str(tmp_path / "states")
    states = keep_base_states(policy, pairs, collator, where, batch_pairs=3)
    chosen = [6, 0, 4, 3]  # not the batches that the states come from
    expected, gradients = loss_and_gradients(policy, collator([pairs[i] for i in chosen]))
    monkeypatch.setattr(policy, "base_pass", None)  # must not be called
    batch = BaseStatesCollator(collator)([states[i] for i in chosen])
    assert ("trunk_states" in batch) == (architecture != "gpt_neox") == (policy.shared_layers > 0)
    actual, again = loss_and_gradients(policy, batch)
    for name, values, others in zip(actual._fields, actual, expected, strict=True):
        torch.testing.assert_close(values, others, rtol=1e-6, atol=1e-8, msg=name)
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("architecture", FAST_PATHS)
def test_states_of_a_base_in_bfloat16_give_the_very_same(architecture, packing, tmp_path):
    """Kept as computed: from a batch of the same pairs, which rounds alike, nothing differs by a bit."""
    policy, pairs = upper_policy(architecture, torch.bfloat16), Dataset.from_list(token_pairs(4))
    collator = collator_of(policy, packing)
    states = keep_base_states(policy, pairs, collator, str(tmp_path / "states"), batch_pairs=4)
    expected, gradients = loss_and_gradients(policy, collator(list(pairs)))
    batch = BaseStatesCollator(collator)([states[i] for i in range(4)])
    assert batch["trunk_states"].dtype == torch.bfloat16
    actual, again = loss_and_gradients(policy, batch)
    assert all(torch.equal(*both) for both in zip(actual, expected, strict=True))
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("packing", [True, False])
def test_training_is_the_same_and_the_base_runs_once_a_pair(tmp_path, packing):
    losses, passes = {}, {}
    for where in (None, "memory", str(tmp_path / "states")):
        policy = upper_policy(config=QAdapterConfig(beta=1.0))
        count = [0]
        whole = type(policy).base_pass

        def counted(*args, policy=policy, count=count, whole=whole, **kwargs):
            count[0] += 1
            return whole(policy, *args, **kwargs)

        policy.base_pass = counted
        trainer = tiny_trainer(
            policy, tmp_path / f"run-{len(losses)}", token_pairs(6), max_steps=-1,
            per_device_train_batch_size=2, num_train_epochs=3,
            logging_steps=1, learning_rate=1e-2, packing=packing, cache_base_states=where,
        )  # fmt: skip
        trainer.train()
        losses[where] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        passes[where] = count[0]
    without, *cached = losses.values()
    assert without[0] != pytest.approx(without[-1], abs=1e-3)
    assert all(found == pytest.approx(without, rel=1e-6) for found in cached)
    assert list(passes.values()) == [9, 3, 3]


def test_states_are_kept_as_mixed_precision_computes_them(tmp_path):
    """A new adapter says what the base says, and does so only if both have computed in the same precision."""
    policy = tiny_policy(tiny_base(num_hidden_layers=4), QAdapterConfig(), UPPER, trained=False)
    folder = tmp_path / "states"
    trainer = tiny_trainer(policy, tmp_path / "run", max_steps=1, bf16=True, cache_base_states=str(folder))
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["qadapter/kl"] == pytest.approx(0, abs=1e-6)
    twin = tiny_trainer(policy, tmp_path / "run", max_steps=1, cache_base_states=str(folder))
    with pytest.raises(ConfigError, match=r"different: dtype\)"):
        twin.train()


def folder_of_states(tmp_path, policy=None, pairs=None, packing=True):
    policy, folder = policy or upper_policy(), tmp_path / "states"
    pairs = pairs or Dataset.from_list(token_pairs(6))
    return keep_base_states(policy, pairs, collator_of(policy, packing), str(folder), batch_pairs=2), folder


def test_a_folder_that_holds_all_is_only_read(tmp_path):
    """Several processes that come to it at once would be in each other's way."""
    _, folder = folder_of_states(tmp_path)
    written = {path: path.stat().st_ino for path in folder.iterdir()}
    folder_of_states(tmp_path)
    assert {path: path.stat().st_ino for path in folder.iterdir()} == written


@pytest.mark.parametrize("disabled", [True, False])
def test_disable_tqdm_leaves_out_this_bar_too(tmp_path, disabled, capfd):
    pairs = token_pairs(3)
    tiny_trainer(
        upper_policy(), tmp_path / "run", pairs, max_steps=1, packing=True, cache_base_states="memory",
        disable_tqdm=disabled,
    ).train()  # fmt: skip
    assert ("base states" in capfd.readouterr().err) is not disabled


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow"])
def test_the_format_of_a_dataset_changes_no_states(tmp_path, kind):
    _, folder = folder_of_states(tmp_path)
    written = {path: path.stat().st_ino for path in folder.iterdir()}
    formatted = Dataset.from_list(token_pairs(6)).with_format(kind)
    states, _ = folder_of_states(tmp_path, pairs=formatted)
    assert states[0]["prompt_ids"] == token_pairs(6)[0]["prompt_ids"]
    assert {path: path.stat().st_ino for path in folder.iterdir()} == written


def test_a_second_run_reads_what_the_first_has_written(tmp_path, monkeypatch):
    monkeypatch.setattr("qadapter.base_states.SHARD_PAIRS", 2)
    first, _ = folder_of_states(tmp_path)
    policy = upper_policy()
    monkeypatch.setattr(policy, "base_pass", None)
    second, _ = folder_of_states(tmp_path, policy)
    assert torch.equal(first[5]["base_trunk"], second[5]["base_trunk"])


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("qadapter.base_states.SHARD_PAIRS", 2)
    policy = upper_policy()
    whole, calls = policy.base_pass, []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(policy, "base_pass", stops)
    with pytest.raises(KeyboardInterrupt):
        folder_of_states(tmp_path, policy)
    assert len(list((tmp_path / "states").glob("*.safetensors"))) == 2
    folder_of_states(tmp_path, policy)
    assert len(calls) == 4


OTHER_POSITIONS = {"rope_type": "default", "rope_theta": 100.0}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("pairs", "pairs"),
        ("base", "base"),
        ("one weight", "base"),
        ("order", "base"),
        ("positions", "base"),
        ("buffer", "base"),
        ("layer", "shared_layers"),
        ("dtype", "base, dtype"),
        ("attention", "attention, packed"),
        ("packing", "packed"),
    ],
)
def test_states_of_something_else_are_refused(tmp_path, change, named):
    folder_of_states(tmp_path)
    base = tiny_base("llama", dtype=torch.float64, num_hidden_layers=4)
    pairs = Dataset.from_list(token_pairs(6))
    layers = UPPER
    if change == "pairs":
        pairs = pairs.select([1, 0, 2, 3, 4, 5])
    elif change == "base":
        base.get_input_embeddings().weight.data.mul_(1.5)
    elif change == "one weight":
        base.get_input_embeddings().weight.data[7, 5] *= 1 + 1e-9
    elif change == "order":
        weight = base.get_input_embeddings().weight.data
        weight[[3, 4]] = weight[[4, 3]]
    elif change == "positions":
        changed = tiny_base("llama", dtype=torch.float64, num_hidden_layers=4, rope_parameters=OTHER_POSITIONS)
        changed.load_state_dict(base.state_dict())
        base = changed
    elif change == "buffer":  # of the rotary embedding, with the config as it was
        base.model.rotary_emb.inv_freq.mul_(1.01)
    elif change == "layer":
        layers = lora(target_modules=["v_proj"], layers_to_transform=[3])
    elif change == "packing":
        enable_packing(base)
    elif change == "dtype":
        base = base.float()
    packing = change not in ("attention", "packing")
    with pytest.raises(ConfigError, match=rf"different: {named}\).*another folder"):
        folder_of_states(tmp_path, tiny_policy(base, peft_config=layers), pairs, packing)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=f"no readable {MANIFEST}"):
        folder_of_states(tmp_path)
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["thesis.txt"]


def test_a_damaged_file_is_named(tmp_path):
    states, folder = folder_of_states(tmp_path)
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(b"\x80\x04 not tensors")
    with pytest.raises(ConfigError, match=r"pairs-00000000.safetensors cannot be read.*remove its folder"):
        states[0]


def test_manifest_that_is_no_object_is_refused(tmp_path):
    _, folder = folder_of_states(tmp_path)
    (folder / MANIFEST).write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="Give another"):
        folder_of_states(tmp_path)


def test_estimate_is_the_size_on_disk(tmp_path):
    policy, pairs = upper_policy(), Dataset.from_list(token_pairs(6))
    _, folder = folder_of_states(tmp_path, policy, pairs)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert estimated_bytes(policy, pairs) == pytest.approx(size, abs=2048)  # headers


def test_what_does_not_fit_is_refused_with_its_size(tmp_path, monkeypatch):
    policy, pairs = upper_policy(), Dataset.from_list(token_pairs(6))
    monkeypatch.setattr("qadapter.base_states.USABLE_SHARE", 1e-12)
    with pytest.raises(ConfigError, match=r"6 pairs take 0\.\d MiB.*free in memory.*give a folder"):
        check_size(policy, pairs, 1.0, None)
    with pytest.raises(ConfigError, match=f"free in {tmp_path}"):
        check_size(policy, pairs, 1.0, tmp_path)


def test_streamed_pairs_are_refused():
    stream = Dataset.from_list(token_pairs(6)).to_iterable_dataset()
    with pytest.raises(ConfigError, match="known length"):
        keep_base_states(upper_policy(), stream, PackedCollator(), "memory", 2)


def test_padded_rows_on_the_left_hold_the_states_too():
    policy, pairs = upper_policy(), Dataset.from_list(token_pairs(5))
    left = PreferenceCollator(pad_token_id=0, padding_side="left")
    states = keep_base_states(policy, pairs, left, "memory", 2)
    rows = [states[i] for i in range(5)]
    batch = BaseStatesCollator(left)(rows)
    expected = policy(**left(list(pairs)))
    torch.testing.assert_close(policy(**batch).lse, expected.lse, rtol=1e-6, atol=1e-8)


def test_states_of_other_tokens_are_refused(tmp_path):
    states, folder = folder_of_states(tmp_path)
    (path,) = folder.glob("*.safetensors")
    save_file({"0.base_final": torch.zeros(1, 32)}, path)
    with pytest.raises(ConfigError, match=r"states of pair 0 in .*are not of its tokens: remove its folder"):
        states[0]


def test_states_that_do_not_fit_leave_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("qadapter.base_states.USABLE_SHARE", 1e-12)
    with pytest.raises(ConfigError, match="may be used"):
        folder_of_states(tmp_path / "deep")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("option", [{"cache_base_states": "memory"}, {"micro_batch_tokens": 64}])
def test_sharded_training_is_refused(tmp_path, monkeypatch, option):
    create = Trainer.create_accelerator_and_postprocess

    def sharded(self):
        create(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    (name,) = option
    with pytest.raises(ConfigError, match=f"{name} = .*: not with FSDP or DeepSpeed"):
        tiny_trainer(upper_policy(), tmp_path / "new" / "run", **option)
    assert not (tmp_path / "new").exists()


def test_memory_of_one_process_is_refused_to_several(tmp_path, monkeypatch):
    trainer = tiny_trainer(upper_policy(), tmp_path, cache_base_states="memory")
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ConfigError, match="with several processes: give a folder"):
        trainer.get_train_dataloader()


def test_the_digest_is_of_the_pairs_however_they_are_stored():
    def shortened(rows):
        return {**rows, "chosen_ids": [ids[:1] for ids in rows["chosen_ids"]]}

    pairs = Dataset.from_list(token_pairs(6))
    assert pairs_digest(pairs.with_format("torch")) == pairs_digest(pairs)
    assert pairs_digest(pairs.select([*range(6)])) == pairs_digest(pairs)
    assert pairs_digest(pairs.select([1, 0, *range(2, 6)])) != pairs_digest(pairs)
    # A transform makes the rows.
    short = Dataset.from_list([{**pair, "chosen_ids": pair["chosen_ids"][:1]} for pair in token_pairs(6)])
    assert pairs_digest(pairs.with_transform(shortened)) == pairs_digest(short.with_transform(dict))
    assert pairs_digest(pairs.with_transform(shortened)) != pairs_digest(pairs.with_transform(dict))
