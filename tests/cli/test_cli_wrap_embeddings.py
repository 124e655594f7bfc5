"""`qadapter wrap` where base weights lie beside the LoRA: the base's own, resized or trained along with it."""

import errno
import json
from unittest.mock import Mock

import pytest
import torch
from commands import assert_refused, qadapter, succeeded
from foreign_folders import PEFT_0_15, PEFT_0_20, save_tokenizer, write_lora
from models import multimodal_base, tiny_base, tiny_tokenizer, token_ids
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapter import QAdapterForCausalLM
from qadapter.errors import AdapterFormatError
from qadapter.modeling import checkpoint
from qadapter.modeling.bases import BaseSource
from qadapter.modeling.rewritten_bases import write_base
from qadapter.modeling.wrapping import _require_frozen, wrap

IDS = torch.tensor(token_ids(9, 9))
GREEDY = {"do_sample": False, "max_new_tokens": 20}
# Rows of the embeddings of 97 tokens and one more, and whether they were trained.
RESIZED = {
    "axolotl, a token": (98, False),
    "axolotl, a token and lora_modules_to_save": (98, True),
    "LLaMA-Factory, resize_vocab": (128, False),
    "LLaMA-Factory, additional_target": (97, True),
}


@pytest.fixture
def with_embeddings(base, tmp_path):
    """A folder whose LoRA is on the head, too, so that PEFT has saved the embeddings beside it."""
    folder = tmp_path / "foreign"
    config = PEFT_0_15 | {"target_modules": ["q_proj", "lm_head"]}
    tensors = write_lora(folder, base, config)
    model = AutoModelForCausalLM.from_pretrained(base)
    tensors["base_model.model.model.embed_tokens.weight"] = model.get_input_embeddings().weight.detach().bfloat16()
    tensors["base_model.model.lm_head.base_layer.weight"] = model.get_output_embeddings().weight.detach().clone()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_embeddings_saved_with_a_lora_are_dropped_where_they_are_the_base_s(with_embeddings, base, tmp_path):
    succeeded(qadapter("wrap", with_embeddings, "--output-dir", tmp_path / "wrapped"))
    policy = QAdapterForCausalLM.from_pretrained(tmp_path / "wrapped")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), with_embeddings).eval()
    with torch.no_grad():  # PEFT puts the rounded embeddings into its base
        plain.get_input_embeddings().weight.copy_(policy.get_input_embeddings().weight)
    assert torch.equal(policy.generate(IDS, **GREEDY), plain.generate(input_ids=IDS, **GREEDY))


def test_trained_embeddings_are_refused_until_a_base_has_them(with_embeddings, base, tmp_path):
    """With `modules_to_save` in the config, as axolotl's `lora_modules_to_save` leaves it."""
    path = with_embeddings / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": ["embed_tokens"]}))
    weights = with_embeddings / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.weight"
    tensors = load_file(weights)
    tensors[name] = tensors[name].float() + 1
    save_file(tensors, weights)
    outcome = qadapter("wrap", with_embeddings, "--output-dir", tmp_path / "wrapped")
    assert_refused(outcome, r"model\.embed_tokens\.weight was trained or resized along.*give one with --base-model")
    assert not (tmp_path / "wrapped").exists()
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.get_input_embeddings().weight.copy_(tensors[name])
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    succeeded(
        qadapter("wrap", with_embeddings, "--base-model", tmp_path / "other", "--output-dir", tmp_path / "wrapped")
    )


def write_resized(folder, base, rows, trained):
    """A LoRA whose base had a token added, `rows` in all, and where `trained`, new embeddings and head."""
    targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    tensors = write_lora(folder, base, PEFT_0_20 | (targets if trained else targets | {"modules_to_save": None}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows)
    layers = {"model.embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    for name, layer in layers.items():
        weight = layer.weight.detach().clone()
        if trained:
            tensors[f"base_model.model.{name}.original_module.weight"] = weight
            weight = weight + torch.randn_like(weight)
            tensors[f"base_model.model.{name}.modules_to_save.weight"] = weight
        tensors[f"base_model.model.{name}.weight"] = weight.clone()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder, base, tokens=["<|tool|>"] if rows > 97 else ())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")  # PEFT, where it reads
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("rows", "trained"), RESIZED.values(), ids=RESIZED)
def test_embeddings_of_its_own_come_with_a_new_base(rows, trained, tied, tmp_path):
    base, foreign, new, wrapped = (tmp_path / name for name in ("base", "foreign", "new", "wrapped"))
    tiny_base(tie_word_embeddings=tied).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    write_resized(foreign, base, rows, trained)
    outcome = qadapter("wrap", foreign, "--output-dir", wrapped)
    assert_refused(outcome, r"was trained or resized along.*Have a base written.*--new-base DIR")
    assert "own embeddings written to" in succeeded(
        qadapter("wrap", foreign, "--output-dir", wrapped, "--new-base", new)
    )
    policy = QAdapterForCausalLM.from_pretrained(wrapped)
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(rows)
    plain = PeftModel.from_pretrained(plain, foreign).eval()
    assert torch.equal(policy.generate(IDS, **GREEDY), plain.generate(input_ids=IDS, **GREEDY))
    new_base = AutoModelForCausalLM.from_pretrained(new)
    assert torch.equal(policy.generate(IDS, strength=0.0, **GREEDY), new_base.generate(IDS, **GREEDY))
    assert new_base.config.tie_word_embeddings == (tied and not trained)
    if rows > 97:
        for folder in (new, wrapped):
            assert AutoTokenizer.from_pretrained(folder)("<|tool|>").input_ids == [97]


