"""Adapter folders as other trainers write them.

Where the layouts come from ("trained": from folders that these trainers wrote on a CPU, see benchmarks/LOG.md):
  trained       axolotl 0.19.0 (with `rl: dpo` it leaves the base's weights and the LoRA's in a model.safetensors, too),
                LLaMA-Factory 0.9.5 (which saves the chat template that it trained with).
  axolotl       src/axolotl/train.py saves the adapter's, the tokenizer's and the model's config before it trains, so
                that a config.json lies beside adapter_config.json; settings and files as in the adapters of FinLoRA
                (github.com/wangd12rpi/FinLoRA, trained with 0.9) and, for 0.4 to 0.6, of models on the hub that are
                tagged `axolotl`, which have the weights twice, pickled and not.
  LLaMA-Factory src/llamafactory/model/adapter.py, and the file lists of adapters tagged `llama-factory`.
  Unsloth       target_modules as one regular expression, auto_mapping with a key of its own, a base in 4 bits.
"""

import json
import re
import shutil

import torch
from models import lora, train_randomly
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

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
PEFT_0_20 = PEFT_0_19 | {"monteclora_config": None, "peft_version": "0.20.0", "velora_config": None}
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
    "axolotl 0.19, trained": PEFT_0_20
    | {"fan_in_fan_out": None, "target_modules": ALL_LINEAR, "target_parameters": []},
    "LLaMA-Factory": PEFT_0_10 | {"target_modules": ALL_LINEAR, "lora_alpha": 8},
    "LLaMA-Factory 0.9.5, trained": PEFT_0_19
    | {"lora_dropout": 0.0, "peft_version": "0.18.1", "target_modules": ALL_LINEAR},
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
LLAMA_FACTORY_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'Human: ' + message['content'] }}"
    "{{ '\nAssistant: ' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
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


def save_tokenizer(folder, base, template=None, tokens=()):
    """The tokenizer's files as transformers 5 writes them: the base's, with `template` and `tokens` of its own."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)


def save_with_base(folder, base, tensors):
    """Base and LoRA in one model.safetensors, by the names that they have inside PEFT's model."""
    short = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    both = {
        re.sub(r"(lora_[AB])\.", r"\1.default.", name): tensor
        for name, tensor in (load_file(base / "model.safetensors") | short).items()
    }
    targets = {name.split(".lora_")[0] for name in short}
    names = {name: name.replace(".weight", ".base_layer.weight") for name in both if name[:-7] in targets}
    save_file({names.get(name, name): tensor for name, tensor in both.items()}, folder / "model.safetensors")
    shutil.copy(base / "config.json", folder)


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
