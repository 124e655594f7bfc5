"""The policy as a causal language model: its forward's arguments, composition of adapters, and what training sees."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import (
    APART,
    ARCHITECTURES,
    VOCABULARY,
    defined_logps,
    lora,
    padded,
    plain_peft,
    tiny_base,
    tiny_policy,
    token_ids,
    train_randomly,
    two_passes,
)
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5ForConditionalGeneration

from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.errors import ConfigError
from qadapter.modeling.streams import StreamLinear

BATCH = padded(token_ids(7, 4, 3))
REAL = BATCH["attention_mask"].bool()
# float32 matmuls of stacked and of separate batches add in different orders; logits here are of size 10.
ROUNDING = {"rtol": 1e-5, "atol": 1e-4}


@pytest.fixture
def policy():
    return tiny_policy()


# -- forward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "phi"])
def test_logits_to_keep_gives_the_last_positions(architecture):
    policy = tiny_policy(tiny_base(architecture))
    with torch.no_grad():
        logits = policy(**BATCH).logits
        torch.testing.assert_close(policy(**BATCH, logits_to_keep=2).logits, logits[:, -2:], **ROUNDING)
        kept = torch.tensor([0, 5])
        torch.testing.assert_close(policy(**BATCH, logits_to_keep=kept).logits, logits[:, kept], **ROUNDING)


class BatchedProducts(TorchDispatchMode):
    """Collects the shapes of what each batched matrix product multiplies."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bmm.default:
            self.shapes.append([tuple(factor.shape) for factor in args])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_head_is_one_matrix_for_all_rows_of_a_prompts_last_states(policy, strength):
    # As a batched product, in bfloat16 on a CPU, it took a generation from 32 prompts 8 seconds, and a head for each.
    with torch.no_grad(), BatchedProducts() as products:
        policy(**BATCH, logits_to_keep=1, strength=strength)
    assert not [shapes for shapes in products.shapes if VOCABULARY in shapes[1]]


def test_labels_give_the_mean_negative_log_likelihood(policy):
    labels = BATCH["input_ids"].masked_fill(~REAL, -100)
    with torch.no_grad():
        output = policy(**BATCH, labels=labels, strength=0.5)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_the_number_of_items_divides_the_loss_as_in_the_base(policy):
    labels = BATCH["input_ids"].masked_fill(~REAL, -100)
    with torch.no_grad():
        actual = policy(**BATCH, labels=labels, strength=0.0, num_items_in_batch=100).loss
        with policy.plan.running(None):
            expected = policy.base(**BATCH, labels=labels, num_items_in_batch=100).loss
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("weights", [{"other": 1.0}, {"default": 0.5, "other": 1.0}])
def test_gradients_of_labels_survive_activation_checkpointing(weights):
    adapters = {"default": QAdapterConfig(), "other": QAdapterConfig()}
    policy = QAdapterForCausalLM(tiny_base(), adapters, {name: lora() for name in adapters})
    train_randomly(policy).train()
    for name in adapters:
        for parameter in policy.adapter_parameters(name).values():
            parameter.requires_grad_(True)

    def gradients():
        policy.zero_grad()
        policy(**BATCH, labels=BATCH["input_ids"], adapter_weights=weights).loss.backward()
        return [parameter.grad for parameter in policy.adapter_parameters("other").values()]

    expected = gradients()
    policy.activation_checkpointing_enable()
    for actual, gradient in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(actual, gradient)


def test_two_steps_with_a_cache_equal_one_pass(policy):
    ids = torch.tensor(token_ids(7, 7))
    with torch.no_grad():
        whole = policy(input_ids=ids, strength=0.5).logits
        first = policy(input_ids=ids[:, :4], strength=0.5, use_cache=True)
        second = policy(input_ids=ids[:, 4:], strength=0.5, use_cache=True, past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, **ROUNDING)


def test_embeddings_may_replace_ids(policy):
    with torch.no_grad():
        embeddings = policy.get_input_embeddings()(BATCH["input_ids"])
        actual = policy(inputs_embeds=embeddings, attention_mask=BATCH["attention_mask"]).logits
        assert torch.equal(actual, policy(**BATCH).logits)


