"""Bases that are built unlike Llama: dropout and experts by chance in their forward, rows that cannot be repeated."""

import math

import pytest
import torch
from models import lora, multimodal_base, padded, randomise, token_ids, train_randomly
from transformers import AutoConfig, AutoModelForCausalLM

from qadapter import ConfigError, QAdapterConfig, QAdapterForCausalLM
from qadapter.modeling.packed import enable_packing
from qadapter.modeling.resuming import load_adapter_weights
from qadapter.objective import pair_losses

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
# What their forward does by chance while training, at a rate where an update of the adapter would be noise.
BY_CHANCE = {
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.5, "layerdrop": 0.5},
    "starcoder2": {"residual_dropout": 0.5, "embedding_dropout": 0.5, "attention_dropout": 0.5},
    "seed_oss": {"head_dim": 16, "residual_dropout": 0.5},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.5},
    "phimoe": {"num_local_experts": 4},  # draws its experts
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.5},
}

GEMMA_3N = {  # of four layers: three is the length of another list of its decoder
    "num_hidden_layers": 4,
    "head_dim": 16, "num_kv_shared_layers": 0, "layer_types": None, "activation_sparsity_pattern": [0.0] * 4,
    "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
}  # fmt: skip


def base_of(model_type, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **settings})).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", BY_CHANCE)
def test_what_a_base_does_by_chance_in_training_is_off_in_both_streams(model_type, checkpointing):
    """An untouched adapter's streams are one: its loss is ln 2, whatever the mode."""
    targets = ["c_attn"] if model_type == "gpt_bigcode" else ["q_proj", "v_proj"]
    base = base_of(model_type, **BY_CHANCE[model_type])
    policy = QAdapterForCausalLM.from_base(base, QAdapterConfig(), lora(target_modules=targets))
    policy.train()
    if checkpointing:
        policy.activation_checkpointing_enable()
    batch = padded(token_ids(8, 6), side="right")
    mask = batch["attention_mask"].bool()
    mask[:, :2] = False
    statistics = policy(**batch, completion_mask=mask)
    losses, _ = pair_losses(statistics, mask[:, 1:], policy.configs["default"])
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([math.log(2)] * len(losses), abs=1e-6)
    assert statistics.kl.abs().max() < 1e-6
    assert any(weight.grad is not None for weight in policy.adapter_parameters().values())


@pytest.mark.parametrize("model_type", BY_CHANCE)
def test_what_is_off_in_training_leaves_strength_0_the_base(model_type):
    """PhiMoE's routers compare scores by the number that is their noise's in training."""
    settings = BY_CHANCE[model_type]
    base = base_of(model_type, **({"num_local_experts": 16} if model_type == "phimoe" else settings))
    ids = torch.randint(2, 90, (4, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = base(ids).logits
        policy = QAdapterForCausalLM.from_base(base, QAdapterConfig()).eval()
        assert torch.equal(policy(ids, strength=0.0).logits, own)


def test_the_base_stays_in_eval_mode_and_the_adapters_train():
    policy = QAdapterForCausalLM.from_base(base_of("llama"), QAdapterConfig(), lora(lora_dropout=0.5))
    modes = {name: module.training for name, module in policy.train().base.named_modules()}
    assert any(modes.values())
    kinds = {name.rpartition(".")[2] for name in modes if modes[name] and "_proj" not in name}
    assert kinds == {"model", "0", "1", "2"}, "beside LoRA layers, what can be checkpointed: models and layers"
    assert not policy.base.get_decoder().layers[0].self_attn.training
    assert not any(module.training for module in policy.eval().modules())


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("bloom", {"n_layer": 3, "n_head": 4}),
        ("gemma3n_text", GEMMA_3N),
        ("falcon", {"alibi": True, "new_decoder_architecture": False, "multi_query": False}),
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 3}),  # a row a head, of as many as the batch may have
    ],
)  # fmt: skip
def test_bases_whose_rows_cannot_be_repeated_inside_are_repeated_before(model_type, settings, rows):
    base = base_of(model_type, **settings)
    names = {"bloom": ["query_key_value"], "falcon": ["query_key_value"], "mpt": ["Wqkv"]}
    config, adapted = QAdapterConfig(), lora(target_modules=names.get(model_type, ["q_proj", "v_proj"]))
    policy = QAdapterForCausalLM.from_base(base, config, adapted, first_adapted_layer=2).eval()
    randomise(policy)
    ids = torch.randint(2, 90, (rows, 5))
    with torch.no_grad():
        z_b, z, between = (policy(ids, strength=strength).logits for strength in (0.0, 1.0, 0.5))
    assert (z - z_b).abs().max() > 0.01
    torch.testing.assert_close(between, (z + z_b) / 2, rtol=1e-5, atol=1e-4)


