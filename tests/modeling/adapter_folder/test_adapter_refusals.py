"""What is refused by name: another base, changed files, tensors that do not fit, and folders that are no adapter."""

import pytest
import torch
from models import APART, tiny_base, tiny_policy, tiny_tokenizer
from safetensors.torch import load_file, save_file
from saved_adapters import TOKENIZER_FILES, WEIGHTS, build, change_json, change_tensors, load, logits_of

from qadapter.errors import AdapterFormatError, ConfigError
from qadapter.modeling import loading
from qadapter.modeling.manifest import MANIFEST_NAME


@pytest.fixture
def on_changed_base(tmp_path):
    """An adapter folder whose base folder got other weights after saving."""
    build(tmp_path)
    tiny_base(seed=8).save_pretrained(tmp_path / "base")
    return tmp_path / "out"


def test_changed_base_is_refused_by_name(on_changed_base):
    with pytest.raises(AdapterFormatError, match=r"the base model differs: trained on .*base.* has other weights"):
        load(on_changed_base)


def test_verify_false_warns_of_a_changed_base(on_changed_base):
    with pytest.warns(UserWarning, match="the base model differs"):
        load(on_changed_base, verify=False)


def test_changed_base_with_a_forged_fingerprint_fails_the_probe(on_changed_base):
    fingerprint = loading.weight_fingerprint(tiny_base(seed=8))
    change_json(on_changed_base / MANIFEST_NAME, "base", "fingerprint", value=fingerprint)
    with pytest.raises(AdapterFormatError, match="the base model gives other log-probabilities than when it was saved"):
        load(on_changed_base)


@pytest.mark.parametrize("name", ["alpha_0", "alpha_tilde"])
def test_changed_setting_fails_the_probe_of_its_adapter(folder, name):
    change_json(folder / MANIFEST_NAME, "adapters", "default", name, value=0.9)
    with pytest.raises(AdapterFormatError, match="the adapter 'default' gives other log-probabilities"):
        load(folder)


def test_changed_adapter_file_is_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, folder / WEIGHTS)
    with pytest.raises(AdapterFormatError, match="the weights of adapter 'default' have changed since they were saved"):
        load(folder)
    with pytest.warns(UserWarning, match="the weights of adapter 'default' have changed"):
        load(folder, verify=False)


def test_changed_adapter_file_with_a_forged_digest_fails_the_probe(folder):
    change_tensors(folder, lambda tensors: [tensor.add_(0.1) for tensor in tensors.values()])
    with pytest.raises(AdapterFormatError, match="the adapter 'default' gives other log-probabilities"):
        load(folder)