@pytest.mark.parametrize(
    ("method", "argument", "way_out"),
    [
        ("load_adapter", "some-lora", "Compose folders with from_pretrained"),
        ("add_adapter", lora(), "from_base makes a new one"),
        ("resize_token_embeddings", 101, "before from_base"),
    ],
)
def test_what_transformers_would_change_behind_the_streams_is_refused(policy, method, argument, way_out):
    with pytest.raises(ConfigError, match=f"{method}.*{way_out}"):
        getattr(policy, method)(argument)


@pytest.mark.parametrize(
    "method", ["disable_adapters", "enable_adapters", "set_adapter", "delete_adapter", "active_adapters"]
)
def test_the_dial_stands_for_what_transformers_does_with_adapters(policy, method):
    with pytest.raises(ConfigError, match=r"strength=0.0 is the base alone, adapter_weights="):
        getattr(policy, method)()


@pytest.mark.parametrize(
    ("option", "reason"),
    [({"trust_remote_code": True}, "code from the hub is never run"), ({"use_safetensors": False}, "pickled weights"),
     ({"output_loading_info": True}, "a policy comes back")],
)  # fmt: skip
def test_arguments_of_loading_that_have_one_value_may_be_given_that(tmp_path, option, reason):
    tiny_base().save_pretrained(tmp_path / "base")
    (name,) = option
    with pytest.raises(ConfigError, match=f"{name} is {not option[name]} for every base: {reason}"):
        QAdapterForCausalLM.from_base(tmp_path / "base", **option)
    policy = QAdapterForCausalLM.from_base(tmp_path / "base", **{name: not option[name]})
    policy.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=reason):
        QAdapterForCausalLM.from_pretrained(tmp_path / "adapter", verify=False, **option)


@pytest.mark.parametrize("name", ["strength", "max_kl", "min_kl", "decay"])
def test_the_dial_is_not_set_by_loading(name):
    with pytest.raises(ConfigError, match=rf"{name} is of calls: .*policy\.{name} = "):
        QAdapterForCausalLM.from_pretrained("anywhere", **{name: 0.5})


def test_adapters_are_given_by_name():
    with pytest.raises(ConfigError, match=r"adapters is a list: give \{name: folder"):
        QAdapterForCausalLM.from_pretrained("anywhere", adapters=["folder"])


def test_a_base_with_an_encoder_is_refused():
    base = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration, has an encoder"):
        QAdapterForCausalLM.from_base(base)


def test_forward_without_inputs_is_refused(policy):
    with pytest.raises(ConfigError, match="give input_ids or inputs_embeds"):
        policy(attention_mask=BATCH["attention_mask"])


def test_strength_a_row_equals_single_numbers(policy):
    strengths = [0.0, 1.5, -0.5]
    with torch.no_grad():
        expected = torch.stack([policy(**BATCH, strength=s).logits[row] for row, s in enumerate(strengths)])
        actual = policy(**BATCH, strength=torch.tensor(strengths)).logits
    torch.testing.assert_close(actual[REAL], expected[REAL], **ROUNDING)


