"""What is in the adapter folder, who else reads it, and that a save which fails leaves no half adapter."""

import errno
import json
import os
import shutil

import pytest
import torch
from models import APART, defined_logps, plain_peft, tiny_base, tiny_tokenizer, train_randomly, two_passes
from peft import AutoPeftModelForCausalLM, PeftModel
from saved_adapters import ADAPTER_FILES, BATCH, REAL, TOKENIZER_FILES, WEIGHTS, build, files_in, load, logits_of
from transformers import AutoModelForCausalLM

from qadapter import QAdapterForCausalLM
from qadapter.errors import AdapterFormatError, ConfigError
from qadapter.modeling import checkpoint
from qadapter.modeling.loading import tokenizer_of
from qadapter.modeling.manifest import MANIFEST_NAME

# -- layout --------------------------------------------------------------------------------------------------------


def test_folder_holds_exactly_the_documented_files(folder):
    assert files_in(folder) == ADAPTER_FILES | TOKENIZER_FILES


def test_folder_without_a_tokenizer_holds_the_adapter_alone(tmp_path):
    build(tmp_path)
    assert files_in(tmp_path / "out") == ADAPTER_FILES


def test_peft_reads_the_inner_folder_as_a_plain_lora(policy, original, folder):
    inner = folder / "adapters" / "default"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(original[1] / "base"), inner)
    z_theta, z_base = two_passes(plain_peft(tiny_base(), policy), **BATCH)
    torch.testing.assert_close(plain(**BATCH).logits.double().detach(), z_theta, rtol=1e-5, atol=1e-5)
    expected = defined_logps(z_theta, z_base, APART)
    actual = logits_of(load(folder)).double().log_softmax(-1)
    torch.testing.assert_close(actual[REAL], expected[REAL], rtol=1e-4, atol=1e-4)
    assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(inner)(**BATCH).logits, plain(**BATCH).logits)


def test_transformers_does_not_load_the_folder_as_a_model(folder):
    with pytest.raises((OSError, ValueError), match=r"config\.json|Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_peft_does_not_load_the_folder_as_a_lora(folder):
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(tiny_base(), folder)


# -- saving --------------------------------------------------------------------------------------------------------


def test_saving_twice_to_one_folder_keeps_the_second(policy, folder):
    other = train_randomly(load(folder), seed=8)
    other.save_pretrained(folder)
    assert torch.equal(logits_of(load(folder)), logits_of(other))
    assert not torch.equal(logits_of(other), logits_of(policy))
    assert files_in(folder) == ADAPTER_FILES | TOKENIZER_FILES


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


NAMED_TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}", "a": "{{ 1 }}"}


@pytest.mark.parametrize("template", [None, "{{ messages }}", NAMED_TEMPLATES])
@pytest.mark.parametrize("earlier", [None, "{{ bos_token }}", NAMED_TEMPLATES | {"more": "{{ 2 }}"}])
def test_saving_leaves_no_chat_template_of_an_earlier_tokenizer(tmp_path, earlier, template):
    policy = build(tmp_path)
    policy.save_pretrained(tmp_path / "out", tokenizer=tokenizer_with(earlier))
    policy.save_pretrained(tmp_path / "out", tokenizer=tokenizer_with(template))
    load(tmp_path / "out")  # which compares the folder's template with that of the last tokenizer
    assert tokenizer_of(tmp_path / "out", policy.base_source).chat_template == template


