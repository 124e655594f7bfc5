"""The adapter folder: what is in it, that loading gives the same policy, and what is refused by name."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from models import (
    APART,
    defined_logps,
    lora,
    padded,
    plain_peft,
    tiny_base,
    tiny_policy,
    tiny_tokenizer,
    token_ids,
    train_randomly,
    two_passes,
)
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.errors import AdapterFormatError, ConfigError
from qadapter.modeling import checkpoint, loading
from qadapter.modeling.checkpoint import file_digest
from qadapter.modeling.manifest import MANIFEST_NAME, read_manifest

BATCH = padded(token_ids(7, 4, 3))
REAL = BATCH["attention_mask"].bool()
WEIGHTS = "adapters/default/adapter_model.safetensors"
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
ADAPTER_FILES = {MANIFEST_NAME, WEIGHTS, "adapters/default/adapter_config.json"}


def build(root, architecture="llama", dtype=torch.float32, tokenizer=None, peft_config=None, config=APART):
    """A base in root/base and a policy on it with a random adapter, saved in root/out."""
    base = tiny_base(architecture, dtype=dtype)
    base.save_pretrained(root / "base")
    if tokenizer is not None:
        tokenizer.save_pretrained(root / "base")
    policy = QAdapterForCausalLM.from_base(root / "base", config, peft_config or lora()).eval()
    train_randomly(policy).save_pretrained(root / "out", tokenizer=tokenizer)
    return policy


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(policy, its folder's parent), with a tokenizer; not to be changed."""
    root = tmp_path_factory.mktemp("original")
    return build(root, tokenizer=tiny_tokenizer()), root


@pytest.fixture
def policy(original):
    return original[0]


@pytest.fixture
def folder(original, tmp_path):
    """A copy of the adapter folder, free to be changed; it names the base in the original's place."""
    return shutil.copytree(original[1] / "out", tmp_path / "out")


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def logits_of(model, **arguments):
    with torch.no_grad():
        return model(**BATCH, **arguments).logits


def load(folder, **arguments):
    return QAdapterForCausalLM.from_pretrained(folder, **arguments)


def change_json(path, *keys, value):
    """Set an entry of a JSON file, given the keys that lead to it."""
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