def test_a_subclass_of_a_linear_layer_takes_its_adapter_in():
    """Falcon's layers are of a class of their own, with a plain weight."""
    base = base_of("falcon", new_decoder_architecture=False, multi_query=True)
    policy = QAdapterForCausalLM.from_base(base, QAdapterConfig(), lora(target_modules=["query_key_value"])).eval()
    randomise(policy)
    ids = torch.randint(2, 90, (2, 5))
    with torch.no_grad():
        expected = policy(ids).logits
        with policy.merged():
            torch.testing.assert_close(policy(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_images_are_refused_not_overlooked():
    policy = QAdapterForCausalLM.from_base(multimodal_base(), QAdapterConfig(), lora(target_modules=["q_proj"])).eval()
    ids = torch.randint(2, 90, (1, 5))
    for call in (policy, policy.generate):
        with pytest.raises(ConfigError, match="pixel_values: a policy reads text only"):
            call(ids, pixel_values=torch.zeros(1, 3, 8, 8))
    with torch.no_grad():
        assert policy(ids, pixel_values=None).logits.shape[:2] == ids.shape


@pytest.mark.parametrize("model_type", ["rwkv", "mamba", "falcon_mamba"])
def test_bases_that_keep_no_keys_and_values_are_refused(model_type):
    sizes = {"attention_hidden_size": 64} if model_type == "rwkv" else {"state_size": 4}
    with pytest.raises(ConfigError, match="keeps no keys and values"):
        QAdapterForCausalLM.from_base(base_of(model_type, **sizes), QAdapterConfig())


def test_a_base_with_a_cache_of_its_own_is_refused():
    base = base_of("minimax", num_local_experts=4, head_dim=16)
    with pytest.raises(ConfigError, match="MiniMaxForCausalLM keeps keys and values in a cache of its own"):
        QAdapterForCausalLM.from_base(base, QAdapterConfig())


def test_a_base_whose_decoder_is_its_head_is_refused():
    base = base_of("modernbert-decoder", bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    with pytest.raises(ConfigError, match="ModernBertDecoderForCausalLM cannot run its decoder alone"):
        QAdapterForCausalLM.from_base(base, QAdapterConfig())


def test_a_base_with_a_window_that_it_does_not_attend_by_cannot_pack():
    base = base_of("moshi", sliding_window=4, head_dim=16, ffn_dim=128)
    assert not enable_packing(base)
    assert base.config.sliding_window == 4


# -- newer architectures, where the installed transformers has them -------------------------------------------------


def test_layers_that_run_in_loops_share_no_trunk():
    """No one state enters such a layer: the trunk's, kept from the last loop, would be put into each."""
    pytest.importorskip("transformers.models.dory")
    sizes = {"head_dim": 16, "num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1}
    base = base_of("dory", n_recurrent_layers=2, n_recurrent_loops=2, **sizes)
    targets = lora(target_modules=["q_proj", "v_proj"])
    policy = QAdapterForCausalLM.from_base(base, QAdapterConfig(), targets, first_adapted_layer=2)
    assert policy.shared_layers == 0


def test_weights_are_read_back_whose_names_transformers_knows_by_others(tmp_path):
    """PEFT would take `mlp.shared_experts` for the name that a checkpoint of Laguna gives it, and leave it out."""
    pytest.importorskip("transformers.models.laguna")
    sizes = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    base = base_of("laguna", shared_expert_intermediate_size=32, **sizes)
    policy = train_randomly(QAdapterForCausalLM.from_base(base, QAdapterConfig())).eval()
    assert any("shared_expert" in name for name in policy.adapter_parameters())
    ids = torch.randint(2, 90, (2, 5))
    with torch.no_grad():
        expected = policy(ids).logits
        policy.save_pretrained(tmp_path)
        train_randomly(policy, seed=9)
        load_adapter_weights(policy, tmp_path)
        assert torch.equal(policy(ids).logits, expected)
        again = base_of("laguna", shared_expert_intermediate_size=32, **sizes)
        torch.testing.assert_close(
            QAdapterForCausalLM.from_pretrained(tmp_path, base_model=again)(ids).logits, expected
        )
