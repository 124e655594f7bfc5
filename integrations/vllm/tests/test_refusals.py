"""What cannot be served exactly is refused before the engine answers anything, with the way out."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from models import APART, lora, tiny_base, tiny_tokenizer
from safetensors.torch import load_file, save_file
from served import SIZES, engine, exported, tiny_folder

from qadapter import QAdapterConfig
from qadapter.errors import AdapterFormatError, ConfigError
from qadapter.export import export_vllm
from qadapter.export.vllm import VLLM_ARCHITECTURES
from qadapter.modeling import hub
from qadapter_vllm import FAMILIES
from qadapter_vllm.startup import StartupChecks


def start(folder, **options):
    """Check the configuration as vLLM does before it reads weights."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(folder), dtype="float32", max_model_len=256, **options).create_engine_config()


def overridden(adapter, architecture="QAdapterLlamaForCausalLM", **entry):
    return {"hf_overrides": {"architectures": [architecture], "qadapter": {"adapter": str(adapter), **entry}}}


@pytest.fixture
def folders(tmp_path):
    """A base, and an adapter folder on it."""
    policy, base = tiny_folder(tmp_path)
    policy.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def test_the_exporter_knows_the_plugin_s_families():
    assert VLLM_ARCHITECTURES == FAMILIES


def test_a_base_with_overrides_is_accepted(folders):
    base, adapter = folders
    config = start(base, **overridden(adapter))
    assert config.model_config.hf_config.qadapter_graph.startswith('{"streams": ["default", ""]')


def test_a_plain_lora_is_refused(folders):
    base, adapter = folders
    for plain in (
        {"folder": base, **overridden(adapter / "adapters" / "default")},
        {"folder": adapter / "adapters" / "default"},
    ):
        with pytest.raises(AdapterFormatError, match="is a plain PEFT adapter.*qadapter wrap"):
            start(**plain)


def test_an_adapter_folder_is_served_with_the_base_that_it_names(folders):
    base, adapter = folders
    config = start(adapter, hf_overrides={"qadapter": {"strength": 0.3}}).model_config
    assert (config.model, config.served_model_name) == (str(base), str(adapter))
    assert config.hf_config.qadapter == {"adapter": str(adapter), "strength": 0.3}
    assert config.tokenizer == str(base)  # this folder has none of its own


@pytest.mark.parametrize(
    ("changes", "options", "match"),
    [
        (
            {"architecture": "GPTNeoXForCausalLM"},
            {},
            "trained on a 'GPTNeoXForCausalLM', which cannot be served on vLLM",
        ),
        ({"name": ""}, {}, "does not know its base model's name"),
        ({}, {"trust_remote_code": True}, "names its own base .* --trust-remote-code would run"),
        ({}, {"hf_overrides": lambda config: config}, "must be dictionaries"),
        ({}, {"hf_overrides": {"qadapter": None}}, "must be dictionaries"),
    ],
)
def test_adapter_folders_that_cannot_be_served_by_themselves(folders, changes, options, match):
    _, adapter = folders
    path = adapter / "qadapter_config.json"
    manifest = json.loads(path.read_text())
    manifest["base"] |= changes
    path.write_text(json.dumps(manifest))
    with pytest.raises((AdapterFormatError, ConfigError), match=match):
        start(adapter, **options)


def test_a_composition_on_the_base_that_an_adapter_folder_names(folders):
    base, adapter = folders
    entry = {"adapters": {"one": str(adapter), "two": str(adapter)}}
    config = start(adapter, hf_overrides={"qadapter": entry}).model_config
    assert (config.model, config.hf_config.qadapter) == (str(base), entry)


def test_a_composition_over_different_bases_is_refused(tmp_path, folders):
    base, adapter = folders
    shutil.copytree(adapter, tmp_path / "other")
    path = tmp_path / "other" / "qadapter_config.json"
    manifest = json.loads(path.read_text())
    manifest["base"] |= {"fingerprint": "another"}
    path.write_text(json.dumps(manifest))
    # Of a quantised copy only the probes would be left to tell.
    entry = {"adapters": {"one": str(adapter), "two": str(tmp_path / "other")}, "quantised": True}
    with pytest.raises(AdapterFormatError, match="and .*other were trained on different base models"):
        start(base, hf_overrides={"architectures": ["QAdapterLlamaForCausalLM"], "qadapter": entry})