def test_a_new_base_keeps_trained_embeddings_that_are_finer_than_its_own(base, tmp_path):
    """PEFT trains `modules_to_save` in float32 on a base in bfloat16."""
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", base)
    write_resized(tmp_path / "foreign", tmp_path / "base", 97, trained=True)
    saved = load_file(tmp_path / "foreign/adapter_model.safetensors")
    saved = {name: tensor.float() + 1e-5 for name, tensor in saved.items()}
    save_file(saved, tmp_path / "foreign/adapter_model.safetensors")
    wrap(tmp_path / "foreign", new_base=tmp_path / "new")
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto")
    assert torch.equal(new.lm_head.weight, saved["base_model.model.lm_head.weight"])
    assert new.dtype == torch.float32


def test_a_new_base_that_reads_images_too_says_of_its_texts_that_the_head_is_tied_no_more(tmp_path):
    multimodal_base(tied=True).save_pretrained(tmp_path / "base")
    source = BaseSource(str(tmp_path / "base"), str(tmp_path / "base"), None)
    head = torch.randn(97, 32, generator=torch.Generator().manual_seed(0))
    write_base(source, {"lm_head.weight": head}, None, tmp_path / "new")
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "new").lm_head.weight, head)


def test_no_new_base_is_written_where_none_is_needed(with_embeddings, base, tmp_path):
    options = ("--output-dir", tmp_path / "wrapped", "--new-base", tmp_path / "new")
    assert "not needed: nothing written" in succeeded(qadapter("wrap", with_embeddings, *options))
    assert not (tmp_path / "new").exists()


def test_an_empty_folder_that_no_new_base_is_written_to_is_not_said_to_hold_one(with_embeddings, tmp_path):
    (tmp_path / "new").mkdir()
    options = ("--output-dir", tmp_path / "wrapped", "--new-base", tmp_path / "new")
    assert "not needed: nothing written" in succeeded(qadapter("wrap", with_embeddings, *options))


def test_a_new_base_and_its_adapter_cannot_share_a_folder(with_embeddings, tmp_path):
    options = ("--output-dir", tmp_path / "both", "--new-base", tmp_path / "." / "both")
    assert_refused(qadapter("wrap", with_embeddings, *options), "a base and an adapter need one each")
    assert not (tmp_path / "both").exists()


def test_a_new_base_is_refused_where_the_weights_do_not_fit(base, tmp_path):
    write_resized(tmp_path / "foreign", base, 98, trained=False)
    weights = tmp_path / "foreign/adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.model.norm.weight"] = torch.ones(7)
    save_file(tensors, weights)
    options = ("--output-dir", tmp_path / "wrapped", "--new-base", tmp_path / "new")
    assert_refused(qadapter("wrap", tmp_path / "foreign", *options), r"do not fit the base model: size mismatch.*norm")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_no_new_base_is_left_where_the_lora_is_refused(base, tmp_path, monkeypatch, there, late):
    """Nor where it could not be saved: the same command is not refused the next time for that."""
    foreign, new = tmp_path / "foreign", tmp_path / "new"
    write_resized(foreign, base, 98, trained=True)
    weights = load_file(foreign / "adapter_model.safetensors")
    options = ("wrap", foreign, "--output-dir", tmp_path / "wrapped", "--new-base", new)
    if there:
        new.mkdir()
    with monkeypatch.context() as patch:
        if late:
            patch.setattr(checkpoint, "save_file", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        else:
            name = next(name for name in weights if "q_proj.lora_B" in name)
            save_file(weights | {name: weights[name][:5].clone()}, foreign / "adapter_model.safetensors")
        assert_refused(qadapter(*options), "Input/output error" if late else "does not fit the base model")
    assert new.exists() == there
    assert not there or not any(new.iterdir())
    save_file(weights, foreign / "adapter_model.safetensors")
    succeeded(qadapter(*options))


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_rounded_on_either_side_are_the_base_s(own, saved, tmp_path):
    base = torch.nn.Embedding(7, 5).to(own)
    _require_frozen(base, {"weight": base.weight.detach().to(saved)}, tmp_path)
    with pytest.raises(AdapterFormatError, match="was trained or resized"):
        _require_frozen(base, {"weight": (base.weight.detach() + 1).to(saved)}, tmp_path)
