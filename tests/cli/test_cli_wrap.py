"""`qadapter wrap` on folders laid out as other trainers write them; PEFT's own reading of each is the oracle.

Where the layouts come from:
  axolotl       src/axolotl/train.py saves the adapter's, the tokenizer's and the model's config before it trains, so
                that a config.json lies beside adapter_config.json; settings and files as in the adapters of FinLoRA
                (github.com/wangd12rpi/FinLoRA, trained with 0.9) and, for 0.4 to 0.6, of models on the hub that are
                tagged `axolotl`, which have the weights twice, pickled and not.
  LLaMA-Factory src/llamafactory/model/adapter.py, and the file lists of adapters tagged `llama-factory`.
  Unsloth       target_modules as one regular expression, auto_mapping with a key of its own, a base in 4 bits.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from commands import assert_refused, qadapter, succeeded
from models import lora, token_ids, train_randomly
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapter import QAdapterForCausalLM
from qadapter.errors import AdapterFormatError
from qadapter.export import export_lora
from qadapter.modeling import wrapping
from qadapter.modeling.bases import BaseSource, load_base
from qadapter.modeling.wrapping import _require_frozen, wrap

IDS = torch.tensor(token_ids(9, 9))
GREEDY = {"do_sample": False, "max_new_tokens": 20}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# adapter_config.json by the version of PEFT: what each adds to the one before.
PEFT_0_6 = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "task_type": "CAUSAL_LM",
}
PEFT_0_10 = PEFT_0_6 | {
    "layer_replication": None,
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "use_dora": False,
    "use_rslora": False,
}
PEFT_0_15 = PEFT_0_10 | {
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "lora_bias": False,
    "trainable_token_indices": None,
}
PEFT_0_19 = PEFT_0_15 | {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "ensure_weight_tying": False,
    "lora_ga_config": None,
    "peft_version": "0.19.1",
    "qalora_group_size": 16,
    "target_parameters": None,
    "use_bdlora": None,
    "use_qalora": False,
}
# axolotl hands fan_in_fan_out on as it is left in its YAML, and an empty list of target parameters.
AXOLOTL_0_9 = PEFT_0_15 | {"fan_in_fan_out": None, "target_modules": ["v_proj", "q_proj", "k_proj"]}
UNSLOTH_TARGETS = (
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?\.(?:q_proj|v_proj|o_proj))"
    r"|(?:\bmodel\.layers\.[\d]{1,}\..*?(?:self_attn|mlp).*?\.(?:(?:q_proj|v_proj|o_proj)))"
)
CONFIGS = {
    "axolotl 0.4": PEFT_0_10 | {"target_modules": ALL_LINEAR},
    "axolotl 0.9": AXOLOTL_0_9,
    "axolotl 0.9, DoRA": AXOLOTL_0_9 | {"use_dora": True},
    "axolotl 0.9, rsLoRA": AXOLOTL_0_9 | {"use_rslora": True, "inference_mode": False},
    "axolotl, newest": PEFT_0_19
    | {"fan_in_fan_out": None, "target_modules": ALL_LINEAR, "target_parameters": [], "lora_alpha": 32.0},
    "LLaMA-Factory": PEFT_0_10 | {"target_modules": ALL_LINEAR, "lora_alpha": 8},
    "Unsloth": PEFT_0_19
    | {
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        },
        "base_model_name_or_path": "unsloth/llama-3.2-1b-instruct-unsloth-bnb-4bit",
        "kasa_config": None,
        "lora_dropout": 0,
        "monteclora_config": None,
        "target_modules": UNSLOTH_TARGETS,
        "velora_config": None,
    },
}
LLAMA_FACTORY_FILES = ("all_results.json", "train_results.json", "trainer_log.jsonl", "trainer_state.json")


def write_tokenizer(folder, base, kind):
    """The tokenizer's files as transformers 4 wrote them, the template inside, with `kind` for its class."""
    shutil.copy(base / "tokenizer.json", folder)
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = special | {
        "added_tokens_decoder": {
            str(index): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for index, token in enumerate(["<pad>", "</s>"])
        },
        "chat_template": AutoTokenizer.from_pretrained(base).chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "tokenizer_class": kind,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_model_config(folder, base, bits):
    """config.json as axolotl saves it: the base's, with the quantisation that it was trained under."""
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "_load_in_4bit": bits == 4,
        "_load_in_8bit": bits == 8,
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "quant_method": "bitsandbytes",
    }
    config |= {"torch_dtype": "bfloat16", "transformers_version": "4.51.3", "use_cache": False}
    (folder / "config.json").write_text(json.dumps(config))


