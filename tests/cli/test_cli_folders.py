"""`qadapter info`, `qadapter data check` and `qadapter wrap`: what lies in files and folders."""

import json
import shutil
import warnings

import pytest
import torch
from commands import PROMPT, SHORT, adapter_settings, assert_refused, greedy_answer, qadapter, succeeded
from models import lora, tiny_base, train_randomly
from peft import get_peft_model
from transformers import AutoTokenizer


def test_info_describes_the_adapter(adapter, base):
    lines = dict(line.split(maxsplit=1) for line in succeeded(qadapter("info", adapter)).splitlines())
    assert lines["base"] == str(base)
    assert "parametrisation residual, alpha_tilde 0.1" in lines["adapters"]


def test_info_counts_the_adapters_parameters(adapter):
    """Seven projections in each of two layers, of rank 8: r (in + out) numbers each, four bytes a number."""
    attention, mlp = [(32, 32), (32, 16), (32, 16), (32, 32)], [(32, 48), (32, 48), (48, 32)]
    expected = 2 * sum(8 * (inputs + outputs) for inputs, outputs in attention + mlp)
    facts = adapter_settings(adapter)
    assert (facts["rank"], facts["modules"], facts["parameters"]) == (8, 14, expected)
    assert facts["bytes"] > 4 * expected


def test_info_refuses_weights_that_have_changed(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "changed")
    weights = folder / "adapters/default/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert_refused(qadapter("info", folder), "the weights of adapter 'default' have changed since they were saved")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        described = qadapter("info", folder, "--no-verify")
    assert "adapters" in succeeded(described)
    assert described.err.startswith("warning: ")
    assert described.err.endswith("the weights of adapter 'default' have changed since they were saved.\n")


def test_data_check_accepts_good_pairs(pairs):
    assert succeeded(qadapter("data", "check", pairs)).endswith("ok: the data can be trained on\n")


def test_data_check_with_a_model_shows_what_is_trained(pairs, base):
    outcome = qadapter("data", "check", pairs, "--model", base, "--json")
    assert outcome.err == ""  # no progress bar where nobody watches
    report = json.loads(succeeded(outcome))
    assert report["unit"] == "tokens"
    assert report["examples"][0]["prompt"] == "user: Question 0?</s>assistant: "
    assert report["examples"][0]["chosen"] == "Yes, 0.</s>"


def test_data_check_of_a_bad_file_lists_the_faults_and_exits_with_1(write_pairs):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": ""},
    ]
    outcome = qadapter("data", "check", write_pairs(rows), "--json")
    report = json.loads(outcome.out)
    assert outcome.code == 1
    assert (report["ok"], report["identical_pairs"], report["empty_answers"]) == (False, [2], [3])


def test_data_check_takes_column_names(write_pairs):
    path = write_pairs([{"q": "a", "good": "b", "bad": "c"}])
    names = ("prompt=q", "chosen=good", "rejected=bad")
    apart = (text for name in names for text in ("--columns", name))
    for columns in (("--columns", *names), apart):
        assert json.loads(succeeded(qadapter("data", "check", path, "--json", *columns)))["pairs"] == 1


def test_train_takes_column_names(train, write_pairs):
    path = write_pairs([{"q": "a", "good": "b", "bad": "c"}])
    succeeded(train("--columns", "prompt=q", "chosen=good", "rejected=bad", dataset=path))


@pytest.fixture
def peft_lora(tmp_path, base):
    """The folder of a plain LoRA that PEFT itself has saved."""
    model = get_peft_model(tiny_base(max_position_embeddings=512, eos_token_id=1), lora())
    train_randomly(model)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora", model.eval()


def test_a_wrapped_lora_answers_as_peft_does(peft_lora, base, tmp_path):
    folder, model = peft_lora
    succeeded(qadapter("wrap", folder, "--output-dir", tmp_path / "wrapped"))
    ids = AutoTokenizer.from_pretrained(base)(f"user: {PROMPT}</s>assistant: ", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    expected = AutoTokenizer.from_pretrained(base).decode(output, skip_special_tokens=True).strip()
    outcome = qadapter("generate", tmp_path / "wrapped", "--prompt", PROMPT, *SHORT)
    assert succeeded(outcome).strip() == expected != greedy_answer(base, PROMPT)


def test_wrap_suggests_what_the_base_can_do(peft_lora, plain_base, tmp_path):
    chat = succeeded(qadapter("wrap", peft_lora[0], "--output-dir", tmp_path / "chat"))
    plain = ("--base-model", plain_base, "--output-dir", tmp_path / "plain")
    assert "try: qadapter chat" in chat
    assert "try: qadapter generate" in succeeded(qadapter("wrap", peft_lora[0], *plain))


@pytest.mark.parametrize("given", [True, False])
def test_wrap_remembers_a_base_by_its_whole_path(peft_lora, base, tmp_path, monkeypatch, given):
    """Given to the command, or named by the LoRA."""
    monkeypatch.chdir(base.parent)
    path = peft_lora[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base.name}))
    options = ("--base-model", base.name) if given else ()
    succeeded(qadapter("wrap", peft_lora[0], *options, "--output-dir", tmp_path / "wrapped"))
    facts = json.loads(succeeded(qadapter("info", tmp_path / "wrapped", "--json")))
    assert facts["base"] == str(base)


def test_wrap_overwrites_nothing(peft_lora, tmp_path):
    folder, _ = peft_lora
    assert_refused(qadapter("wrap", folder, "--output-dir", folder), "lora exists and is not empty", folder=folder)


@pytest.mark.parametrize("command", ["chat", "generate", "info"])
def test_a_plain_lora_is_refused_with_the_way_to_wrap_it(peft_lora, command):
    folder, _ = peft_lora
    way_out = f"is a plain PEFT adapter.*`qadapter wrap {folder} --output-dir NEW`"
    assert_refused(qadapter(command, folder, stdin="Hi\n"), way_out)
