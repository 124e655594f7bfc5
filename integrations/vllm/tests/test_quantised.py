"""A base quantised to int8: vLLM's own kernels run it, the adapters' updates are added above them."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from models import APART, lora, randomise, tiny_base, tiny_tokenizer, train_randomly
from safetensors.torch import load_file, save_file
from served import MIXED, SIZES, UPPER, assert_same, engine, greedy, prompts, tiny_folder
from test_parity import ALIKE, last_logps
from torch import nn
from transformers import AutoModelForCausalLM

from qadapter import QAdapterForCausalLM
from qadapter.errors import AdapterFormatError, ConfigError
from qadapter.modeling.fingerprints import combined_fingerprint, weight_sample

# No multiple of 32: vLLM's int8 kernel for AMX takes no float32, and leaves such layers to the one that does.
HIDDEN = 72
# Processors without VNNI add two products of bytes in 16 bits, which full-range weights overflow.
LARGEST = 63
# Where a value lies between two steps of int8, the engine and the reference may round it differently.
TOLERANCE = 5e-2
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
QUANTISED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": INPUTS}},
}
CACHE_SCALES = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


class Int8Linear(nn.Linear):
    """What a quantised layer computes: inputs rounded token by token, weights rounded once."""

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True) / 127
        return F.linear((x / scale).round() * scale, self.weight, self.bias)


def calm_base(folder):
    """A base whose layers change the hidden states little, so that what int8 rounds away does not grow."""
    model = tiny_base("llama", tie_word_embeddings=False, **(SIZES | {"hidden_size": HIDDEN}))
    randomise(model, scale=0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def int8_copy(base, folder, **changes):
    """A compressed-tensors copy of a base, each output channel of its linear layers with a scale of its own."""
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(1, keepdim=True) / LARGEST
        tensors[name], tensors[f"{name}_scale"] = (tensors[name] / scale).round().to(torch.int8), scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": QUANTISED | changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def on_int8(copy, base, **settings):
    """The slow twin: the policy of `tiny_folder`, with its layers computing as the quantised copy's."""
    model, tensors = AutoModelForCausalLM.from_pretrained(base), load_file(copy / "model.safetensors")
    for name, layer in model.named_modules():
        if f"{name}.weight_scale" in tensors:
            layer.__class__ = Int8Linear
            layer.weight.data = tensors[f"{name}.weight"] * tensors[f"{name}.weight_scale"]
    policy = QAdapterForCausalLM.from_base(model, settings.get("config", APART), settings.get("peft_config") or lora())
    return train_randomly(policy).eval()


@pytest.fixture
def quantised(tmp_path):
    """Makes an adapter on a float base, and its base's int8 copy: (slow twin, arguments of `engine`)."""

    def make(entry=None, changes=None, **settings):
        calm_base(tmp_path / "llama-base")
        policy, base = tiny_folder(tmp_path, **settings)
        policy.save_pretrained(tmp_path / "adapter")
        copy = int8_copy(base, tmp_path / "int8", **(changes or {}))
        entry = {"adapter": str(tmp_path / "adapter"), "quantised": True, "strength": 0.7} | (entry or {})
        overrides = {"architectures": ["QAdapterLlamaForCausalLM"], "qadapter": entry}
        return on_int8(copy, base, **settings), {"folder": copy, "hf_overrides": overrides}

    return make


@pytest.mark.parametrize("targets", ["all-linear", UPPER])
def test_updates_are_added_above_int8_layers(quantised, targets):
    policy, arguments = quantised(peft_config=lora(target_modules=targets))
    rows = prompts(*MIXED)
    with engine(**arguments) as llm:
        assert_same(policy, rows, greedy(llm, rows), tolerance=TOLERANCE)
    assert (last_logps(policy, rows[0]) - last_logps(policy, rows[0], strength=0.0)).abs().max() > 10 * TOLERANCE


def test_one_stream_on_an_int8_base_is_not_merged(quantised):
    policy, arguments = quantised({"strength": 1.0}, config=ALIKE)
    rows = prompts(*MIXED)
    with engine(**arguments) as llm:
        assert_same(policy, rows, greedy(llm, rows), strength=1.0, tolerance=TOLERANCE)
        assert llm.apply_model(lambda model: model.merges) == [False]


def test_the_base_s_stream_is_vllm_s_own_int8_model(quantised):
    _, arguments = quantised({"strength": 0.0, "dial": True})
    rows = prompts(*MIXED)
    with engine(arguments["folder"]) as llm:
        expected = greedy(llm, rows)
    with engine(**arguments) as llm:
        for answer, plain in zip(greedy(llm, rows), expected, strict=True):
            assert answer.token_ids == plain.token_ids
            assert answer.cumulative_logprob == pytest.approx(plain.cumulative_logprob, abs=1e-4)


def test_a_quantised_copy_must_be_accepted(quantised):
    _, arguments = quantised({"quantised": None})
    match = 'the base model differs: .*It is quantised \\(compressed-tensors\\).*"quantised": true'
    with pytest.raises(AdapterFormatError, match=match), engine(**arguments):
        pass


def test_files_with_the_fingerprint_trained_on_need_no_permission(quantised, tmp_path):
    _, arguments = quantised({"quantised": None})
    tensors = load_file(arguments["folder"] / "model.safetensors")
    path = tmp_path / "adapter" / "qadapter_config.json"
    manifest = json.loads(path.read_text())
    samples = {name: weight_sample(tensor) for name, tensor in tensors.items()}
    manifest["base"]["fingerprint"] = combined_fingerprint(samples)
    path.write_text(json.dumps(manifest))
    with engine(**arguments) as llm:
        assert len(greedy(llm, prompts(5), tokens=3)[0].token_ids) == 3


def test_a_copy_that_computes_something_else_does_not_meet_the_probe(quantised):
    _, arguments = quantised()
    path = arguments["folder"] / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": 20 * tensors["model.norm.weight"]}, path, metadata={"format": "pt"})
    match = "base model gives other log-prob.*allowed 4\\)"
    with pytest.raises(AdapterFormatError, match=match), engine(**arguments):
        pass


def test_a_quantised_cache_with_scales_of_its_own_is_refused(quantised):
    _, arguments = quantised(changes={"kv_cache_scheme": CACHE_SCALES})
    with pytest.raises(ConfigError, match="quantised key-value cache.*--kv-cache-dtype bfloat16"), engine(**arguments):
        pass


def test_the_way_out_of_a_quantised_cache(quantised):
    _, arguments = quantised(changes={"kv_cache_scheme": CACHE_SCALES})
    with engine(**arguments, kv_cache_dtype="bfloat16") as llm:
        assert len(greedy(llm, prompts(5), tokens=3)[0].token_ids) == 3


def test_layers_that_are_quantised_while_they_are_read_are_refused(tmp_path):
    policy, base = tiny_folder(tmp_path)
    policy.save_pretrained(tmp_path / "adapter")
    overrides = {"architectures": ["QAdapterLlamaForCausalLM"], "qadapter": {"adapter": str(tmp_path / "adapter")}}
    with (
        pytest.raises(ConfigError, match="OnlineLinearMethod cannot carry an adapter's update.*without --quantization"),
        engine(base, dtype="bfloat16", quantization="fp8_per_tensor", hf_overrides=overrides),
    ):
        pass