def test_base_and_adapter_on_the_hub_are_of_one_revision(tmp_path, monkeypatch):
    policy, _ = tiny_folder(tmp_path)
    folder = exported(policy, tmp_path / "out")
    config = start(folder)
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **kwargs: asked.append((name, kwargs)) or folder)
    config.model_config.model, config.model_config.revision = "me/exported", "v1"
    StartupChecks.verify_and_update_config(config)
    ((name, options),) = asked
    assert (name, options["revision"]) == ("me/exported", "v1")


def test_a_changed_adapter_is_refused(folders):
    base, adapter = folders
    path = adapter / "adapters" / "default" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(AdapterFormatError, match="weights of adapter 'default' have changed"):
        start(base, **overridden(adapter))


def test_another_family_is_refused(tmp_path, folders):
    _, base = tiny_folder(tmp_path, "qwen3")
    with pytest.raises(AdapterFormatError, match="trained on .*, a LlamaForCausalLM; this base is a Qwen3ForCausalLM"):
        start(base, **overridden(folders[1], "QAdapterQwen3ForCausalLM"))


def test_another_base_of_the_family_is_refused(tmp_path, folders):
    tiny_base("llama", seed=9, **SIZES).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with (
        pytest.raises(AdapterFormatError, match="the base model differs: trained on"),
        engine(tmp_path / "other", **overridden(folders[1])),
    ):
        pass


def test_a_probe_that_is_not_met_is_refused(folders):
    base, adapter = folders
    path = adapter / "qadapter_config.json"
    manifest = json.loads(path.read_text())
    token = next(iter(manifest["probe"]["logps"]["default"]))
    manifest["probe"]["logps"]["default"][token] -= 0.1
    path.write_text(json.dumps(manifest))
    match = "adapter 'default' gives other log-prob.*off by 0.1, allowed 0.005"
    with pytest.raises(AdapterFormatError, match=match), engine(base, **overridden(adapter)):
        pass
    with pytest.warns(UserWarning, match="gives other log-prob"), engine(base, **overridden(adapter, verify=False)):
        pass


def test_a_probe_with_unknown_tokens_is_refused(folders):
    base, adapter = folders
    path = adapter / "qadapter_config.json"
    manifest = json.loads(path.read_text())
    manifest["probe"]["input_ids"][3] = 97
    path.write_text(json.dumps(manifest))
    with pytest.raises(AdapterFormatError, match="names tokens that the base"), engine(base, **overridden(adapter)):
        pass


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_dora": True}, "a DoRA adapter rescales.*qadapter serve"),
        ({"target_modules": ["lm_head"]}, "LoRA on 'lm_head' cannot be served on vLLM"),
    ],
)
def test_updates_that_vllm_cannot_run_are_refused(tmp_path, changes, match):
    policy, base = tiny_folder(tmp_path, peft_config=lora(**changes))
    policy.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=match):
        start(base, **overridden(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"enable_lora": True}, "--enable-lora is not supported"),
        ({"load_format": "dummy"}, "--load-format dummy has no base weights"),
        (
            {"kv_transfer_config": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}},
            "caches outside the engine .* are told apart by the base's name",
        ),
        ({"kv_offloading_size": 1, "kv_offloading_backend": "lmcache"}, "caches outside the engine"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "drafts need the V2 model runner"),
    ],
)
def test_engine_options_that_do_not_fit_are_refused(folders, monkeypatch, options, match):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    base, adapter = folders
    with pytest.raises(ConfigError, match=match):
        start(base, **overridden(adapter), **options)


def test_pipeline_parallelism_is_refused_and_a_fusion_that_expects_one_row_a_token_is_off(folders):
    base, adapter = folders
    fused = {"pass_config": {"fuse_allreduce_rms": True}}
    config = start(base, **overridden(adapter), compilation_config=fused)
    assert config.compilation_config.pass_config.fuse_allreduce_rms is False
    config.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(ConfigError, match="pipeline parallelism is not supported: use --tensor-parallel-size"):
        StartupChecks.verify_and_update_config(config)


