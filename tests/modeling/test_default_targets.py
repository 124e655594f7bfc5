"""The layers that "all-linear" stands for: PEFT's own choice on plain models, and what can be trained on others."""

import logging

import pytest
import torch
from models import (
    APART,
    ARCHITECTURES,
    SIZES,
    defined_logps,
    lora,
    multimodal_base,
    padded,
    plain_peft,
    randomise,
    tiny_base,
    tiny_policy,
    token_ids,
    train_randomly,
    two_passes,
)
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qadapter import ConfigError, QAdapterForCausalLM
from qadapter.modeling.adapter_settings import is_linear_map, linear_targets
from qadapter.modeling.streams import StreamLinear

BATCH = padded(token_ids(7, 4, 3))
REAL = BATCH["attention_mask"].bool()
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Bases on whose "all-linear" PEFT fails, or puts adapters that compute nothing: the kinds of layers that are adapted.
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
OTHERS = {
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "qwen3_moe": ({"head_dim": 8, **EXPERTS}, ATTENTION),
    "phimoe": ({"num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "qwen2_moe": ({"shared_expert_intermediate_size": 16, **EXPERTS}, ATTENTION | MLP | {"shared_expert_gate"}),
    "falcon_h1": ({"mamba_d_ssm": 64, **MAMBA}, ATTENTION | MLP | {"in_proj"}),
    "jamba": (
        {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8}
        | {"mamba_dt_rank": 4, "use_mamba_kernels": False},
        ATTENTION | MLP | {"in_proj"},
    ),
    "gemma3n_text": (
        {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "laurel_rank": 4}
        | {"sliding_window": 4, "vocab_size_per_layer_input": SIZES["vocab_size"], "hidden_size_per_layer_input": 8}
        | {"num_kv_shared_layers": 0, "activation_sparsity_pattern": None},
        ATTENTION | MLP | {"linear_left", "linear_right", "per_layer_input_gate", "per_layer_projection"}
        | {"per_layer_model_projection", "0", "1", "2"},
    ),
}  # fmt: skip


def other_base(kind):
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | OTHERS[kind][0])).eval()
    randomise(base, scale=0.2)
    for name, scale in base.named_parameters():
        if name.endswith("correct_output_scale"):  # Gemma 3n's starts at 0, which keeps its gates shut
            nn.init.ones_(scale)
    return base


def adapted(policy):
    """The names of the layers with an adapter."""
    return [name for name, module in policy.base.named_modules() if isinstance(module, StreamLinear)]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "falcon"])
def test_plain_models_are_adapted_where_peft_adapts_them(architecture):
    special = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if architecture == "falcon":  # its linear layers are of a class of their own
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **special))
    else:
        base = tiny_base(architecture)
    policy = tiny_policy(base, trained=False)
    plain = get_peft_model(base, lora(fan_in_fan_out=architecture == "gpt2"))
    names = [name.removeprefix("base_model.model.") for name, _ in plain.named_parameters() if "lora_" in name]
    assert list(policy.adapter_parameters()) == names
    chosen = (model.peft_config["default"].target_modules for model in (policy.peft_model, plain))
    assert next(chosen) == next(chosen)


@pytest.mark.parametrize("kind", OTHERS)
def test_all_linear_takes_the_layers_that_can_be_trained(kind):
    policy = tiny_policy(other_base(kind))
    assert {name.rpartition(".")[2] for name in adapted(policy)} == OTHERS[kind][1]
    policy(torch.tensor(token_ids(9)), strength=0.6).logits.square().sum().backward()
    grads = {name: weight.grad for name, weight in policy.adapter_parameters().items()}
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []


@pytest.mark.parametrize("kind", ["mixtral", "phimoe", "falcon_h1"])
def test_logits_on_default_targets_equal_the_definition(kind):
    base = other_base(kind)
    policy = tiny_policy(base)
    plain = plain_peft(base, policy, lora(target_modules=adapted(policy)))
    with torch.no_grad():
        actual = policy(**BATCH, strength=0.6).logits.double().log_softmax(-1)
    expected = defined_logps(*two_passes(plain, **BATCH), APART, 0.6)
    torch.testing.assert_close(actual[REAL], expected[REAL], rtol=1e-5, atol=1e-4)


def test_what_reads_images_is_not_adapted():
    base = multimodal_base()
    names = adapted(tiny_policy(base))
    assert len(names) == 14
    assert all(name.startswith("model.language_model.layers.") for name in names)


@pytest.mark.parametrize("base", [multimodal_base, lambda: other_base("mixtral")], ids=["images", "experts"])
def test_first_adapted_layer_takes_the_same_layers_from_there_on(base):
    base = base()
    expected = [name for name in linear_targets(base) if ".layers.1." in name]
    policy = QAdapterForCausalLM.from_base(base, APART, lora(), first_adapted_layer=1)
    assert adapted(policy) == expected
    assert policy.shared_layers == 1


@pytest.mark.parametrize("base", [multimodal_base, lambda: other_base("qwen3_moe")], ids=["images", "experts"])
def test_adapters_on_default_targets_are_read_back(base, tmp_path):
    base = base()
    policy = tiny_policy(base)
    policy.save_pretrained(tmp_path)
    loaded = QAdapterForCausalLM.from_pretrained(tmp_path, base_model=base)
    assert adapted(loaded) == adapted(policy)
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, policy(**BATCH).logits)


def test_adapters_that_peft_chose_the_layers_of_are_read_back(tmp_path):
    """As earlier versions did it, on the layers for images, too."""
    policy = QAdapterForCausalLM(multimodal_base(), {"default": APART}, {"default": lora()})
    train_randomly(policy.eval()).save_pretrained(tmp_path)
    loaded = QAdapterForCausalLM.from_pretrained(tmp_path, base_model=multimodal_base())
    assert any("vision_tower" in name for name in adapted(loaded))
    assert adapted(loaded) == adapted(policy)
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, policy(**BATCH).logits)


def test_what_is_left_out_is_logged(caplog):
    with caplog.at_level(logging.INFO, "qadapter"):
        linear_targets(tiny_base())
        assert not caplog.records
        linear_targets(other_base("mixtral"))
    kinds = "MixtralSparseMoeBlock.experts, MixtralSparseMoeBlock.gate"
    assert caplog.messages == [f"all-linear: of MixtralForCausalLM these are left out: {kinds}."]


def test_lora_on_a_router_that_gives_several_tensors_is_refused_by_name():
    message = r"LoRA on .*router \(PhimoeTopKRouter\) cannot run beside .* as in q_proj\."
    with pytest.raises(ConfigError, match=message):
        tiny_policy(other_base("phimoe"), peft_config=lora(target_modules=["q_proj", "router"]))


class Twice(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


class Halves(nn.Linear):
    def forward(self, x):
        return super().forward(x).chunk(2, -1)


class Grouped(nn.Linear):
    def forward(self, x):
        return super().forward(x.view(2, -1))


def test_layers_with_a_forward_of_their_own_are_tried_out():
    assert [is_linear_map(kind(6, 11)) for kind in (nn.Linear, Twice, Halves, Grouped)] == [True, True, False, False]
    with torch.device("meta"):
        assert is_linear_map(Halves(6, 11))