def no_space(tensors, path, metadata=None):
    with open(path, "wb") as file:
        file.write(b"half a fi")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_failing_save_leaves_nothing_behind(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        policy.save_pretrained(tmp_path / "new")
    assert files_in(tmp_path / "new") == set()


def test_failing_save_leaves_an_existing_adapter_whole(policy, folder, monkeypatch):
    before = {name: (folder / name).read_bytes() for name in files_in(folder)}
    monkeypatch.setattr(checkpoint, "save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        train_randomly(load(folder), seed=8).save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in files_in(folder)} == before
    assert torch.equal(logits_of(load(folder)), logits_of(policy))


@pytest.mark.parametrize("moves", range(5))
def test_save_that_dies_while_moving_files_leaves_no_adapter_rather_than_a_mixed_one(folder, moves, monkeypatch):
    other = train_randomly(load(folder), seed=8)
    done = []

    def replace(source, target):
        if os.path.dirname(target) in (str(folder), str(folder / "adapters")):
            if len(done) == moves:
                raise OSError(errno.EIO, "Input/output error")
            done.append(target)
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", replace)
        with pytest.raises(OSError, match="Input/output error"):
            other.save_pretrained(folder, tokenizer=tiny_tokenizer())
    with pytest.raises(AdapterFormatError, match="is not an adapter folder"):
        load(folder)
    other.save_pretrained(folder, tokenizer=tiny_tokenizer())
    assert torch.equal(logits_of(load(folder)), logits_of(other))


def test_saving_onto_a_file_is_refused(policy, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="is a file: an adapter is a folder"):
        policy.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_saving_keeps_other_files_of_the_folder(policy, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    policy.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def lora_files(folder):
    """Write somebody's LoRA, with notes and a checkpoint; its files by their paths."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "notes.txt", "checkpoint-5/optimizer.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    return contents(folder)


def contents(folder):
    return {name: (folder / name).read_text() for name in files_in(folder)}


@pytest.mark.parametrize("saved_before", [False, True])
def test_saving_keeps_somebodys_loras_under_adapters(policy, tmp_path, saved_before):
    if saved_before:
        policy.save_pretrained(tmp_path)
    mine = lora_files(tmp_path / "adapters" / "my-lora")
    policy.save_pretrained(tmp_path)
    assert contents(tmp_path / "adapters" / "my-lora") == mine
    load(tmp_path)


def test_somebodys_lora_in_the_way_of_an_adapter_is_renamed_and_named(policy, tmp_path, caplog):
    for number in (1, 2):
        mine = lora_files(tmp_path / "adapters" / "default")
        policy.save_pretrained(tmp_path)
        assert contents(tmp_path / "adapters" / f"default.old{number}") == mine
        assert f"default was there and is of no adapter known here: it is default.old{number} now" in caplog.text
        load(tmp_path)
        (tmp_path / MANIFEST_NAME).unlink()
        shutil.rmtree(tmp_path / "adapters" / "default")


def test_saving_removes_an_earlier_adapter_of_another_name(folder):
    other = QAdapterForCausalLM.from_pretrained(load(folder).base_source.path, adapters={"polite": folder})
    other.save_pretrained(folder)
    assert [path.name for path in (folder / "adapters").iterdir()] == ["polite"]


@pytest.mark.parametrize("name", ["..", "../../theirs", "default/..", "/"])
def test_names_in_the_manifest_that_lead_elsewhere_are_not_removed(policy, folder, tmp_path, name):
    theirs = lora_files(tmp_path / "theirs")
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["adapters"][name] = manifest["adapters"]["default"] | {"path": f"adapters/{name}"}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    policy.save_pretrained(folder)
    assert contents(tmp_path / "theirs") == theirs
    load(folder)


def test_adapters_that_is_a_link_is_refused_and_left_as_it_is(policy, tmp_path):
    theirs = lora_files(tmp_path / "theirs" / "default")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapters").symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="out/adapters is a link or a file, .*: choose another folder"):
        policy.save_pretrained(tmp_path / "out")
    assert contents(tmp_path / "theirs" / "default") == theirs


def test_an_adapter_that_was_made_a_link_is_renamed_and_what_it_leads_to_stays(policy, folder, tmp_path):
    shutil.rmtree(folder / "adapters" / "default")
    theirs = lora_files(tmp_path / "theirs")
    (folder / "adapters" / "default").symlink_to(tmp_path / "theirs")
    policy.save_pretrained(folder)
    assert contents(tmp_path / "theirs") == theirs
    load(folder)


def test_gathered_state_dict_is_saved_like_the_model_itself(policy, tmp_path):
    policy.save_pretrained(tmp_path / "own")
    policy.save_pretrained(tmp_path / "gathered", state_dict=policy.state_dict())
    assert (tmp_path / "gathered" / WEIGHTS).read_bytes() == (tmp_path / "own" / WEIGHTS).read_bytes()


def test_gathered_state_dict_without_the_adapter_is_refused(policy, tmp_path):
    with pytest.raises(ConfigError, match=r"the state_dict lacks \d+ tensors of the adapter 'default', first "):
        policy.save_pretrained(tmp_path, state_dict={})
    assert files_in(tmp_path) == set()