def test_strength_zero_in_a_tensor_is_bit_equal_to_the_base():
    base = tiny_base()
    policy = tiny_policy(base)
    with torch.no_grad():
        # The base alone on a batch of the same height, and one head, so that its matmuls have the same shapes.
        doubled = {name: value.repeat(2, 1) for name, value in BATCH.items()}
        expected = base.lm_head(base.model(**doubled).last_hidden_state[:3])
        assert torch.equal(policy(**BATCH, strength=torch.zeros(3)).logits, expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_gradients_of_the_logits_reach_the_adapter_through_the_stacked_pass(architecture):
    base = tiny_base(architecture)
    policy = tiny_policy(base)
    plain = plain_peft(base, policy)
    policy(**BATCH, strength=0.6, use_cache=False).logits[REAL].log_softmax(-1)[:, 5].sum().backward()

    z_theta = plain(**BATCH).logits
    with torch.no_grad(), plain.disable_adapter():
        z_base = plain(**BATCH).logits
    policy_logits = z_theta + (APART.alpha_0 / APART.alpha_tilde - 1) * z_base
    mixed = 0.4 * z_base + 0.6 * policy_logits
    mixed[REAL].log_softmax(-1)[:, 5].sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in policy.adapter_parameters().items():
        torch.testing.assert_close(parameter.grad, expected[f"base_model.model.{name}"], rtol=1e-4, atol=1e-3)


def test_failing_forward_leaves_the_plan_at_rest(policy):
    resting = policy.plan.blocks
    with pytest.raises(IndexError, match="index out of range"):
        policy(input_ids=torch.tensor([[VOCABULARY + 5]]), strength=0.5)
    assert policy.plan.blocks == resting


# -- several adapters ----------------------------------------------------------------------------------------------

COMPOSED = {
    "first": (QAdapterConfig(alpha_tilde=0.5, alpha_0=0.2), {"target_modules": ["q_proj", "down_proj"]}),
    "second": (
        QAdapterConfig("logits", alpha_tilde=2.0, alpha_0=1.5),
        {"target_modules": ["v_proj", "q_proj"], "r": 5},
    ),
}


def composed_policy(base):
    configs = {name: config for name, (config, _) in COMPOSED.items()}
    peft_configs = {name: lora(**changes) for name, (_, changes) in COMPOSED.items()}
    return train_randomly(QAdapterForCausalLM(copy.deepcopy(base), configs, peft_configs).eval())


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_composition_adds_the_policies_differences_from_the_base(weights, strength):
    base = tiny_base()
    policy = composed_policy(base)
    policy.adapter_weights = dict(zip(COMPOSED, weights, strict=True))
    expected = base(**BATCH).logits.double().detach()
    for (name, (config, changes)), weight in zip(COMPOSED.items(), weights, strict=True):
        plain = get_peft_model(copy.deepcopy(base), lora(**changes)).eval()
        set_peft_model_state_dict(plain, get_peft_model_state_dict(policy.peft_model, adapter_name=name))
        z_theta, z_base = two_passes(plain, **BATCH)
        expected = expected + strength * weight * (defined_logps(z_theta, z_base, config) - z_base)
    with torch.no_grad():
        actual = policy(**BATCH, strength=strength).logits.double()
    torch.testing.assert_close(actual[REAL].log_softmax(-1), expected[REAL].log_softmax(-1), **ROUNDING)


def test_parameters_of_adapters_are_told_apart():
    policy = composed_policy(tiny_base())
    first, second = (set(policy.adapter_parameters(name)) for name in COMPOSED)
    assert first
    assert second
    assert not first & second


def test_trainable_parameters_are_printed_as_peft_does(capsys):
    policy = composed_policy(tiny_base())
    policy.print_trainable_parameters()
    trained = sum(weight.numel() for weight in policy.adapter_parameters(policy.adapters[0]).values())
    assert f"trainable params: {trained:,} || all params: {policy.num_parameters():,} ||" in capsys.readouterr().out


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_of_the_base_is_off_in_training(architecture):
    changes = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5} if architecture in ("gpt2", "phi") else {}
    policy = tiny_policy(tiny_base(architecture, **{"attention_dropout": 0.5, **changes}))
    with torch.no_grad():
        expected = policy(**BATCH).logits
        policy.train()
        assert torch.equal(policy(**BATCH).logits, expected)


def test_dropout_of_the_adapter_acts_on_its_own_stream_alone():
    policy = tiny_policy(peft_config=lora(lora_dropout=0.5))
    batch = padded(token_ids(7, 4), side="right")
    completion_mask = batch["attention_mask"].bool()
    expected = policy.token_statistics(**batch, completion_mask=completion_mask)
    torch.manual_seed(0)
    actual = policy.train().token_statistics(**batch, completion_mask=completion_mask)
    assert torch.equal(actual.base_logits, expected.base_logits)
    assert not torch.allclose(actual.logits, expected.logits)
    adapted = [module for module in policy.base.get_decoder().modules() if isinstance(module, StreamLinear)]
    assert all(module.training and module.lora_dropout["default"].training for module in adapted)


def test_statistics_of_the_base_carry_no_gradient(policy):
    batch = padded(token_ids(7, 4), side="right")
    statistics = policy.token_statistics(**batch, completion_mask=batch["attention_mask"].bool())
    assert [name for name in statistics._fields if getattr(statistics, name).requires_grad] == ["logits", "lse"]


def test_forward_with_a_completion_mask_gives_token_statistics(policy):
    batch = padded(token_ids(7, 4), side="right")
    mask = batch["attention_mask"].bool()
    expected = policy.token_statistics(**batch, completion_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(policy(**batch, completion_mask=mask), expected, strict=True))