def change_tensors(folder, change):
    """Apply `change` to the dict of the adapter's tensors, and let the manifest know the new file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    change_json(folder / MANIFEST_NAME, "adapters", "default", "sha256", value=file_digest(folder / WEIGHTS))


# -- the round trip ------------------------------------------------------------------------------------------------


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


def test_gathered_state_dict_is_saved_like_the_model_itself(policy, tmp_path):
    policy.save_pretrained(tmp_path / "own")
    policy.save_pretrained(tmp_path / "gathered", state_dict=policy.state_dict())
    assert (tmp_path / "gathered" / WEIGHTS).read_bytes() == (tmp_path / "own" / WEIGHTS).read_bytes()


def test_gathered_state_dict_without_the_adapter_is_refused(policy, tmp_path):
    with pytest.raises(ConfigError, match=r"the state_dict lacks \d+ tensors of the adapter 'default', first "):
        policy.save_pretrained(tmp_path, state_dict={})
    assert files_in(tmp_path) == set()


# -- layout --------------------------------------------------------------------------------------------------------


def test_folder_holds_exactly_the_documented_files(folder):
    assert files_in(folder) == ADAPTER_FILES | TOKENIZER_FILES


def test_folder_without_a_tokenizer_holds_the_adapter_alone(tmp_path):
    build(tmp_path)
    assert files_in(tmp_path / "out") == ADAPTER_FILES


def test_peft_reads_the_inner_folder_as_a_plain_lora(policy, original, folder):
    inner = folder / "adapters" / "default"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(original[1] / "base"), inner)
    z_theta, z_base = two_passes(plain_peft(tiny_base(), policy), **BATCH)
    torch.testing.assert_close(plain(**BATCH).logits.double().detach(), z_theta, rtol=1e-5, atol=1e-5)
    expected = defined_logps(z_theta, z_base, APART)
    actual = logits_of(load(folder)).double().log_softmax(-1)
    torch.testing.assert_close(actual[REAL], expected[REAL], rtol=1e-4, atol=1e-4)
    assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(inner)(**BATCH).logits, plain(**BATCH).logits)


def test_transformers_does_not_load_the_folder_as_a_model(folder):
    with pytest.raises((OSError, ValueError), match=r"config\.json|Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_peft_does_not_load_the_folder_as_a_lora(folder):
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(tiny_base(), folder)


# -- saving --------------------------------------------------------------------------------------------------------


def test_saving_twice_to_one_folder_keeps_the_second(policy, folder):
    other = train_randomly(load(folder), seed=8)
    other.save_pretrained(folder)
    assert torch.equal(logits_of(load(folder)), logits_of(other))
    assert not torch.equal(logits_of(other), logits_of(policy))
    assert files_in(folder) == ADAPTER_FILES | TOKENIZER_FILES


def no_space(tensors, path, metadata=None):
    with open(path, "wb") as file:
        file.write(b"half a fi")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_failing_save_leaves_nothing_behind(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        policy.save_pretrained(tmp_path / "new")
    assert files_in(tmp_path / "new") == set()


def test_failing_save_leaves_an_existing_adapter_whole(policy, folder, monkeypatch):
    before = {name: (folder / name).read_bytes() for name in files_in(folder)}
    monkeypatch.setattr(checkpoint, "save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        train_randomly(load(folder), seed=8).save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in files_in(folder)} == before
    assert torch.equal(logits_of(load(folder)), logits_of(policy))


@pytest.mark.parametrize("moves", range(5))
def test_save_that_dies_while_moving_files_leaves_no_adapter_rather_than_a_mixed_one(folder, moves, monkeypatch):
    other = train_randomly(load(folder), seed=8)
    done = []

    def replace(source, target):
        if os.path.dirname(target) in (str(folder), str(folder / "adapters")):
            if len(done) == moves:
                raise OSError(errno.EIO, "Input/output error")
            done.append(target)
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", replace)
        with pytest.raises(OSError, match="Input/output error"):
            other.save_pretrained(folder, tokenizer=tiny_tokenizer())
    with pytest.raises(AdapterFormatError, match="is not an adapter folder"):
        load(folder)
    other.save_pretrained(folder, tokenizer=tiny_tokenizer())
    assert torch.equal(logits_of(load(folder)), logits_of(other))


def test_saving_onto_a_file_is_refused(policy, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="is a file: an adapter is a folder"):
        policy.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_saving_keeps_other_files_of_the_folder(policy, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    policy.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


class Hub:
    """Stands in for huggingface_hub.HfApi and records what it is asked for."""

    calls: list

    def __init__(self, token=None):
        Hub.calls = [("token", token)]

    def create_repo(self, repo_id, private=None, exist_ok=False):
        Hub.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, repo_id, folder_path, commit_message):
        Hub.calls.append(("upload", repo_id, files_in(Path(folder_path))))
        return "commit"


def test_push_uploads_the_adapter_folder(policy, monkeypatch):
    monkeypatch.setattr(checkpoint, "HfApi", Hub)
    assert policy.push_to_hub("me/polite", private=True, token="secret") == "commit"
    token, create, (kind, repo_id, files) = Hub.calls
    assert token == ("token", "secret")
    assert create == ("create", "me/polite", True, True)
    assert (kind, repo_id) == ("upload", "me/polite")
    assert files >= ADAPTER_FILES


def test_save_pretrained_can_push(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "HfApi", Hub)
    policy.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/polite")
    assert Hub.calls[1][:2] == ("create", "me/polite")
    assert files_in(tmp_path / "out") == ADAPTER_FILES


# -- from the hub --------------------------------------------------------------------------------------------------


def test_hub_snapshot_of_links_into_a_cache_is_read(policy, folder, tmp_path, monkeypatch):
    """The hub's cache holds snapshots of links to files in a folder beside them."""
    snapshot, blobs, asked = tmp_path / "snapshots" / "1a2b", tmp_path / "blobs", {}
    blobs.mkdir()
    for index, name in enumerate(sorted(files_in(folder))):
        shutil.copy(folder / name, blobs / str(index))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(index))

    def download(repo_id, revision=None, token=None, allow_patterns=None):
        asked.update(repo_id=repo_id, revision=revision, token=token)
        return str(snapshot)

    monkeypatch.setattr(loading, "snapshot_download", download)
    loaded = load("me/polite", revision="v2", token="secret")
    assert torch.equal(logits_of(loaded), logits_of(policy))
    assert asked == {"repo_id": "me/polite", "revision": "v2", "token": "secret"}


