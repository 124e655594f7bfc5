"""The shared trunk: layers below the first adapted one run once, and nothing else changes."""

import pickle

import pytest
import torch
from models import APART, FAST_PATHS, lora, losses_and_gradients, padded, tiny_base, tiny_policy, token_ids
from transformers import DynamicCache

from qadapter import QAdapterForCausalLM
from qadapter.errors import ConfigError
from qadapter.modeling import trunk
from qadapter.modeling.streams import StreamLinear
from qadapter.modeling.trunk import decoder_layers

DEPTH, FIRST = 5, 3
SHARING = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi", "gpt_neox", "gpt2", "granite", "cohere"]


def upper_policy(architecture="llama", first=FIRST, dtype=torch.float64, **changes):
    """A policy on five layers whose adapter touches those from `first` on."""
    depth = {"n_layer": DEPTH} if architecture == "gpt2" else {"num_hidden_layers": DEPTH}
    names = ["c_attn", "c_fc"] if architecture == "gpt2" else ["q_proj", "v_proj", "query_key_value", "down_proj"]
    base = tiny_base(architecture, dtype=dtype, **depth, **changes)
    there = {module.rsplit(".")[-1] for module, _ in base.named_modules()}
    names = [name for name in names if name in there]
    peft_config = lora(target_modules=names, layers_to_transform=list(range(first, DEPTH)))
    if architecture == "gpt2":
        peft_config.fan_in_fan_out = True
    return tiny_policy(base, APART, peft_config)


def lengths_for(architecture):
    """Gemma 2's eager attention gives NaN where a window holds nothing but padding: no padding for it."""
    return (9, 9, 9, 9) if architecture == "gemma2" else (7, 11, 9, 5)


def batch(*lengths, side="right"):
    inputs = padded(token_ids(*lengths), side)
    mask = inputs["attention_mask"].bool()
    mask[:, :2] = False
    return inputs | {"completion_mask": mask}


@pytest.mark.parametrize("architecture", SHARING)
def test_loss_and_every_gradient_equal_those_of_whole_passes(architecture):
    policy, inputs = upper_policy(architecture), batch(*lengths_for(architecture))
    policy.train()
    assert policy.shared_layers == FIRST
    losses, gradients = losses_and_gradients(policy, inputs, inputs["completion_mask"][:, 1:])
    policy.shared_layers = 0
    expected_losses, expected = losses_and_gradients(policy, inputs, inputs["completion_mask"][:, 1:])
    assert torch.equal(losses, expected_losses)
    assert gradients.keys() == expected.keys()
    assert all(g.abs().max() > 0 for g in expected.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("architecture", FAST_PATHS)
@pytest.mark.parametrize("every", [1, 2])
def test_activation_checkpointing_changes_nothing(architecture, every):
    policy, inputs = upper_policy(architecture), batch(8, 11, 9, 7)
    policy.train()
    losses, gradients = losses_and_gradients(policy, inputs, inputs["completion_mask"][:, 1:])
    policy.activation_checkpointing_enable(every_n_layers=every)
    again, expected = losses_and_gradients(policy, inputs, inputs["completion_mask"][:, 1:])
    assert torch.equal(losses, again)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=0, msg=name)


def test_the_trunk_runs_once_a_training_step():
    policy, inputs = upper_policy(), batch(7, 9)
    calls = [0] * DEPTH
    for index, layer in enumerate(decoder_layers(policy.base)):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    policy(**inputs)
    assert calls == [1] * FIRST + [2] * (DEPTH - FIRST)


@pytest.mark.parametrize("architecture", SHARING)
@pytest.mark.parametrize("rows", [1, 4])
def test_forked_logits_equal_those_of_stacked_rows(architecture, rows):
    policy, inputs = upper_policy(architecture), padded(token_ids(*lengths_for(architecture)[:rows]))
    with torch.no_grad():
        forked = policy(**inputs, strength=0.7, use_cache=False).logits
        policy.shared_layers = 0
        stacked = policy(**inputs, strength=0.7, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(forked[real], stacked[real], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"max_kl": 0.2}])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_generation_equals_that_of_stacked_rows(architecture, options):
    policy, inputs = upper_policy(architecture), padded(token_ids(9, 5, 7))
    options = options | {"max_new_tokens": 9, "do_sample": False, "strength": 0.7, "pad_token_id": 0}
    forked = policy.generate(**inputs, **options)
    policy.shared_layers = 0
    assert torch.equal(forked, policy.generate(**inputs, **options))


