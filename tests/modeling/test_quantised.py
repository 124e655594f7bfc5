"""Quantised bases: refused for training by one line unless gradients pass through them, and by what they state."""

import json
import sys
from types import SimpleNamespace

import pytest
from models import tiny_base, tiny_policy, tiny_trainer
from transformers import BitsAndBytesConfig

from qadapter import QAdapterForCausalLM
from qadapter.errors import ConfigError
from qadapter.modeling.bases import load_base, resolve_base
from qadapter.modeling.quantised import check_trainable, check_trainable_files


@pytest.fixture
def stating(tmp_path):
    """A base's folder whose config states a quantisation."""

    def save(**quantisation):
        tiny_base().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
        return tmp_path

    return save


def loaded_with(quantization_config):
    base = tiny_base()
    base.hf_quantizer = SimpleNamespace(quantization_config=quantization_config)
    return base


@pytest.mark.parametrize("method", ["compressed-tensors", "awq", "gptq", "torchao", "unheard-of"])
def test_files_that_no_adapter_can_be_trained_on_are_refused(stating, method):
    folder = stating(quant_method=method)
    match = rf"base model '{folder}' is quantised \({method}\), .*--load-in-4bit .*dequantize=True"
    with pytest.raises(ConfigError, match=match):
        QAdapterForCausalLM.from_base(folder)


@pytest.mark.parametrize(
    "quantisation",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"load_in_8bit": True},
        {"quant_method": "mxfp4"},  # transformers may unpack it
        {"quant_method": "fp8", "dequantize": True},
    ],
)
def test_files_that_may_be_trained_on_pass(stating, quantisation):
    check_trainable_files(resolve_base(stating(**quantisation)))


def test_files_that_are_unpacked_as_they_are_loaded_pass(stating):
    check_trainable_files(resolve_base(stating(quant_method="gptq")), SimpleNamespace(dequantize=True))


def test_files_without_a_config_are_left_to_whoever_loads_them(tmp_path):
    check_trainable_files(resolve_base(tmp_path))


def test_the_trainer_refuses_a_loaded_base(tmp_path):
    policy = tiny_policy(loaded_with(SimpleNamespace(quant_method="mxfp4")))
    with pytest.raises(ConfigError, match=r"base model '.*' is quantised \(mxfp4\), and no adapter can be trained"):
        tiny_trainer(policy, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_bitsandbytes_form_can_be_trained_on(bits):
    check_trainable(loaded_with(BitsAndBytesConfig(**{f"load_in_{bits}bit": True})), "any")


def test_a_package_that_reads_the_weights_and_is_missing_is_named(stating, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(ConfigError, match="cannot be loaded: .*compressed"):
        load_base(resolve_base(stating(quant_method="compressed-tensors", format="int-quantized", config_groups={})))