def test_changed_lora_alpha_fails_the_probe(folder):
    change_json(folder / "adapters/default/adapter_config.json", "lora_alpha", value=60)
    with pytest.raises(AdapterFormatError, match="the adapter 'default' gives other log-probabilities"):
        load(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_one_weight_that_is_no_number_is_refused(folder, number):
    change_tensors(folder, lambda tensors: next(iter(tensors.values())).view(-1)[0].fill_(number))
    with pytest.raises(AdapterFormatError, match="holds NaN, infinity or more than float32 can: .* damaged"):
        load(folder)


def test_numbers_that_only_float64_holds_are_refused(folder):
    """Loaded they are infinite, which attention on some CPUs hides."""

    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.double()
        next(iter(tensors.values())).view(-1)[0] = 1e300

    change_tensors(folder, change)
    with pytest.raises(AdapterFormatError, match="more than float32 can"):
        load(folder)


@pytest.mark.filterwarnings("ignore:.*the base model differs")
def test_numbers_that_only_float32_holds_are_refused_in_float16(folder):
    change_tensors(folder, lambda tensors: next(iter(tensors.values())).view(-1)[0].fill_(1e6))
    assert load(folder, verify=False) is not None
    with pytest.raises(AdapterFormatError, match="beyond torch.float16: load it with dtype=bfloat16 or float32"):
        load(folder, dtype=torch.float16, verify=False)


def test_changed_chat_template_is_refused(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(AdapterFormatError, match="the chat template differs from the one the adapter was trained with"):
        load(folder)
    with pytest.warns(UserWarning, match="the chat template differs"):
        load(folder, verify=False)


def test_changed_vocabulary_is_refused(folder):
    characters = tuple(map(chr, range(126, 31, -1)))
    tiny_tokenizer(characters=characters).save_pretrained(folder)
    with pytest.raises(AdapterFormatError, match="the tokenizer's vocabulary differs from the one"):
        load(folder)


def test_tokenizer_given_in_hand_is_checked_instead(policy, folder):
    assert torch.equal(logits_of(load(folder, tokenizer=tiny_tokenizer())), logits_of(policy))
    with pytest.raises(AdapterFormatError, match="the chat template differs"):
        load(folder, tokenizer=tiny_tokenizer(template="{{ messages }}"))


def test_tokenizer_of_the_base_is_checked_where_the_folder_has_none(folder):
    for name in TOKENIZER_FILES:
        (folder / name).unlink()
    load(folder)


def test_adapter_of_another_size_is_refused(folder):
    with (
        pytest.warns(UserWarning, match="the base model differs"),
        pytest.raises(AdapterFormatError, match="does not fit the base model"),
    ):
        load(folder, base_model=tiny_base(hidden_size=48), verify=False)


EMBEDDINGS = "base_model.model.model.embed_tokens.lora_embedding_A"
EXTRA = "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"), "needs both lora_A and lora_B"),
        (lambda t: [t.pop(name) for name in list(t)], "holds no LoRA tensors"),
        (lambda t: t.update({EXTRA: torch.ones(2)}), r"lora_C.weight' is not part of a LoRA adapter"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), "is not part of a LoRA adapter"),
        (lambda t: t.update({EMBEDDINGS: torch.ones(2)}), "embedding_A' is a LoRA on embeddings.*Leave them out"),
        (
            lambda t: t.update({name: torch.ones(3, 7) for name in t if "lora_A" in name}),
            "does not fit the base model or its own config",
        ),
        (
            lambda t: t.update({name: torch.ones(32) for name in t if "layers.0.self_attn.q_proj" in name}),
            "do not fit together",
        ),
        (
            lambda t: t.update(
                {name: torch.zeros((5000, 32) if "lora_A" in name else (t[name].shape[0], 5000)) for name in t}
            ),
            "the rank is 5000; at most 4096 is read",
        ),
        (
            lambda t: t.update({name.replace("layers.1", "layers.7"): t.pop(name) for name in list(t)}),
            "does not fit",
        ),
        (lambda t: t.update({name: t[name].long() for name in t}), "holds numbers of type"),
    ],
    ids=["missing", "none", "extra", "base", "embeddings", "misshaped", "flat", "high", "elsewhere", "integers"],
)
def test_tensors_that_are_missing_extra_or_misshaped_are_refused(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises((AdapterFormatError, ConfigError), match=message):
        load(folder, verify=False)


def test_tensors_of_fewer_layers_are_an_adapter_too_and_fail_the_probe(folder):
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1" in name])
    with pytest.raises(AdapterFormatError, match="the adapter 'default' gives other log-probabilities"):
        load(folder)


def test_plain_peft_folder_is_pointed_to_wrap(folder):
    way_out = "is a plain PEFT adapter: .*Use `qadapter wrap .*default --output-dir NEW`"
    with pytest.raises(AdapterFormatError, match=way_out):
        load(folder / "adapters" / "default")


def test_empty_folder_is_no_adapter(tmp_path):
    with pytest.raises(AdapterFormatError, match="is not an adapter folder: qadapter_config.json is missing"):
        load(tmp_path)


def test_lost_base_is_named(folder):
    change_json(folder / MANIFEST_NAME, "base", "name", value="/nowhere/base")
    with pytest.raises(ConfigError, match="base model '/nowhere/base': there is no such folder.*--base-model"):
        load(folder)


def test_adapter_of_a_nameless_base_asks_for_one(tmp_path):
    base = tiny_base()
    base.name_or_path = ""
    tiny_policy(base).save_pretrained(tmp_path)
    with pytest.raises(AdapterFormatError, match="does not know its base model's name: pass base_model="):
        load(tmp_path)
    assert load(tmp_path, base_model=tiny_base()).configs == {"default": APART}
