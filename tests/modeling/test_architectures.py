"""Every architecture: the policy's logits equal the definition, computed by two passes of PEFT's own layers."""

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
    two_passes,
)
from transformers import AutoConfig, AutoModelForCausalLM

from qadapter import ConfigError, QAdapterConfig
from qadapter.functional import mix_coefficients, mix_streams
from qadapter.fused import token_statistics

# float32 matmuls of stacked and of separate batches add in different orders; logits here are of size 10.
ROUNDING = {"rtol": 1e-5, "atol": 1e-4}
BATCH = padded(token_ids(7, 4, 3))
REAL = BATCH["attention_mask"].bool()

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


@architectures
def test_strength_zero_is_bit_equal_to_the_base(architecture):
    base = tiny_base(architecture)
    policy = tiny_policy(base)
    with torch.no_grad():
        assert torch.equal(policy(**BATCH, strength=0.0).logits, base(**BATCH).logits)


@architectures
def test_untrained_policy_is_the_base(architecture):
    base = tiny_base(architecture)
    policy = tiny_policy(base, QAdapterConfig(), trained=False)
    with torch.no_grad():
        assert torch.equal(policy(**BATCH).logits, base(**BATCH).logits)


@architectures
def test_logits_equal_the_definition(architecture):
    base = tiny_base(architecture)
    policy = tiny_policy(base)
    z_theta, z_base = two_passes(plain_peft(base, policy), **BATCH)
    apart = (z_theta.log_softmax(-1) - z_base.log_softmax(-1)).abs().amax(-1)
    assert apart[REAL].min() > 0.1, "the adapter should change every distribution, or the test shows nothing"
    for strength in (1.0, 0.6):
        expected = defined_logps(z_theta, z_base, APART, strength)
        with torch.no_grad():
            actual = policy(**BATCH, strength=strength).logits.double().log_softmax(-1)
        torch.testing.assert_close(actual[REAL], expected[REAL], **ROUNDING)


@architectures
def test_token_statistics_equal_full_logits(architecture):
    base = tiny_base(architecture)
    policy = tiny_policy(base)
    rows = token_ids(7, 4, 3)
    batch = padded(rows, side="right")
    completion_mask = batch["attention_mask"].bool()
    completion_mask[:, :2] = False
    z_theta, z_base = two_passes(plain_peft(base, policy), **batch)
    mixed = mix_streams([z_theta, z_base], mix_coefficients("residual", APART.alpha_tilde, APART.alpha_0))
    expected = token_statistics(mixed[:, :-1], z_base[:, :-1], batch["input_ids"][:, 1:])
    actual = policy.token_statistics(**batch, completion_mask=completion_mask)
    for name in expected._fields:
        values = torch.where(completion_mask[:, 1:], getattr(expected, name), 0.0)
        torch.testing.assert_close(getattr(actual, name).double(), values, **ROUNDING, msg=name)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_texts_of_a_base_that_reads_images_too_equal_the_definition(strength):
    base, config = multimodal_base(), lora(target_modules=r".*language_model.*(q_proj|down_proj)")
    policy = tiny_policy(base, peft_config=config)
    z_theta, z_base = two_passes(plain_peft(base, policy, config), **BATCH)
    with torch.no_grad():
        actual = policy(**BATCH, strength=strength).logits.double().log_softmax(-1)
    torch.testing.assert_close(actual[REAL], defined_logps(z_theta, z_base, APART, strength)[REAL], **ROUNDING)
    ids, options = torch.tensor(token_ids(9)), {"max_new_tokens": 5, "do_sample": False, "strength": strength}
    assert torch.equal(policy.generate(ids, **options), policy.generate(ids, use_cache=False, **options))


def test_a_base_that_changes_its_positions_on_the_way_is_followed():
    """Phi-3 with LongRoPE begins anew, without its cache, where the text outgrows the short factors."""
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 10000.0}
    sizes = {name: value for name, value in SIZES.items() if name != "bos_token_id"}
    config = AutoConfig.for_model(
        "phi3", **sizes, original_max_position_embeddings=12,
        rope_parameters=scaling | {"factor": 4.0, "original_max_position_embeddings": 12},
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).eval()
    randomise(base)
    policy = tiny_policy(base)
    ids, options = torch.tensor(token_ids(9, 9, 9)), {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(policy.generate(ids, strength=0.0, **options), base.generate(ids, **options))
    cached = policy.generate(ids, strength=0.5, **options)
    assert torch.equal(cached, policy.generate(ids, strength=0.5, use_cache=False, **options))


def test_assisted_decoding_is_refused_on_a_base_whose_cache_cannot_go_back():
    kinds = ["linear_attention", "full_attention"]
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    config = AutoConfig.for_model("qwen3_5_text", **SIZES, head_dim=8, layer_types=kinds, **linear)
    base = AutoModelForCausalLM.from_config(config).eval()
    policy = tiny_policy(base, peft_config=lora(target_modules=["q_proj", "down_proj"]))
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        policy.generate(torch.tensor(token_ids(9)), prompt_lookup_num_tokens=2, max_new_tokens=3)


def test_a_base_that_does_not_give_its_decoder_is_refused_by_name():
    config = AutoConfig.for_model("llama4_text", **SIZES, head_dim=8, num_local_experts=2, intermediate_size_mlp=48)
    with pytest.raises(ConfigError, match="Llama4ForCausalLM does not give its decoder alone: it cannot be customised"):
        tiny_policy(AutoModelForCausalLM.from_config(config))