def write_lora(folder, base, config, dtype=torch.float32, **changes):
    """Write config and random tensors of a LoRA on `base`; the tensors."""
    folder.mkdir()
    targets = config["target_modules"]
    rank, alpha = config["r"], config["lora_alpha"]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        lora(r=rank, lora_alpha=alpha, target_modules=targets, use_dora=config["use_dora"], **changes),
    )
    tensors = get_peft_model_state_dict(train_randomly(model), save_embedding_layers=False)
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    named = {"base_model_name_or_path": str(base)} | config
    (folder / "adapter_config.json").write_text(json.dumps(named, indent=2, sort_keys=True))
    return tensors


@pytest.fixture(params=CONFIGS)
def foreign(request, base, tmp_path):
    """A folder as one of the trainers writes it."""
    trainer, folder = request.param, tmp_path / "foreign"
    write_lora(folder, base, CONFIGS[trainer], torch.bfloat16 if trainer == "LLaMA-Factory" else torch.float32)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    write_tokenizer(folder, base, "PreTrainedTokenizer" if "0.9" in trainer else "PreTrainedTokenizerFast")
    if trainer.startswith("axolotl"):
        write_model_config(folder, base, bits=8 if "0.9" in trainer else 4)
        (folder / "checkpoint-20").mkdir()
    if trainer == "axolotl 0.4":
        (folder / "adapter_model.bin").write_bytes(b"a pickle")
        (folder / "added_tokens.json").write_text('{"<pad>": 0}')
    if trainer == "LLaMA-Factory":
        for name in LLAMA_FACTORY_FILES:
            (folder / name).write_text("{}\n")
    return folder


def test_a_foreign_folder_is_peft_s_model_at_strength_1_and_the_base_at_0(foreign, base, tmp_path):
    succeeded(qadapter("wrap", foreign, "--base-model", base, "--output-dir", tmp_path / "wrapped"))
    policy = QAdapterForCausalLM.from_pretrained(tmp_path / "wrapped")
    plain = AutoModelForCausalLM.from_pretrained(base)
    expected_base = plain.generate(IDS, **GREEDY)
    expected = PeftModel.from_pretrained(plain, foreign).eval().generate(input_ids=IDS, **GREEDY)
    assert torch.equal(policy.generate(IDS, **GREEDY), expected)
    assert torch.equal(policy.generate(IDS, strength=0.0, **GREEDY), expected_base)
    assert not torch.equal(expected, expected_base)
    wrapped, original = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "wrapped", base))
    assert wrapped.chat_template == original.chat_template is not None
    assert wrapped("Question 3?</s>").input_ids == original("Question 3?</s>").input_ids


def test_the_base_that_an_axolotl_folder_names_is_found_without_being_given(base, tmp_path):
    """Though the folder's own config.json looks like a model's."""
    write_lora(tmp_path / "foreign", base, AXOLOTL_0_9)
    write_model_config(tmp_path / "foreign", base, bits=8)
    succeeded(qadapter("wrap", tmp_path / "foreign", "--output-dir", tmp_path / "wrapped"))
    facts = json.loads(succeeded(qadapter("info", tmp_path / "wrapped", "--json")))
    assert facts["base"] == str(base)


