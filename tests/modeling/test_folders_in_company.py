"""Several adapter folders on one base, foreign LoRAs wrapped, and exports read by other tools."""

import json
import shutil
from importlib import import_module

import models
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qadapter import AdapterFormatError, ConfigError, QAdapterConfig, QAdapterForCausalLM
from qadapter.export import distil, export_gguf_ready, export_lora, export_merged
from qadapter.functional import kl_divergence
from qadapter.modeling.wrapping import wrap

IDS = torch.tensor(models.token_ids(9, 9))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base on disk, and two adapter folders trained on it."""
    root = tmp_path_factory.mktemp("folders")
    models.tiny_base().save_pretrained(root / "base")
    models.tiny_tokenizer().save_pretrained(root / "base")
    for seed, (name, lora) in enumerate(
        {"concise": models.lora(), "polite": models.lora(r=2, target_modules=["q_proj"])}.items()
    ):
        policy = QAdapterForCausalLM.from_base(root / "base", QAdapterConfig(), lora).eval()
        models.train_randomly(policy, seed + 1).save_pretrained(root / name, tokenizer=models.tiny_tokenizer())
    return root


def logits(model, **settings):
    with torch.no_grad():
        return model(IDS, **settings).logits


def test_adapter_folders_compose_on_one_base(folders):
    paths = {"concise": folders / "concise", "polite": folders / "polite"}
    weights = {"concise": 0.8, "polite": 0.4}
    both = QAdapterForCausalLM.from_pretrained(folders / "base", adapters=paths, adapter_weights=weights)
    alone = {name: logits(QAdapterForCausalLM.from_pretrained(path)) for name, path in paths.items()}
    z_base = logits(both, strength=0.0)
    expected = z_base + sum(weights[name] * (alone[name] - z_base) for name in paths)
    torch.testing.assert_close(logits(both), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interpolation", ["logits", "weights"])
def test_the_order_in_which_folders_are_given_changes_nothing(folders, interpolation):
    weights = {"concise": 0.8, "polite": -0.4}
    first, second = (
        logits(
            QAdapterForCausalLM.from_pretrained(
                folders / "base",
                adapters={name: folders / name for name in names},
                adapter_weights={name: weights[name] for name in names},
                interpolation=interpolation,
            )
        )
        for names in (["concise", "polite"], ["polite", "concise"])
    )
    # The streams may be summed in another order: float32 rounding.
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_folders_keep_their_stored_weights_in_company(folders, tmp_path):
    stored = QAdapterForCausalLM.from_pretrained(folders / "polite")
    stored.adapter_weights = {"default": 0.25}
    stored.save_pretrained(tmp_path / "faint", tokenizer=models.tiny_tokenizer())
    paths = {"concise": folders / "concise", "faint": tmp_path / "faint"}
    both = QAdapterForCausalLM.from_pretrained(folders / "base", adapters=paths)
    assert both.adapter_weights == {"concise": 1.0, "faint": 0.25}


def test_a_composition_survives_saving_and_loading(folders, tmp_path):
    paths, weights = {"short": folders / "concise", "kind": folders / "polite"}, {"short": 0.8, "kind": -0.4}
    both = QAdapterForCausalLM.from_pretrained(folders / "base", adapters=paths, adapter_weights=weights)
    both.save_pretrained(tmp_path / "both")
    again = QAdapterForCausalLM.from_pretrained(tmp_path / "both")
    assert again.adapter_weights == weights
    # The file's adapters are sorted by name, so their streams may be summed in another order: float32 rounding.
    torch.testing.assert_close(logits(both), logits(again), rtol=1e-5, atol=1e-5)


def test_adapters_of_different_bases_are_refused(folders, tmp_path):
    models.tiny_base(seed=9).save_pretrained(tmp_path / "other")
    stranger = QAdapterForCausalLM.from_base(tmp_path / "other", peft_config=models.lora())
    stranger.save_pretrained(tmp_path / "stranger")
    paths = {"concise": folders / "concise", "stranger": tmp_path / "stranger"}
    with pytest.raises(AdapterFormatError, match="/concise and .*/stranger were trained on different base models"):
        QAdapterForCausalLM.from_pretrained(folders / "base", adapters=paths)


def test_adapters_of_different_templates_are_refused(folders, tmp_path):
    policy = QAdapterForCausalLM.from_base(folders / "base", peft_config=models.lora())
    policy.save_pretrained(
        tmp_path / "shouting", tokenizer=models.tiny_tokenizer(template="{{ messages[0]['content'] }}!")
    )
    paths = {"concise": folders / "concise", "shouting": tmp_path / "shouting"}
    with pytest.raises(AdapterFormatError, match="different chat template: they cannot be composed"):
        QAdapterForCausalLM.from_pretrained(folders / "base", adapters=paths)


def test_weights_of_an_unknown_adapter_are_refused(folders):
    with pytest.raises(ConfigError, match=r"adapter_weights names \['loud'\]"):
        QAdapterForCausalLM.from_pretrained(
            folders / "base", adapters={"concise": folders / "concise"}, adapter_weights={"loud": 1.0}
        )


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "0.5", torch.tensor([0.5, 1.0])])
def test_weights_that_are_no_finite_numbers_are_refused(folders, weight):
    with pytest.raises(ConfigError, match=r"adapter_weights\['concise'\] = .*must be a finite number"):
        QAdapterForCausalLM.from_pretrained(
            folders / "base", adapters={"concise": folders / "concise"}, adapter_weights={"concise": weight}
        )


@pytest.fixture(scope="module")
def foreign_lora(folders):
    """A plain LoRA as PEFT itself saves it, with a regular expression for its targets."""
    folder = folders / "foreign"
    plain = models.plain_peft(models.tiny_base(), QAdapterForCausalLM.from_pretrained(folders / "concise"))
    plain.peft_config["default"].base_model_name_or_path = str(folders / "base")
    plain.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = r".*\.(q|k|v|o|gate|up|down)_proj"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_wrapped_lora_at_strength_one_writes_what_peft_writes(folders, foreign_lora, tmp_path):
    policy, tokenizer = wrap(foreign_lora)
    policy.save_pretrained(tmp_path / "wrapped", tokenizer=tokenizer)
    wrapped = QAdapterForCausalLM.from_pretrained(tmp_path / "wrapped")
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    peft = PeftModel.from_pretrained(base, foreign_lora).eval()
    options = {"do_sample": False, "max_new_tokens": 12}
    assert torch.equal(wrapped.generate(IDS, **options), peft.generate(input_ids=IDS, **options))
    with peft.disable_adapter():
        assert torch.equal(wrapped.generate(IDS, strength=0.0, **options), peft.generate(input_ids=IDS, **options))


def test_wrapping_an_adapter_folder_of_ours_is_refused(folders):
    with pytest.raises(AdapterFormatError, match="is an adapter folder of qadapter already"):
        wrap(folders / "concise")


def test_the_merged_checkpoint_writes_what_the_policy_writes(folders, tmp_path):
    policy = QAdapterForCausalLM.from_pretrained(folders / "concise")
    difference = export_merged(policy, tmp_path / "merged", models.tiny_tokenizer())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert difference < 1e-4
    options = {"do_sample": False, "max_new_tokens": 12}
    assert torch.equal(policy.generate(IDS, **options), merged.generate(IDS, **options))


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True}, {"target_modules": ["lm_head", "q_proj"]}])
def test_other_kinds_of_lora_merge_exactly_too(folders, tmp_path, kind):
    policy = QAdapterForCausalLM.from_base(folders / "base", QAdapterConfig(), models.lora(**kind)).eval()
    models.train_randomly(policy)
    assert export_merged(policy, tmp_path / "merged") < 1e-4


def test_the_policy_is_unchanged_by_merging(folders, tmp_path):
    policy = QAdapterForCausalLM.from_pretrained(folders / "concise")
    before = logits(policy), logits(policy, strength=0.0)
    export_merged(policy, tmp_path / "merged")
    assert torch.equal(before[0], logits(policy))
    assert torch.equal(before[1], logits(policy, strength=0.0))


def test_the_exported_lora_is_read_by_peft(folders, tmp_path):
    policy = QAdapterForCausalLM.from_pretrained(folders / "concise")
    export_lora(policy, tmp_path / "lora")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders / "base"), tmp_path / "lora").eval()
    assert torch.equal(logits(policy), logits(peft))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (QAdapterConfig(alpha_0=0.3), "alpha_0 differs from alpha_tilde"),
        (QAdapterConfig.preset("authors"), "it is of the logits form"),
    ],
)
def test_a_policy_that_needs_both_streams_is_not_merged(folders, tmp_path, config, reason):
    policy = QAdapterForCausalLM.from_base(folders / "base", config, models.lora())
    with pytest.raises(ConfigError, match=f"cannot be merged exactly: {reason}.*--format distilled"):
        export_merged(policy, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_exporting_into_a_folder_in_use_is_refused(folders, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export_lora(QAdapterForCausalLM.from_pretrained(folders / "concise"), tmp_path)


def test_the_gguf_ready_folder_maps_onto_gguf_names(folders, tmp_path):
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    policy = QAdapterForCausalLM.from_pretrained(folders / "concise")
    export_gguf_ready(policy, tmp_path / "ready", models.tiny_tokenizer())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name in AutoModelForCausalLM.from_pretrained(tmp_path / "ready").state_dict():
        assert names.get_name(name, try_suffixes=(".weight", ".bias")), name
    assert "convert_hf_to_gguf.py ready" in (tmp_path / "ready" / "README.md").read_text()


def test_distilling_closes_most_of_the_gap_at_a_setting_that_cannot_be_merged(folders):
    policy = QAdapterForCausalLM.from_base(folders / "base", QAdapterConfig(alpha_0=0.08), models.lora()).eval()
    models.train_randomly(policy, scale=0.1)
    prompts = [f"say {index} {index * 7}" for index in range(60)]
    options = {"epochs": 8, "max_new_tokens": 8, "batch_size": 12, "learning_rate": 1e-3}
    result = distil(policy, models.tiny_tokenizer(), prompts, strength=0.5, **options)
    assert result.held_out_prompts + result.train_prompts == 60
    assert result.kl_after < result.kl_before
    assert result.kl_after < 0.5 * result.kl_base


def test_every_setting_of_the_dial_is_distilled(folders):
    paths = {name: folders / name for name in ("concise", "polite")}
    policy = QAdapterForCausalLM.from_pretrained(folders / "base", adapters=paths)
    prompts, options = [f"say {index}" for index in range(8)], {"epochs": 0, "max_new_tokens": 4}

    def gaps(**dial):
        result = distil(policy, models.tiny_tokenizer(), prompts, dial=dial, **options)
        return result.kl_base, result.kl_before

    weights = {"concise": 0.7, "polite": 0.2}
    for dial in ({"max_kl": 0.0}, {"min_kl": 1e3}, {"adapter_weights": {}}):
        assert gaps(**dial)[0] == pytest.approx(0.0, abs=1e-5)
    interpolated = gaps(adapter_weights=weights, interpolation="weights")
    assert interpolated[0] > 0.01  # from the base
    assert interpolated[1] == pytest.approx(0.0, abs=1e-5)  # from the student, which begins as their sum
    assert gaps(adapter_weights=weights)[1] > 1e-3


def test_a_decaying_strength_is_distilled_as_it_is_generated(folders):
    distillation = import_module("qadapter.export.distil")
    policy = QAdapterForCausalLM.from_pretrained(folders / "concise")
    dial = {"strength": 1.5, "decay": 0.5}
    batch = distillation._sampled(policy, models.tiny_tokenizer(), ["say it", "so"], dial, 5)
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    gaps = []
    for row in range(2):
        inputs = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        for step, place in enumerate(batch["predicts"][row].nonzero().flatten().tolist()):
            with torch.no_grad():
                target = policy(**inputs, strength=1.5 * 0.5**step).logits[:, place]
                gaps.append(float(kl_divergence(target, base(**inputs).logits[:, place])))
    assert distillation._divergence(policy, base, batch, dial).item() == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_held_out_prompts_are_none_that_are_trained_on(folders, batch_size, monkeypatch):
    distillation = import_module("qadapter.export.distil")  # the function hides its module
    sampled, answers = [], distillation._sampled
    monkeypatch.setattr(distillation, "_sampled", lambda *args: sampled.extend(args[2]) or answers(*args))
    policy = QAdapterForCausalLM.from_pretrained(folders / "concise")
    prompts = [f"say {index}" for index in range(7)]
    options = {"epochs": 1, "max_new_tokens": 2, "batch_size": batch_size}
    result = distil(policy, models.tiny_tokenizer(), prompts * 4, **options)
    assert sorted(sampled) == prompts
    assert (result.held_out_prompts, result.train_prompts) == ((2, 5) if batch_size == 2 else (3, 4))


def test_distilling_on_too_few_prompts_is_refused(folders):
    policy = QAdapterForCausalLM.from_pretrained(folders / "concise")
    with pytest.raises(ConfigError, match="2 different prompts were given: distilling needs at least 5"):
        distil(policy, models.tiny_tokenizer(), ["a", "b"] * 5)


def test_a_moved_folder_still_loads(folders, tmp_path):
    shutil.copytree(folders / "concise", tmp_path / "moved")
    first, second = (QAdapterForCausalLM.from_pretrained(path) for path in (folders / "concise", tmp_path / "moved"))
    assert torch.equal(logits(first), logits(second))
