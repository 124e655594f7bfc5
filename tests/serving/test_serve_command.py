"""`qadapter serve`: folders in, a server out, and an orderly end."""

import os
import re
import signal
import subprocess
import sys

import openai
import pytest
from models import APART, lora, tiny_tokenizer, train_randomly
from served import PATIENCE, RunningServer, chat, dial, endless_base, greedy_text, prompt_ids_of

import qadapter
from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.cli.serve import load_models, run, served_names
from qadapter.errors import ConfigError
from qadapter.export import export_lora
from qadapter.modeling.wrapping import wrap

COMMAND = "import sys; from qadapter.cli.serve import run; sys.exit(run(sys.argv[1:]))"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapter folders on one base that is on disk."""
    root = tmp_path_factory.mktemp("adapters")
    endless_base().save_pretrained(root / "tiny")
    tiny_tokenizer().save_pretrained(root / "tiny")
    for number, (name, config) in enumerate({"formal-v1.2": APART, "concise": QAdapterConfig()}.items()):
        policy = QAdapterForCausalLM.from_base(str(root / "tiny"), config, lora())
        train_randomly(policy, seed=number).save_pretrained(root / name, tokenizer=tiny_tokenizer())
    return [str(root / "formal-v1.2"), str(root / "concise")]


def test_several_folders_become_one_model_with_named_adapters(folders):
    model, tokenizer, models = load_models(dict(zip(served_names(folders), folders, strict=True)), None, True)
    assert list(models) == ["formal-v1.2", "concise"]
    assert sorted(adapter for weights in models.values() for adapter in weights) == model.adapters
    assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"


def test_one_folder_is_served_with_its_stored_weights(folders):
    _, _, models = load_models({"concise": folders[1]}, None, True)
    assert models == {"concise": {"default": 1.0}}


def test_a_folder_keeps_its_stored_weight_beside_another(folders, tmp_path):
    policy = QAdapterForCausalLM.from_pretrained(folders[1])
    policy.adapter_weights = {"default": 0.25}
    policy.save_pretrained(tmp_path / "faint", tokenizer=tiny_tokenizer())
    _, _, models = load_models({"faint": str(tmp_path / "faint"), "formal": folders[0]}, None, True)
    assert [list(weights.values()) for weights in models.values()] == [[0.25], [1.0]]


def test_a_wrapped_lora_is_served_beside_a_trained_adapter(folders, tmp_path):
    export_lora(QAdapterForCausalLM.from_pretrained(folders[1]), tmp_path / "lora", tiny_tokenizer())
    policy, tokenizer = wrap(tmp_path / "lora")
    policy.save_pretrained(tmp_path / "wrapped", tokenizer=tokenizer)
    model, tokenizer, models = load_models({"wrapped": str(tmp_path / "wrapped"), "formal": folders[0]}, None, True)
    server = RunningServer(model, tokenizer, models)
    try:
        with server.client() as client:
            half, mixed = (
                chat(client, "hello", "wrapped", temperature=0, max_tokens=12, extra_body=dial(**options))
                for options in ({"strength": 0.5}, {"weights": {"wrapped": 0.6, "formal": 0.5}})
            )
    finally:
        server.stop()
    prompt = prompt_ids_of("hello")
    assert half.choices[0].message.content == greedy_text(policy, prompt, 12, strength=0.5)
    expected = greedy_text(model, prompt, 12, adapter_weights=dict(zip(model.adapters, (0.6, 0.5), strict=True)))
    assert mixed.choices[0].message.content == expected


def test_two_folders_of_one_name_are_refused():
    with pytest.raises(ConfigError, match=r"several adapters are called \['polite'\]"):
        served_names(["a/polite", "b/polite", "c"])


def test_a_folder_called_base_is_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="an adapter is called 'base', which is the base model's name here"):
        served_names(["a/polite", "b/base"])


def test_the_name_is_the_last_part_of_folder_or_hub_id(folders, monkeypatch):
    monkeypatch.chdir(folders[1])
    assert served_names(["user/polite", "out/terse/", "."]) == ["polite", "terse", "concise"]
    assert served_names(["adapters/.."]) == ["concise"]


def test_missing_packages_are_named_with_the_way_out(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("qadapter.serving", "fastapi"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(qadapter, "serving", raising=False)  # which another import puts another module in the place of
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ConfigError, match=r"pip install 'qadapter\[serve\]'"):
        run(["anything"])


def test_the_command_serves_interpolated_weights(folders):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, folders[1], "--port", "0", "--dtype", "float32", "--interpolation", "weights"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        ready = process.stdout.readline()
        assert ready.startswith("Serving base, concise at"), process.stderr.read()
        url = re.search(r"http://\S+", ready).group()
        with openai.OpenAI(base_url=url, api_key="none", timeout=PATIENCE, max_retries=0) as client:
            answer = chat(client, "hello", "concise", temperature=0, max_tokens=12, extra_body=dial(strength=2.5))
        policy, _, _ = load_models({"concise": folders[1]}, None, True)
        options = {"strength": 2.5, "interpolation": "weights"}
        assert answer.choices[0].message.content == greedy_text(policy, prompt_ids_of("hello"), 12, **options)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_the_command_serves_until_told_to_stop_and_lets_answers_end(folders):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *folders, "--port", "0", "--dtype", "float32"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "QADAPTER_API_KEY": "sesame", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        ready = process.stdout.readline()
        assert ready.startswith("Serving base, formal-v1.2, concise at http://127.0.0.1:"), process.stderr.read()
        url = re.search(r"http://\S+", ready).group()
        with openai.OpenAI(base_url=url, api_key="sesame", timeout=PATIENCE, max_retries=0) as client:
            messages = [{"role": "user", "content": "hello"}]
            options = {"model": "concise", "messages": messages, "temperature": 0}
            answer = client.chat.completions.create(**options, max_tokens=12)
            policy, _, _ = load_models({"concise": folders[1]}, None, True)
            assert answer.choices[0].message.content == greedy_text(policy, prompt_ids_of("hello"), 12)
            stream = client.chat.completions.create(**options, max_tokens=500, stream=True)
            next(stream)
            process.send_signal(signal.SIGTERM)
            assert list(stream)[-1].choices[0].finish_reason == "length"
        assert process.wait(PATIENCE) == 0
        log = process.stderr.read()
        assert "POST /v1/chat/completions 200" in log
        assert "Traceback" not in log
    finally:
        process.kill()
        process.communicate()