def test_the_trunk_has_one_cache_for_all_streams():
    policy, inputs = upper_policy(), padded(token_ids(9, 5))
    cache = DynamicCache(config=policy.config)
    policy(**inputs, strength=0.7, past_key_values=cache, use_cache=True)
    assert [layer.keys.shape[0] for layer in cache.layers] == [2] * FIRST + [4] * (DEPTH - FIRST)


def test_a_single_stream_needs_no_fork():
    policy, inputs = upper_policy(), padded(token_ids(9, 5))
    cache = DynamicCache(config=policy.config)
    policy(**inputs, strength=0.0, past_key_values=cache, use_cache=True)
    assert [layer.keys.shape[0] for layer in cache.layers] == [2] * DEPTH


def test_an_adapter_on_the_first_layer_shares_nothing():
    assert upper_policy(first=0).shared_layers == 0


def test_a_composition_shares_the_layers_below_the_lowest_adapter():
    base = tiny_base(num_hidden_layers=DEPTH)
    configs = {
        name: lora(target_modules=["q_proj"], layers_to_transform=list(range(first, DEPTH)))
        for name, first in {"low": 2, "high": 4}.items()
    }
    policy = type(upper_policy())(base, dict.fromkeys(configs, APART), configs).eval()
    assert policy.shared_layers == 2


def test_layers_that_read_what_others_keep_are_not_left_out(monkeypatch):
    layer_class = type(decoder_layers(tiny_base())[0])
    forward, kept = layer_class.forward, []

    def reading_the_first_layers_input(self, hidden_states, *args, **kwargs):
        if self.self_attn.layer_idx == 0:
            kept.append(hidden_states)
        if self.self_attn.layer_idx == FIRST and kept:
            hidden_states = hidden_states + kept.pop()
        return forward(self, hidden_states, *args, **kwargs)

    # The class with streams holds the forward of the moment it was made.
    monkeypatch.setattr(trunk, "stream_layer_class", trunk.stream_layer_class.__wrapped__)
    monkeypatch.setattr(layer_class, "forward", reading_the_first_layers_input)
    assert upper_policy().shared_layers == 0


def test_a_policy_that_shares_layers_survives_pickle():
    policy, inputs = upper_policy(), padded(token_ids(9, 5, 7))
    again = pickle.loads(pickle.dumps(policy))
    assert again.shared_layers == FIRST
    assert {type(layer) for layer in decoder_layers(again.base)} == {type(decoder_layers(policy.base)[0])}
    again.strength = policy.strength = 0.7
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, policy(**inputs).logits)


def test_the_layers_keep_the_name_of_their_class():
    layers = decoder_layers(upper_policy().base)
    assert {type(layer).__name__ for layer in layers} == {"LlamaDecoderLayer"}
    assert all(isinstance(layer, type(decoder_layers(tiny_base())[0])) for layer in layers)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_first_adapted_layer_adapts_all_linear_layers_from_there_on(architecture):
    depth = {"n_layer": DEPTH} if architecture == "gpt2" else {"num_hidden_layers": DEPTH}
    peft_config = lora(fan_in_fan_out=architecture == "gpt2")
    base = tiny_base(architecture, **depth)
    policy = QAdapterForCausalLM.from_base(base, APART, peft_config, first_adapted_layer=FIRST)
    adapted = [sum(isinstance(m, StreamLinear) for m in layer.modules()) for layer in decoder_layers(policy.base)]
    assert adapted == [0] * FIRST + [4 if architecture == "gpt2" else 7] * (DEPTH - FIRST)
    assert policy.shared_layers == FIRST


@pytest.mark.parametrize(
    ("first", "targets", "message"),
    [
        (2, "all-linear", "first_adapted_layer = 2: .*has layers 0 to 1"),
        (-1, "all-linear", "first_adapted_layer = -1: .*has layers 0 to 1"),
        (1, ".*q_proj", "target_modules = '.*q_proj': name the modules instead"),
    ],
)
def test_first_adapted_layer_that_cannot_be_is_refused(first, targets, message):
    with pytest.raises(ConfigError, match=message):
        QAdapterForCausalLM.from_base(tiny_base(), APART, lora(target_modules=targets), first_adapted_layer=first)


def test_first_adapted_layer_needs_a_list_of_layers(monkeypatch):
    monkeypatch.setattr(trunk, "decoder_layers", lambda base: None)
    with pytest.raises(ConfigError, match="first_adapted_layer = 1: the decoder of LlamaForCausalLM is no single list"):
        QAdapterForCausalLM.from_base(tiny_base(), APART, lora(), first_adapted_layer=1)
