"""Adapter folders to be loaded or changed, and what is read off a policy."""

import json

import torch
from models import APART, lora, padded, tiny_base, token_ids, train_randomly
from safetensors.torch import load_file, save_file

from qadapter import QAdapterForCausalLM
from qadapter.modeling.manifest import MANIFEST_NAME
from qadapter.new_folders import file_digest

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
