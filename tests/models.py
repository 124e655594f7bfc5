"""Tiny random models of every tested architecture, adapters that differ visibly from the base, and slow twins."""

import copy

import oracle
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, PreTrainedTokenizerFast

from qadapter import QAdapterConfig, QAdapterForCausalLM, QAdapterTrainer, QAdapterTrainingArguments
from qadapter.objective import pair_losses

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
# What is special about each architecture is in its entry; windows are smaller than the sequences of the tests.
ARCHITECTURES = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 4,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    },
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4},
    "phi": {"model_type": "phi"},
    "gpt_neox": {"model_type": "gpt_neox"},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "granite": {"model_type": "granite", "logits_scaling": 2.0, "attention_multiplier": 0.3},
    "cohere": {"model_type": "cohere", "logit_scale": 0.5},
}
# Every fast path is compared with its slow twin on these: plain, with norms of queries and keys, with a sliding window,
# with layers of two kinds.
FAST_PATHS = ["llama", "qwen3", "mistral", "gemma3"]
# Bases whose experts and router no LoRA here may target.
MIXTURES = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "moe_intermediate_size": 16,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}
# α₀ far from α̃, so that both streams matter.
APART = QAdapterConfig(alpha_tilde=0.5, alpha_0=0.2)


def tiny_base(architecture="llama", dtype=torch.float32, seed=0, **changes):
    """A causal LM with weights large enough that its logits differ by several nats; in eval mode."""
    special = {**ARCHITECTURES, **MIXTURES}[architecture] | changes
    attention = special.pop("attn_implementation", "sdpa")
    sizes = {name: value for name, value in SIZES.items() if architecture != "gpt2" or "_token_id" in name}
    if architecture == "gpt2":
        sizes["vocab_size"] = VOCABULARY
    if architecture == "gemma3":  # it would make every sixth layer a global one
        depth = special.get("num_hidden_layers", sizes["num_hidden_layers"])
        special["layer_types"] = [("sliding_attention", "full_attention")[layer % 2] for layer in range(depth)]
    config = AutoConfig.for_model(**{**sizes, **special})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    randomise(model, seed)
    return model.to(dtype).eval()


def multimodal_base(tied=False):
    """A Gemma 3 that reads images, too; its settings for texts are a part of its config."""
    text = SIZES | {"head_dim": 8, "sliding_window": 4, "tie_word_embeddings": tied}
    vision = dict.fromkeys(("hidden_size", "intermediate_size"), 16) | {"num_hidden_layers": 1, "image_size": 28}
    special = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, "mm_tokens_per_image": 1}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision | {"num_attention_heads": 2, "patch_size": 14},
        tie_word_embeddings=tied,
        **special,
    )
    model = AutoModelForCausalLM.from_config(config)
    randomise(model)
    return model.eval()


def randomise(model, seed=0, scale=0.35):
    """Give every matrix and bias of `model` random values that do not depend on how the library initialises it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def lora(**changes):
    """A LoRA of rank 3 on every linear layer but the head."""
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)


def train_randomly(model, seed=1, scale=0.15):
    """Put random numbers into every adapter, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_policy(base=None, config=APART, peft_config=None, trained=True):
    """A policy on a copy of `base`, in eval mode; with a random adapter unless `trained` is false."""
    base = tiny_base() if base is None else copy.deepcopy(base)
    policy = QAdapterForCausalLM.from_base(base, config, peft_config or lora()).eval()
    return train_randomly(policy) if trained else policy


def plain_peft(base, policy, peft_config=None):
    """PEFT's own model with the same weights as `policy`: the slow twin, whose forward knows nothing of streams."""
    peft_config = peft_config or lora()
    peft_config.fan_in_fan_out = base.config.model_type == "gpt2"  # PEFT warns where it has to set this itself
    model = get_peft_model(copy.deepcopy(base), peft_config).eval()
    result = set_peft_model_state_dict(model, get_peft_model_state_dict(policy.peft_model, save_embedding_layers=False))
    assert not result.unexpected_keys
    return model


def two_passes(plain, **batch):
    """Logits (z_θ, z_b) in float64 by two explicit passes of PEFT's model."""
    with torch.no_grad():
        z_theta = plain(**batch).logits.double()
        with plain.disable_adapter():
            z_base = plain(**batch).logits.double()
    return z_theta, z_base


def defined_logps(z_theta, z_base, config, strength=1.0):
    """Log-probabilities (B, T, V) of the policy at `strength`, state by state with the loops of `oracle.py`."""
    settings = (config.parametrisation, config.alpha_tilde, config.alpha_0)
    result = torch.empty_like(z_theta)
    for row in range(z_theta.shape[0]):
        for t in range(z_theta.shape[1]):
            base = z_base[row, t].tolist()
            policy = oracle.policy_logits(z_theta[row, t].tolist(), base, *settings)
            mixed = [(1 - strength) * b + strength * p for b, p in zip(base, policy, strict=True)]
            total = oracle.log_sum_exp(mixed)
            result[row, t] = torch.tensor([z - total for z in mixed], dtype=result.dtype)
    return result


def token_ids(*lengths, seed=3):
    """Random token ids without padding: one row a length, as lists."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def padded(rows, side="left", width=None):
    """input_ids and attention_mask of `rows`, padded with token 0."""
    width = width or max(map(len, rows))
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        input_ids[index, place] = torch.tensor(row)
        attention_mask[index, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def token_pairs(count=5, seed=5):
    """Tokenised preference pairs of odd and different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    return [{"prompt_ids": ids(1, 6), "chosen_ids": ids(1, 8), "rejected_ids": ids(1, 8)} for _ in range(count)]


TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


PRINTABLE = tuple(map(chr, range(32, 127)))


def losses_and_gradients(policy, batch, mask):
    """Loss of each pair (P,), and the gradients of their mean by the adapter's parameters."""
    policy.zero_grad()
    losses, _ = pair_losses(policy(**batch), mask, policy.configs["default"])
    losses.mean().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in policy.adapter_parameters().items()}


def tiny_tokenizer(template=TEMPLATE, characters=PRINTABLE):
    """A tokenizer of 97 tokens: <pad>, </s> and the 95 printable characters of ASCII."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", chat_template=template
    )


def byte_tokenizer(*pairs):
    """A tokenizer with one token a byte, so that most characters need several, and one for each of the pairs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["</s>", *alphabet, *map("".join, pairs)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(pairs), unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def tiny_trainer(policy, folder, pairs=None, eval_pairs=None, **options):
    """A QAdapterTrainer on tokenised pairs; names of its own arguments go to it, all others to the arguments."""
    own = {name: options.pop(name) for name in ("processing_class", "callbacks", "data_collator") if name in options}
    defaults = {
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 2,
        "save_strategy": "no",
        "seed": 3,
    }
    eval_dataset = None if eval_pairs is None else Dataset.from_list(eval_pairs)
    return QAdapterTrainer(
        model=policy,
        args=QAdapterTrainingArguments(output_dir=str(folder), **(defaults | options)),
        train_dataset=Dataset.from_list(pairs or token_pairs(8)),
        eval_dataset=eval_dataset,
        **own,
    )
