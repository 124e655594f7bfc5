"""Every architecture of the installed transformers: refused in one line, or exactly what its two streams say.

The oracle is PEFT's own model with the same LoRA on the same base. A new architecture is taken for one that works, so
that an upgrade of transformers shows here what it brings, and what it breaks.
"""

import copy

import pytest
import torch
from models import APART, padded, randomise, token_pairs, train_randomly
from peft import LoraConfig, get_peft_model
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qadapter import ConfigError, QAdapterConfig, QAdapterForCausalLM
from qadapter.data import PackedCollator, PreferenceCollator
from qadapter.modeling.packed import enable_packing
from qadapter.modeling.trunk import decoder_layers
from qadapter.objective import pair_losses

KNOWN = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# Of these no tiny model is made here.
NOT_MADE = {
    "blt": "reads bytes in patches, its config has no layers of its own",
    "dots3_note": "a model of sounds, dots3_note_text is its text's",
    "gemma3n": "wants timm for its images, gemma3n_text is its text's",
    "gemma4_assistant": "drafts from another model's states",
    "musicgen": "writes sounds",
    "musicgen_melody": "writes sounds",
    "xmod": "wants a language to be set",
}
OTHER_LOGITS = "computes its logits in a way that is not known here"
NO_KEYS = "keeps no keys and values"
NOT_ALONE = "does not give its decoder alone|cannot run its decoder alone"
OWN_CACHE = "keeps keys and values in a cache of its own"
REFUSED = {
    **dict.fromkeys(
        ("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "inkling_text"), OTHER_LOGITS
    ),
    **dict.fromkeys(("megatron-bert", "prophetnet", "rembert", "roberta", "roberta-prelayernorm"), OTHER_LOGITS),
    **dict.fromkeys(("roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"), OTHER_LOGITS),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "openai-gpt", "recurrent_gemma", "reformer"), NO_KEYS),
    **dict.fromkeys(("rwkv", "xlm", "xlnet"), NO_KEYS),
    **dict.fromkeys(("gemma4_unified_assistant", "llama4", "llama4_text", "mllama", "modernbert-decoder"), NOT_ALONE),
    **dict.fromkeys(("minimax", "xlstm"), OWN_CACHE),
}
# Bases whose own answer in a batch, left-padded, is another than alone: positions count the padding, blocks hold it.
PADDED_OTHERWISE = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "cpmant", "deepseek_v4", "doge", "git", "marian",
    "mbart", "mvp", "pegasus", "plbart", "trocr", "whisper",
}  # fmt: skip
# And whose own answer alone is another with a cache than without.
CACHED_OTHERWISE = {"cpmant", "doge"}
# Not made for float64.
SINGLE = {
    "bloom",
    "gemma2",
    "granite_swa",
    "granitemoe_swa",
    "inkling2_loop_text",
    "inkling2_text",
    "mpt",
    "vaultgemma",
    "xglm",
}
TAKEN = sorted(KNOWN - set(NOT_MADE) - set(REFUSED))


def base_of(model_type):
    torch.manual_seed(0)
    config = tiny_config(model_type)
    base = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    randomise(base, scale=0.3)
    if model_type not in SINGLE:  # else experts, and blocks that are attended to, are chosen by how a machine rounds
        base = base.double()
    base.generation_config.update(eos_token_id=None, pad_token_id=0, bos_token_id=1, max_length=None)
    return base


def policy_on(base, config=None, **options):
    adapted = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = QAdapterForCausalLM.from_base(copy.deepcopy(base), config or QAdapterConfig(), adapted, **options)
    return train_randomly(policy.eval(), scale=0.1)


class Twin:
    """PEFT's model of the same LoRA: logits of the base and of the adapter, each row by itself and without a cache."""

    def __init__(self, base, policy):
        (own,) = policy.peft_model.peft_config.values()
        config = LoraConfig(
            r=own.r, lora_alpha=own.lora_alpha, target_modules=own.target_modules, task_type="CAUSAL_LM",
            exclude_modules=own.exclude_modules, fan_in_fan_out=base.config.model_type == "gpt2",
        )  # fmt: skip
        self.model = get_peft_model(copy.deepcopy(base), config).eval()
        weights = policy.adapter_parameters()
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if "lora_" in name:
                    weight.copy_(weights.pop(name.removeprefix("base_model.model.")))
        assert not weights

    @torch.no_grad()
    def logits(self, ids, strength):
        adapted = self.model(input_ids=ids, use_cache=False).logits
        with self.model.disable_adapter():
            base = self.model(input_ids=ids, use_cache=False).logits
        return base + strength * (adapted - base)