def test_unreachable_hub_is_named(monkeypatch):
    def download(*args, **kwargs):
        raise ConnectionError("no route to host\nlong story")

    monkeypatch.setattr(loading, "snapshot_download", download)
    with pytest.raises(AdapterFormatError, match=r"me/polite: no such folder here, .*\(no route to host\)"):
        load("me/polite")


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "./a/b", "~/adapter"])
def test_missing_folder_is_named_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(loading, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(AdapterFormatError, match="there is no such adapter folder. Train one"):
        load(name)


# -- what is refused, by name --------------------------------------------------------------------------------------


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
    with pytest.raises(AdapterFormatError, match="holds NaN or infinity: the adapter is damaged"):
        load(folder)


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


EXTRA = "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"), "needs both lora_A and lora_B"),
        (lambda t: [t.pop(name) for name in list(t)], "holds no LoRA tensors"),
        (lambda t: t.update({EXTRA: torch.ones(2)}), r"lora_C.weight' is not part of a LoRA adapter"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), "is not part of a LoRA adapter"),
        (
            lambda t: t.update({name: torch.ones(3, 7) for name in t if "lora_A" in name}),
            "does not fit the base model or its own config",
        ),
        (
            lambda t: t.update({name: torch.ones(32) for name in t if "layers.0.self_attn.q_proj" in name}),
            "do not fit together",
        ),
        (
            lambda t: t.update({name.replace("layers.1", "layers.7"): t.pop(name) for name in list(t)}),
            "does not fit",
        ),
        (lambda t: t.update({name: t[name].long() for name in t}), "holds numbers of type"),
    ],
    ids=["missing", "none", "extra", "base weights", "misshaped", "flat", "elsewhere", "integers"],
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
    with pytest.raises(AdapterFormatError, match=r"is a plain PEFT adapter: .*Use `qadapter wrap .*default`"):
        load(folder / "adapters" / "default")


def test_empty_folder_is_no_adapter(tmp_path):
    with pytest.raises(AdapterFormatError, match="is not an adapter folder: qadapter_config.json is missing"):
        load(tmp_path)


def test_lost_base_is_named(folder):
    change_json(folder / MANIFEST_NAME, "base", "name", value="/nowhere/base")
    with pytest.raises(ConfigError, match="base model '/nowhere/base' cannot be loaded"):
        load(folder)


def test_adapter_of_a_nameless_base_asks_for_one(tmp_path):
    base = tiny_base()
    base.name_or_path = ""
    tiny_policy(base).save_pretrained(tmp_path)
    with pytest.raises(AdapterFormatError, match="does not know its base model's name: pass base_model="):
        load(tmp_path)
    assert load(tmp_path, base_model=tiny_base()).configs == {"default": APART}


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


def test_a_folder_from_before_the_choice_of_penalty_means_that_of_rewards(folder):
    content = json.loads((folder / MANIFEST_NAME).read_text())
    del content["adapters"]["default"]["penalty"]
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    assert load(folder).configs["default"].penalty == "reward"


def test_the_penalty_travels_with_the_folder(tmp_path):
    policy = tiny_policy(config=QAdapterConfig(penalty="kl", beta=0.3))
    policy.save_pretrained(tmp_path, tokenizer=tiny_tokenizer())
    assert read_manifest(tmp_path).configs["default"]["penalty"] == "kl"
