"""`qadapter wrap` on folders laid out as other trainers write them; PEFT's own reading of each is the oracle."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from commands import assert_refused, qadapter, succeeded
from foreign_folders import (
    AXOLOTL_0_9,
    CONFIGS,
    LLAMA_FACTORY_FILES,
    LLAMA_FACTORY_TEMPLATE,
    PEFT_0_6,
    PEFT_0_15,
    save_tokenizer,
    save_with_base,
    write_lora,
    write_model_config,
    write_tokenizer,
)
from models import token_ids
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapter import QAdapterForCausalLM
from qadapter.export import export_lora
from qadapter.modeling import hub, wrapping
from qadapter.modeling.bases import BaseSource, load_base
from qadapter.modeling.wrapping import wrap

IDS = torch.tensor(token_ids(9, 9))
GREEDY = {"do_sample": False, "max_new_tokens": 20}


@pytest.fixture(params=CONFIGS)
def foreign(request, base, tmp_path):
    """A folder as one of the trainers writes it."""
    trainer, folder = request.param, tmp_path / "foreign"
    dtype = torch.bfloat16 if trainer == "LLaMA-Factory" else torch.float32
    tensors = write_lora(folder, base, CONFIGS[trainer], dtype)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    if trainer.endswith("trained"):
        save_tokenizer(folder, base, LLAMA_FACTORY_TEMPLATE if "LLaMA" in trainer else None)
    else:
        write_tokenizer(folder, base, "PreTrainedTokenizer" if "0.9" in trainer else "PreTrainedTokenizerFast")
    if trainer == "axolotl 0.19, trained":
        save_with_base(folder, base, tensors)
    elif trainer.startswith("axolotl"):
        write_model_config(folder, base, bits=8 if "0.9" in trainer else 4)
        (folder / "checkpoint-20").mkdir()
    if trainer == "axolotl 0.4":
        (folder / "adapter_model.bin").write_bytes(b"a pickle")
        (folder / "added_tokens.json").write_text('{"<pad>": 0}')
    if trainer.startswith("LLaMA-Factory"):
        for name in LLAMA_FACTORY_FILES:
            (folder / name).write_text("{}\n")
    return folder


def test_a_foreign_folder_is_peft_s_model_at_strength_1_and_the_base_at_0(foreign, base, tmp_path):
    succeeded(qadapter("wrap", foreign, "--base-model", base, "--output-dir", tmp_path / "wrapped"))
    policy = QAdapterForCausalLM.from_pretrained(tmp_path / "wrapped")
    plain = AutoModelForCausalLM.from_pretrained(base)
    expected_base = plain.generate(IDS, **GREEDY)
    expected = PeftModel.from_pretrained(plain, foreign).eval().generate(input_ids=IDS, **GREEDY)
    assert torch.equal(policy.generate(IDS, **GREEDY), expected)
    assert torch.equal(policy.generate(IDS, strength=0.0, **GREEDY), expected_base)
    assert not torch.equal(expected, expected_base)
    wrapped, original = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "wrapped", foreign))
    assert wrapped.chat_template == original.chat_template is not None
    assert wrapped("Question 3?</s>").input_ids == original("Question 3?</s>").input_ids


def test_the_returns_of_a_wrapped_lora_are_dpo_s_implied_reward(base, tmp_path):
    write_lora(tmp_path / "foreign", base, PEFT_0_15 | {"target_modules": ["q_proj"]})
    policy, _ = wrap(tmp_path / "foreign", base)
    mask = torch.zeros_like(IDS)
    mask[:, 3:] = 1
    logps, base_logps = (
        policy(input_ids=IDS, strength=strength).logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).squeeze(-1)
        for strength in (1.0, 0.0)
    )
    alpha = policy.configs["default"].alpha_tilde
    expected = alpha * ((logps - base_logps) * mask[:, 1:]).sum(-1)
    torch.testing.assert_close(policy.score(IDS, torch.ones_like(IDS), mask).returns, expected, rtol=1e-4, atol=1e-5)


def test_a_wrapped_folder_is_mixed_with_a_trained_one(base, adapter, tmp_path):
    write_lora(tmp_path / "foreign", base, AXOLOTL_0_9)
    succeeded(qadapter("wrap", tmp_path / "foreign", "--output-dir", tmp_path / "wrapped"))
    weights = {"foreign": 0.7, "own": 0.4}
    both = QAdapterForCausalLM.from_pretrained(
        base, adapters={"foreign": tmp_path / "wrapped", "own": adapter}, adapter_weights=weights
    )
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "foreign").eval()
    with torch.no_grad():
        with plain.disable_adapter():
            z_base = plain(input_ids=IDS).logits
        alone = {
            "foreign": plain(input_ids=IDS).logits,
            "own": QAdapterForCausalLM.from_pretrained(adapter)(IDS).logits,
        }
        expected = z_base + sum(weights[name] * (z - z_base) for name, z in alone.items())
        # float32 matmuls of stacked and of separate batches add in different orders; logits here are of size 10.
        torch.testing.assert_close(both(IDS).logits, expected, rtol=1e-5, atol=1e-4)


def test_the_base_that_an_axolotl_folder_names_is_found_without_being_given(base, tmp_path):
    """Though the folder's own config.json looks like a model's."""
    write_lora(tmp_path / "foreign", base, AXOLOTL_0_9)
    write_model_config(tmp_path / "foreign", base, bits=8)
    succeeded(qadapter("wrap", tmp_path / "foreign", "--output-dir", tmp_path / "wrapped"))
    facts = json.loads(succeeded(qadapter("info", tmp_path / "wrapped", "--json")))
    assert facts["base"] == str(base)


def test_the_revision_of_the_base_that_a_folder_names_is_kept(base, tmp_path, monkeypatch):
    """But for another base, which has other revisions; and by our own plain LoRA, where the base is on the hub."""
    write_lora(tmp_path / "foreign", base, AXOLOTL_0_9 | {"base_model_name_or_path": "someone/base", "revision": "v2"})
    asked = []

    def load(source, **options):
        asked.append(source)
        return load_base(BaseSource(str(base), str(base), None), **options)

    monkeypatch.setattr(wrapping, "load_base", load)
    policy, _ = wrap(tmp_path / "foreign", tokenizer=AutoTokenizer.from_pretrained(base))
    wrap(tmp_path / "foreign", "someone/other", tokenizer=AutoTokenizer.from_pretrained(base))
    assert asked == [
        BaseSource("someone/base", "someone/base", "v2"),
        BaseSource("someone/other", "someone/other", None),
    ]
    export_lora(policy, tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/base", "v2")


def test_a_revision_that_is_no_text_is_refused(base, tmp_path):
    write_lora(tmp_path / "foreign", base, AXOLOTL_0_9 | {"revision": ["v2"]})
    outcome = qadapter("wrap", tmp_path / "foreign", "--output-dir", tmp_path / "wrapped")
    assert_refused(outcome, r"adapter_config\.json: revision is \['v2'\], must be a text or null")


def test_pickled_weights_are_refused_with_the_command_that_converts_them(base, tmp_path):
    """Which is right: run, it makes the folder one that can be wrapped."""
    folder = tmp_path / "it's $(touch foreign)"
    tensors = write_lora(folder, base, PEFT_0_6 | {"target_modules": ["q_proj", "v_proj"], "use_dora": False})
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    outcome = qadapter("wrap", folder, "--output-dir", tmp_path / "wrapped")
    assert_refused(outcome, r"safetensors is missing \(pickled weights are never read\)\. Convert them: python -c", 1)
    _, *arguments = shlex.split(re.search(r"(python -c .*)\n", outcome.err)[1])
    assert arguments[2:] == [str(folder / name) for name in ("adapter_model.bin", "adapter_model.safetensors")]
    subprocess.run([sys.executable, *arguments], check=True, timeout=100)
    succeeded(qadapter("wrap", folder, "--output-dir", tmp_path / "wrapped"))


def test_an_interrupted_run_is_pointed_to_its_checkpoints(base, tmp_path):
    """axolotl writes adapter_config.json before the first step."""
    folder = tmp_path / "foreign"
    write_lora(folder, base, AXOLOTL_0_9)
    (folder / "checkpoint-20").mkdir()
    (folder / "adapter_model.safetensors").rename(folder / "checkpoint-20/adapter_model.safetensors")
    shutil.copy(folder / "adapter_config.json", folder / "checkpoint-20")
    outcome = qadapter("wrap", folder, "--output-dir", tmp_path / "wrapped")
    assert_refused(
        outcome,
        r"adapter_model\.safetensors is missing: the run was interrupted\. Take one of the checkpoint-\* folders",
    )
    succeeded(qadapter("wrap", folder / "checkpoint-20", "--output-dir", tmp_path / "wrapped"))


def test_tokens_that_the_base_has_no_embeddings_for_are_warned_of_by_name(base, tmp_path):
    folder = tmp_path / "foreign"
    write_lora(folder, base, AXOLOTL_0_9)
    save_tokenizer(folder, base, tokens=[f"<extra{index}>" for index in range(7)])
    tokens = ", ".join(f"'<extra{index}>'" for index in range(5))
    message = rf"has 7 tokens that the base has no embeddings for \({tokens}, \.\.\.\).*\(--base-model\)"
    with pytest.warns(UserWarning, match=message):
        wrap(folder)


def test_a_lora_on_the_hub_is_wrapped_by_its_id(base, tmp_path, monkeypatch):
    write_lora(tmp_path / "snapshot", base, CONFIGS["axolotl 0.9"])
    asked = []

    def download(repo_id, revision=None, token=None, allow_patterns=None):
        asked.append((repo_id, {"adapter_config.json", "adapter_model.safetensors"} <= set(allow_patterns)))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hub, "snapshot_download", download)
    policy, _ = wrap("someone/polite", base)
    assert asked == [("someone/polite", True)]
    with torch.no_grad():
        torch.testing.assert_close(policy(IDS).logits, wrap(tmp_path / "snapshot", base)[0](IDS).logits, rtol=0, atol=0)


def test_a_lora_that_is_neither_here_nor_on_the_hub_is_named(base, tmp_path):
    outcome = qadapter("wrap", "nobody/nothing", "--base-model", base, "--output-dir", tmp_path / "out")
    assert_refused(outcome, "nobody/nothing: no such folder here, and the hub has no readable repository of that name")
    outcome = qadapter("wrap", "./nothing", "--base-model", base, "--output-dir", tmp_path / "out")
    assert_refused(outcome, "nothing: there is no such folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "tensor", "said"),
    [
        ({"lora_bias": True}, "q_proj.lora_B.bias", "lora_bias is set, which a frozen base and its streams cannot"),
        ({"bias": "lora_only"}, "q_proj.lora_only!", "bias is 'lora_only'; only adapters with bias 'none'"),
        ({"peft_type": "IA3"}, "q_proj.ia3_l!", "peft_type is 'IA3'; only LORA adapters"),
    ],
)
def test_the_config_says_why_a_lora_with_other_tensors_is_refused(base, tmp_path, changes, tensor, said):
    folder = tmp_path / "foreign"
    tensors = write_lora(folder, base, AXOLOTL_0_9)
    name = f"base_model.model.model.layers.0.self_attn.{tensor}"
    save_file({**tensors, name: torch.zeros(3)}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    outcome = qadapter("wrap", folder, "--output-dir", tmp_path / "wrapped")
    assert_refused(outcome, rf"adapter_config\.json: {said}")