def test_the_revision_of_the_base_that_a_folder_names_is_kept(base, tmp_path, monkeypatch):
    """But for another base, which has other revisions; and by our own plain LoRA, where the base is on the hub."""
    write_lora(tmp_path / "foreign", base, AXOLOTL_0_9 | {"base_model_name_or_path": "someone/base", "revision": "v2"})
    asked = []

    def load(source, **options):
        asked.append(source)
        return load_base(BaseSource(str(base), str(base), None), **options)

    monkeypatch.setattr(wrapping, "load_base", load)
    policy, _ = wrap(tmp_path / "foreign", tokenizer=AutoTokenizer.from_pretrained(base))
    wrap(tmp_path / "foreign", "someone/other", tokenizer=AutoTokenizer.from_pretrained(base))
    assert asked == [
        BaseSource("someone/base", "someone/base", "v2"),
        BaseSource("someone/other", "someone/other", None),
    ]
    export_lora(policy, tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/base", "v2")


def test_a_revision_that_is_no_text_is_refused(base, tmp_path):
    write_lora(tmp_path / "foreign", base, AXOLOTL_0_9 | {"revision": ["v2"]})
    outcome = qadapter("wrap", tmp_path / "foreign", "--output-dir", tmp_path / "wrapped")
    assert_refused(outcome, r"adapter_config\.json: revision is \['v2'\], must be a text or null")


def test_pickled_weights_are_refused_with_the_command_that_converts_them(base, tmp_path):
    """Which is right: run, it makes the folder one that can be wrapped."""
    folder = tmp_path / "it's $(touch foreign)"
    tensors = write_lora(folder, base, PEFT_0_6 | {"target_modules": ["q_proj", "v_proj"], "use_dora": False})
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    outcome = qadapter("wrap", folder, "--output-dir", tmp_path / "wrapped")
    assert_refused(outcome, r"safetensors is missing \(pickled weights are never read\)\. Convert them: python -c", 1)
    _, *arguments = shlex.split(re.search(r"(python -c .*)\n", outcome.err)[1])
    assert arguments[2:] == [str(folder / name) for name in ("adapter_model.bin", "adapter_model.safetensors")]
    subprocess.run([sys.executable, *arguments], check=True, timeout=100)
    succeeded(qadapter("wrap", folder, "--output-dir", tmp_path / "wrapped"))


def test_an_interrupted_run_is_pointed_to_its_checkpoints(base, tmp_path):
    """axolotl writes adapter_config.json before the first step."""
    folder = tmp_path / "foreign"
    write_lora(folder, base, AXOLOTL_0_9)
    (folder / "checkpoint-20").mkdir()
    (folder / "adapter_model.safetensors").rename(folder / "checkpoint-20/adapter_model.safetensors")
    shutil.copy(folder / "adapter_config.json", folder / "checkpoint-20")
    outcome = qadapter("wrap", folder, "--output-dir", tmp_path / "wrapped")
    assert_refused(
        outcome,
        r"adapter_model\.safetensors is missing: the run was interrupted\. Take one of the checkpoint-\* folders",
    )
    succeeded(qadapter("wrap", folder / "checkpoint-20", "--output-dir", tmp_path / "wrapped"))


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
    assert_refused(outcome, r"model\.embed_tokens\.weight was trained or resized along.*give it with --base-model")
    assert not (tmp_path / "wrapped").exists()
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.get_input_embeddings().weight.copy_(tensors[name])
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    succeeded(
        qadapter("wrap", with_embeddings, "--base-model", tmp_path / "other", "--output-dir", tmp_path / "wrapped")
    )


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_rounded_on_either_side_are_the_base_s(own, saved, tmp_path):
    base = torch.nn.Embedding(7, 5).to(own)
    _require_frozen(base, {"weight": base.weight.detach().to(saved)}, tmp_path)
    with pytest.raises(AdapterFormatError, match="was trained or resized"):
        _require_frozen(base, {"weight": (base.weight.detach() + 1).to(saved)}, tmp_path)