def losses_and_gradients(policy, batch, mask):
    """Loss of each pair, and the gradients of their mean; zeros of layers that a text does not reach."""
    policy.zero_grad()
    losses, _ = pair_losses(policy(**batch), mask, policy.configs["default"])
    losses.mean().backward()
    gradients = {name: weight.grad for name, weight in policy.adapter_parameters().items()}
    return losses.detach(), {name: torch.zeros(1) if grad is None else grad.clone() for name, grad in gradients.items()}


def some_ids(length, seed=3):
    return torch.randint(3, 89, (1, length), generator=torch.Generator().manual_seed(seed))


def near(ours, theirs, share=1e-4):
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= share * theirs.abs().max())


def steps_agree(model, twin, rows, blend, **inputs):
    """Whether each token of `generate` had the logits that the twin's blend has of the row so far."""
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    made = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    ours = torch.stack(made.logits, 1)
    for row, answer, logits in zip(rows, made.sequences[:, -5:], ours, strict=True):
        whole = torch.cat([row, answer[None]], 1)
        if not near(logits, twin.logits(whole, blend)[0, -6:-1]):
            return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TAKEN)
def test_a_policy_is_what_its_two_streams_say(model_type, tmp_path):
    base = base_of(model_type)
    policy = policy_on(base)
    twin, ids = Twin(base, policy), some_ids(17)
    with torch.no_grad():
        assert near(policy(ids, strength=0.0).logits, base(ids, use_cache=False).logits, 1e-5)
        for strength in (0.5, 1.0):
            assert near(policy(ids, strength=strength).logits, twin.logits(ids, strength))
    rows = [some_ids(11, 21), some_ids(6, 22)]
    batch = padded([row[0].tolist() for row in rows], "left")
    assert steps_agree(base, twin, rows[:1], 0.0, input_ids=rows[0]) is (model_type not in CACHED_OTHERWISE)
    assert steps_agree(base, twin, rows, 0.0, **batch) is (model_type not in PADDED_OTHERWISE)
    if model_type not in CACHED_OTHERWISE:
        assert steps_agree(policy, twin, rows[:1], 0.5, input_ids=rows[0], strength=0.5)
    if model_type not in PADDED_OTHERWISE:
        assert steps_agree(policy, twin, rows, 0.5, **batch, strength=0.5)
    with torch.no_grad():
        expected = policy(ids, strength=0.5).logits
        policy.save_pretrained(tmp_path)
        loaded = QAdapterForCausalLM.from_pretrained(tmp_path, base_model=base)
        assert near(loaded(ids, strength=0.5).logits, expected, 1e-5)


@pytest.mark.parametrize("model_type", TAKEN)
def test_fast_passes_of_training_are_the_plain_ones(model_type):
    base = base_of(model_type)
    layers = decoder_layers(base)
    policy = policy_on(base, APART, first_adapted_layer=len(layers) // 2 if layers else 0)
    batch = PreferenceCollator(pad_token_id=0)(token_pairs(4))
    mask = batch["completion_mask"][:, 1:].bool()
    shared, policy.shared_layers = policy.shared_layers, 0
    losses, gradients = losses_and_gradients(policy, batch, mask)
    policy.shared_layers = shared
    passes = [(batch, mask)] if shared else []
    if enable_packing(policy.base):
        packed = PackedCollator()(token_pairs(4))
        passes.append((packed, packed["completion_mask"]))
    for batch, mask in passes:
        ours, own = losses_and_gradients(policy, batch, mask)
        assert near(ours, losses)
        largest = max(gradient.abs().max() for gradient in gradients.values())
        assert max((own[name] - gradient).abs().max() for name, gradient in gradients.items()) <= 1e-4 * largest


@pytest.mark.parametrize("model_type", sorted(KNOWN & set(REFUSED)))
def test_what_cannot_be_customised_is_refused_in_one_line(model_type):
    with pytest.raises(ConfigError, match=REFUSED[model_type]) as error:
        policy_on(base_of(model_type))
    assert "\n" not in str(error.value)