@pytest.mark.parametrize("method", ["eagle3", "mtp", "suffix"])
def test_drafts_that_read_hidden_states_or_need_the_v1_runner_are_refused(folders, method):
    base, adapter = folders
    config = start(base, **overridden(adapter))
    config.speculative_config = SimpleNamespace(method=method)
    with pytest.raises(ConfigError, match=f"drafts by '{method}' are not supported.*Use n-gram drafts"):
        StartupChecks.verify_and_update_config(config)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"strenght": 0.5}, "unknown keys \\['strenght'\\]"),
        ({"strength": "high"}, "qadapter.strength = 'high': must be a finite number"),
        ({"weights": {"other": 1.0}}, "adapter_weights names \\['other'\\]"),
        ({"adapters": {"a": "b"}}, "exclude each other"),
        ({"dial": "yes"}, "qadapter.dial = 'yes': must be a bool"),
    ],
)
def test_a_wrong_entry_is_refused(folders, entry, match):
    base, adapter = folders
    with pytest.raises(ConfigError, match=match):
        start(base, **overridden(adapter, **entry))


def test_another_tokenizer_is_refused(tmp_path):
    policy, _ = tiny_folder(tmp_path)
    folder = exported(policy, tmp_path / "out")
    tiny_tokenizer(template="{{ messages }}").save_pretrained(folder)
    with pytest.raises(AdapterFormatError, match="the chat template of .* differs.*--tokenizer"):
        start(folder)


@pytest.mark.parametrize(
    ("implementation", "architecture"), [("auto", "LlamaForCausalLM"), ("transformers", "TransformersForCausalLM")]
)
def test_an_entry_without_the_architecture_that_reads_it_is_refused(folders, implementation, architecture):
    base, adapter = folders
    match = rf'which a {architecture} ignores: .*\["QAdapterLlamaForCausalLM"\]'
    with pytest.raises(ConfigError, match=match):
        start(base, hf_overrides={"qadapter": {"adapter": str(adapter)}}, model_impl=implementation)
    assert start(base, model_impl=implementation).model_config.architecture == architecture


def test_an_entry_for_an_architecture_that_cannot_be_served_is_refused(tmp_path, folders):
    tiny_base("granite", max_position_embeddings=256).save_pretrained(tmp_path / "granite")
    tiny_tokenizer().save_pretrained(tmp_path / "granite")
    with pytest.raises(ConfigError, match="which a GraniteForCausalLM ignores: served are Llama.*qadapter serve"):
        start(tmp_path / "granite", hf_overrides={"qadapter": {"adapter": str(folders[1])}})


def test_a_folder_without_an_adapter_is_refused(folders):
    base, _ = folders
    with pytest.raises(ConfigError, match="no `qadapter` entry.*qadapter export --format vllm"):
        start(base, hf_overrides={"architectures": ["QAdapterLlamaForCausalLM"]})


def test_soft_capped_logits_are_refused(tmp_path):
    policy, _ = tiny_folder(tmp_path, "gemma3")
    folder = exported(policy, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))
    with pytest.raises(ConfigError, match="caps its logits softly"):
        start(folder)


def test_the_exporter_refuses_other_architectures(tmp_path):
    base = tiny_base("gemma2")
    base.save_pretrained(tmp_path / "base")
    from qadapter import QAdapterForCausalLM

    policy = QAdapterForCausalLM.from_base(tmp_path / "base", APART, lora())
    with pytest.raises(ConfigError, match="the vLLM plugin has no Gemma2ForCausalLM"):
        export_vllm(policy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_exported_folder_is_whole_and_the_base_untouched(tmp_path):
    policy, base = tiny_folder(tmp_path, config=QAdapterConfig(alpha_tilde=0.3, alpha_0=0.3))
    before = (base / "config.json").read_bytes()
    folder = exported(policy, tmp_path / "out", strength=0.4)
    assert (base / "config.json").read_bytes() == before
    shutil.rmtree(base)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["QAdapterLlamaForCausalLM"]
    assert config["qadapter"] == {"strength": 0.4}
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["model.norm.weight"], policy.base.model.norm.weight)
    start(folder)
