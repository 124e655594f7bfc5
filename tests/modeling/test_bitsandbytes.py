"""A base that bitsandbytes quantises as it is loaded, really: trained on, saved, loaded again, and left behind."""

import json
import sys

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from models import lora, randomise, tiny_base, tiny_tokenizer, tiny_trainer, token_ids, train_randomly
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.errors import AdapterFormatError, ConfigError
from qadapter.export import export_merged, export_vllm
from qadapter.modeling.manifest import MANIFEST_NAME
from qadapter.modeling.quantised import quantisation_of
from qadapter.modeling.resuming import load_adapter_weights

IDS = torch.tensor(token_ids(9, 9))
BITS = pytest.mark.parametrize("bits", [4, 8])
WITHOUT = {"quantization_config": None}


def quantising(bits):
    return BitsAndBytesConfig(**{f"load_in_{bits}bit": True})


def small_base(seed=0):
    """A tiny base with weights so small that quantising moves its logits by less than a nat, as it does real ones."""
    base = tiny_base(seed=seed)
    randomise(base, seed, scale=0.1)
    return base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of such a base."""
    folder = tmp_path_factory.mktemp("bases") / "llama"
    small_base().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def quantised_policy(base, bits=4, **options):
    policy = QAdapterForCausalLM.from_base(
        base, QAdapterConfig(), lora(), quantization_config=quantising(bits), **options
    )
    train_randomly(policy, scale=0.05)
    return policy.eval()


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """Folders of an adapter trained (at random) on the base in 4 bits, and in 8."""
    root = tmp_path_factory.mktemp("adapters")
    for bits in (4, 8):
        quantised_policy(base, bits).save_pretrained(root / str(bits))
    return root


def logits(policy, strength=1.0):
    with torch.no_grad():
        return policy(IDS, strength=strength).logits


def layer(policy):
    return policy.get_submodule("base.model.layers.0.self_attn.q_proj.base_layer")


@BITS
def test_training_moves_the_adapter_and_no_quantised_weight(base, bits, tmp_path):
    config = QAdapterConfig(beta=0.0)
    policy = QAdapterForCausalLM.from_base(base, config, lora(), quantization_config=quantising(bits))
    before = layer(policy).weight.detach().clone()
    assert not before.dtype.is_floating_point
    torch.testing.assert_close(logits(policy), logits(policy, 0.0), rtol=0, atol=0.05)  # 8 bits round by batch
    trainer = tiny_trainer(policy, tmp_path / "run", max_steps=6, learning_rate=0.03, logging_steps=1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(layer(policy).weight, before)


def test_gradients_are_those_on_the_same_weights_in_floats(base):
    """On some CPUs bitsandbytes repacks weights as they are first used in evaluation, for a kernel without backward."""
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantising(4))
    in_floats = AutoModelForCausalLM.from_pretrained(base)
    layers = {name: part for name, part in model.named_modules() if type(part).__name__ == "Linear4bit"}
    for name, part in layers.items():
        part.support_avx512bf16_for_cpu = True  # as on such a CPU
        weight = dequantize_4bit(part.weight.data, part.weight.quant_state)
        in_floats.get_submodule(name).weight.data.copy_(weight)
    gradients = []
    for each in (model, in_floats):
        policy = QAdapterForCausalLM.from_base(each, QAdapterConfig(), lora())
        train_randomly(policy, scale=0.05)
        logits(policy.eval())
        policy.train()(IDS).logits.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in policy.adapter_parameters().items()})
    assert layers
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_in_4_bits_strength_0_is_the_quantised_base_and_between_lie_the_mixes(base):
    policy = quantised_policy(base)
    zero, half, one = (logits(policy, strength) for strength in (0.0, 0.5, 1.0))
    mixed = logits(policy, torch.tensor([0.0, 0.5]))  # through the doubled batch
    # Not bit by bit: which order a product of two rows adds in depends on the CPU and its threads.
    torch.testing.assert_close(mixed[0], zero[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(half, (zero + one) / 2, rtol=0, atol=1e-4)
    torch.testing.assert_close(mixed[1], half[1], rtol=0, atol=1e-4)
    assert (one - zero).abs().max() > 0.1


@BITS
def test_a_folder_brings_its_quantisation_with_it(base, saved, bits):
    stored = json.loads((saved / str(bits) / MANIFEST_NAME).read_text())["base"]["quantization"]
    assert (stored["load_in_4bit"], stored["load_in_8bit"]) == (bits == 4, bits == 8)
    policy, again = quantised_policy(base, bits), QAdapterForCausalLM.from_pretrained(saved / str(bits))
    assert quantisation_of(again.base) == stored
    for strength in (0.0, 0.5, 1.0):
        torch.testing.assert_close(logits(again, strength), logits(policy, strength), rtol=0, atol=1e-5)


@BITS
def test_unquantised_it_is_another_folder_that_can_be_merged_and_served(saved, bits, tmp_path):
    quantised = QAdapterForCausalLM.from_pretrained(saved / str(bits))
    for export in (export_merged, export_vllm):
        with pytest.raises(ConfigError, match="the base is quantised: .* --unquantised"):
            export(quantised, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    policy = QAdapterForCausalLM.from_pretrained(saved / str(bits), **WITHOUT)
    assert layer(policy).weight.dtype == torch.float32
    assert 0 < (logits(policy) - logits(quantised)).abs().max() < 4
    assert export_merged(policy, tmp_path / "merged") < 1e-3
    export_vllm(policy, tmp_path / "vllm")
    policy.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / MANIFEST_NAME).read_text())["base"]["quantization"] is None
    torch.testing.assert_close(logits(QAdapterForCausalLM.from_pretrained(tmp_path / "plain")), logits(policy))


def test_a_base_whose_files_are_quantised_has_no_other_form(base, tmp_path):
    files = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantising(4))
    files.save_pretrained(tmp_path / "files")
    tiny_tokenizer().save_pretrained(tmp_path / "files")
    policy = QAdapterForCausalLM.from_base(tmp_path / "files", QAdapterConfig(), lora())
    train_randomly(policy, scale=0.05)
    policy.eval().save_pretrained(tmp_path / "adapter")
    for options in ({}, WITHOUT):
        again = QAdapterForCausalLM.from_pretrained(tmp_path / "adapter", **options)
        assert quantisation_of(again.base) is None
        torch.testing.assert_close(logits(again), logits(policy), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="the base is quantised: .* Its files are"):
        export_merged(again, tmp_path / "merged")


def test_a_base_that_the_caller_loaded_stays_as_it_is(saved):
    policy = QAdapterForCausalLM.from_pretrained(saved / "4", base_model=small_base())
    assert layer(policy).weight.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, WITHOUT])
def test_another_base_is_refused_in_either_form(saved, tmp_path, options):
    small_base(seed=9).save_pretrained(tmp_path)
    with pytest.raises(AdapterFormatError, match="the base model differs"):
        QAdapterForCausalLM.from_pretrained(saved / "4", base_model=tmp_path, **options)


def test_adapters_of_a_base_in_different_forms_cannot_be_composed(base, saved, tmp_path):
    with pytest.raises(AdapterFormatError, match="quantised in different ways"):
        QAdapterForCausalLM.from_pretrained(base, adapters={"four": saved / "4", "eight": saved / "8"})
    both = QAdapterForCausalLM.from_pretrained(base, adapters={"one": saved / "4", "two": saved / "4"})
    assert quantisation_of(both.base)["load_in_4bit"]


def test_a_checkpoint_is_not_resumed_on_the_base_in_another_form(base, saved):
    load_adapter_weights(quantised_policy(base, 4), saved / "4")
    match = r"base was in 4 bits, not {}\. Resume with the same --load-in-4bit"
    with pytest.raises(AdapterFormatError, match=match.format("in 8 bits")):
        load_adapter_weights(quantised_policy(base, 8), saved / "4")
    with pytest.raises(AdapterFormatError, match=match.format("unquantised")):
        load_adapter_weights(QAdapterForCausalLM.from_base(base, QAdapterConfig(), lora()), saved / "4")


def test_without_the_package_the_way_out_is_named(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    match = r"trained on a quantised base, .*pip install 'qadapter\[quantised\]', or load it unquantised: --unquantised"
    with pytest.raises(ConfigError, match=match):
        QAdapterForCausalLM.from_pretrained(saved / "4")
    QAdapterForCausalLM.from_pretrained(saved / "4", **WITHOUT)


@pytest.mark.parametrize(
    "change",
    [
        {"load_in_4bit": "yes"},
        {"load_in_4bit": False},
        {"bnb_4bit_quant_type": None},
        {"llm_int8_skip_modules": [1]},
        {"bnb_4bit_quant_storage": "uint8"},
        [],
    ],
)
def test_a_manifest_with_other_settings_is_refused(saved, tmp_path, change):
    manifest = json.loads((saved / "4" / MANIFEST_NAME).read_text())
    stored = manifest["base"]["quantization"]
    manifest["base"]["quantization"] = stored | change if isinstance(change, dict) else change
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(AdapterFormatError, match="damaged: base.quantization"):
        QAdapterForCausalLM.from_pretrained(tmp_path)


def test_an_adapter_of_an_unquantised_base_says_why_a_quantised_one_is_another(base, tmp_path):
    QAdapterForCausalLM.from_base(base, QAdapterConfig(), lora()).save_pretrained(tmp_path / "adapter")
    match = r"the base model differs: .* Here it is in 8 bits, then it was unquantised, which changes the weights"
    with pytest.raises(AdapterFormatError, match=match):
        QAdapterForCausalLM.from_pretrained(tmp_path / "adapter", quantization_config=quantising(8))
