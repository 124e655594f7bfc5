"""A policy loaded from its folder is the policy that was saved: logits bit by bit, settings, weights, penalty."""

import dataclasses
import json
import shutil

import pytest
import torch
from models import APART, lora, tiny_base, tiny_policy, tiny_tokenizer, train_randomly
from saved_adapters import REAL, build, change_json, load, logits_of

from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.config import ADDED_LATER
from qadapter.errors import AdapterFormatError
from qadapter.modeling.manifest import MANIFEST_NAME, read_manifest


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_loaded_policy_gives_bit_equal_logits(policy, folder, strength):
    assert torch.equal(logits_of(load(folder), strength=strength), logits_of(policy, strength=strength))


KINDS = {
    "gpt2": ("gpt2", {}),
    "phi": ("phi", {}),
    "tied head": ("gemma3", {}),
    "DoRA": ("llama", {"use_dora": True}),
    "rsLoRA": ("llama", {"use_rslora": True}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "ranks": ("llama", {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 1, "layers.1.mlp.up_proj": 9}}),
    "patterns": (
        "llama",
        {
            "target_modules": r".*layers\.1\..*_proj",
            "rank_pattern": {r".*(q|k)_proj": 5},
            "alpha_pattern": {r".*(q|k)_proj": 1},
        },
    ),
    "one layer": ("llama", {"target_modules": ["up_proj"], "layers_to_transform": [1]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_all_kinds_survive_the_round_trip(kind, tmp_path):
    architecture, changes = KINDS[kind]
    policy = build(tmp_path, architecture, peft_config=lora(**changes))
    loaded = load(tmp_path / "out")
    assert torch.equal(logits_of(loaded), logits_of(policy))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(policy))


def test_a_cap_of_the_models_own_does_not_stand_in_the_way_of_loading(tmp_path):
    policy = build(tmp_path)
    policy.strength, policy.max_kl, policy.min_kl = 0.5, 0.01, 5.0
    policy.save_pretrained(tmp_path / "capped")
    assert (policy.strength, policy.max_kl, policy.min_kl) == (0.5, 0.01, 5.0)
    policy.strength, policy.max_kl, policy.min_kl = 1.0, None, None
    assert torch.equal(logits_of(load(tmp_path / "capped")), logits_of(policy))


def test_bfloat16_policy_survives_the_round_trip(tmp_path):
    policy = build(tmp_path, dtype=torch.bfloat16)
    loaded = load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.adapter_parameters().values()} == {torch.float32}
    assert torch.equal(logits_of(loaded), logits_of(policy))


def test_policy_trained_in_float32_loads_in_bfloat16(policy, folder):
    loaded = load(folder, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits of logits up to 20, summed over two streams.
    difference = logits_of(loaded).float().log_softmax(-1) - logits_of(policy).log_softmax(-1)
    assert 0 < difference[REAL].abs().max() < 1.0


def test_loaded_policy_knows_its_settings_and_is_ready_to_use(policy, folder):
    loaded = load(folder)
    assert loaded.configs == policy.configs
    assert loaded.adapter_weights == {"default": 1.0}
    assert loaded.tokenizer_fingerprint == policy.tokenizer_fingerprint
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_base_in_hand_may_replace_the_one_by_name(policy, folder):
    assert torch.equal(logits_of(load(folder, base_model=tiny_base())), logits_of(policy))


def test_moved_base_is_found_by_its_new_place(policy, original, folder, tmp_path):
    moved = shutil.copytree(original[1] / "base", tmp_path / "moved")
    loaded = load(folder, base_model=moved)
    assert torch.equal(logits_of(loaded), logits_of(policy))
    assert loaded.base_source.name == str(moved)


def test_default_weight_of_an_adapter_is_stored(folder, tmp_path):
    loaded = load(folder)
    loaded.adapter_weights["default"] = 0.25
    loaded.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").adapter_weights == {"default": 0.25}


def test_saving_leaves_the_model_as_it_was(policy, tmp_path):
    policy = tiny_policy().train()
    policy.adapter_weights["default"] = 0.5
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.save_pretrained(tmp_path)
    assert policy.training
    assert policy.adapter_weights == {"default": 0.5}
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_two_adapters_are_saved_and_loaded_together(tmp_path):
    base = tiny_base()
    configs = {"first": APART, "second": QAdapterConfig("logits", alpha_tilde=2.0, alpha_0=1.5)}
    peft_configs = {"first": lora(), "second": lora(r=5, target_modules=["q_proj"])}
    policy = train_randomly(QAdapterForCausalLM(base, configs, peft_configs).eval())
    policy.adapter_weights = {"first": 0.7, "second": -0.4}
    policy.save_pretrained(tmp_path)
    loaded = load(tmp_path, base_model=tiny_base())
    assert loaded.adapter_weights == policy.adapter_weights
    assert torch.equal(logits_of(loaded), logits_of(policy))
    change_json(tmp_path / MANIFEST_NAME, "adapters", "second", "alpha_0", value=0.1)
    with pytest.raises(AdapterFormatError, match="the adapter 'second' gives other log-probabilities"):
        load(tmp_path, base_model=tiny_base())


def test_every_setting_is_of_the_first_folders_or_has_what_it_meant_before_it_came():
    """A setting that is in neither would make every folder that is there unreadable."""
    first = {"parametrisation", "alpha_tilde", "alpha_0", "gamma", "beta", "length_normalised", "label_smoothing"}
    assert {setting.name for setting in dataclasses.fields(QAdapterConfig)} == first | ADDED_LATER.keys()
    assert not first & ADDED_LATER.keys()


@pytest.mark.parametrize(("name", "meant"), ADDED_LATER.items())
def test_a_folder_from_before_a_setting_means_what_it_was_trained_with(folder, name, meant):
    content = json.loads((folder / MANIFEST_NAME).read_text())
    del content["adapters"]["default"][name]
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    assert getattr(load(folder).configs["default"], name) == meant


def test_the_objective_travels_with_the_folder(tmp_path):
    policy = tiny_policy(config=QAdapterConfig(penalty="kl", beta=0.3, gamma=0.9, discount_floor=0.2))
    policy.save_pretrained(tmp_path, tokenizer=tiny_tokenizer())
    stored = read_manifest(tmp_path).configs["default"]
    assert {name: stored[name] for name in ("penalty", "gamma", "discount_floor")} == {
        "penalty": "kl",
        "gamma": 0.9,
        "discount_floor": 0.2,
    }
