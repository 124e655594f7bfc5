"""The adapter folded into the base's weights: the same policy without LoRA products, and the base back afterwards."""

import json

import pytest
import torch
from models import APART, lora, padded, tiny_base, tiny_policy, token_ids

from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.errors import ConfigError
from qadapter.modeling.streams import StreamLinear

INPUTS = padded(token_ids(9, 5, 7))


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_policy_is_the_policy_and_the_base_comes_back_bit_by_bit(architecture, kind):
    fan = {"fan_in_fan_out": architecture == "gpt2"}
    policy = tiny_policy(tiny_base(architecture, dtype=torch.float64), QAdapterConfig(), lora(**kind, **fan))
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with torch.no_grad():
        expected, base = policy(**INPUTS).logits, policy(**INPUTS, strength=0.0).logits
        with policy.merged():
            torch.testing.assert_close(policy(**INPUTS).logits, expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(policy(**INPUTS, strength=0.0).logits, base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert (expected - base).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's, of just that
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("architecture", "targets", "fan"),
    [("gpt2", ["c_attn", "lm_head"], False), ("gpt2", ["c_attn", "lm_head"], True), ("llama", ["q_proj"], True)],
)
def test_each_layer_is_merged_by_how_its_own_weight_is_stored(architecture, targets, fan, dora, tmp_path):
    """Whatever fan_in_fan_out says, which is one for all layers."""
    base = tiny_base(architecture, dtype=torch.float64)
    config = lora(target_modules=targets, use_dora=dora, fan_in_fan_out=fan)
    policy = tiny_policy(base, QAdapterConfig(), config)
    with torch.no_grad():
        expected = policy(**INPUTS).logits
        with policy.merged():
            torch.testing.assert_close(policy(**INPUTS).logits, expected, rtol=1e-9, atol=1e-9)
    policy.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapters/default/adapter_config.json").read_text())
    assert saved["fan_in_fan_out"] == (architecture == "gpt2")
    assert config.fan_in_fan_out == fan


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's, of just that
def test_a_merged_head_leaves_the_embeddings_that_it_is_tied_to_alone():
    base = tiny_base(dtype=torch.float64, tie_word_embeddings=True)
    policy = tiny_policy(base, QAdapterConfig(), lora(target_modules=["q_proj", "lm_head"]))
    embeddings, head = policy.get_input_embeddings(), policy.head.linear
    assert head.weight is embeddings.weight
    with torch.no_grad():
        expected = policy(**INPUTS).logits
        with policy.merged():
            torch.testing.assert_close(policy(**INPUTS).logits, expected, rtol=1e-9, atol=1e-9)
    assert head.weight is embeddings.weight


def test_merged_layers_run_the_base_layer_alone():
    policy, calls = tiny_policy(config=QAdapterConfig()), []
    for module in policy.base.modules():
        if isinstance(module, StreamLinear):
            module.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    with policy.merged():
        text = policy.generate(**INPUTS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert not calls
    assert torch.equal(text, policy.generate(**INPUTS, max_new_tokens=5, do_sample=False, pad_token_id=0))
    assert calls


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"strength": 0.5}, {"max_kl": 0.1}])
def test_a_merged_policy_refuses_what_needs_the_base(options):
    policy = tiny_policy(config=QAdapterConfig())
    with policy.merged(), pytest.raises(ConfigError, match="only its own policy at strength 1 can run"):
        policy(**INPUTS, **options)
    assert torch.isfinite(policy(**INPUTS, **options).logits).all()


def test_a_merged_policy_is_not_saved(tmp_path):
    policy = tiny_policy(config=QAdapterConfig())
    with policy.merged(), pytest.raises(ConfigError, match="folded into the base's weights"):
        policy.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_error_within_brings_the_base_back_too():
    policy = tiny_policy(config=QAdapterConfig())
    base = policy(**INPUTS, strength=0.0).logits
    with pytest.raises(RuntimeError, match="of the caller's"), policy.merged():
        raise RuntimeError("of the caller's")
    assert torch.equal(policy(**INPUTS, strength=0.0).logits, base)


def test_settings_that_need_two_streams_cannot_be_merged():
    with pytest.raises(ConfigError, match="only one adapter of the residual form"), tiny_policy(config=APART).merged():
        pass
    pair = QAdapterForCausalLM(
        tiny_base(), dict.fromkeys(["one", "two"], QAdapterConfig()), {name: lora() for name in ("one", "two")}
    )
    with pytest.raises(ConfigError, match="only one adapter of the residual form"), pair.merged():
        pass
