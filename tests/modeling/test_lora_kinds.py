"""Which adapters run as streams, equal to PEFT's own layers, and which are refused."""

import copy

import pytest
import torch
from models import (
    APART,
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
from peft import IA3Config, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.errors import ConfigError
from qadapter.functional import mix_coefficients, mix_streams
from qadapter.fused import token_statistics
from qadapter.modeling.streams import StreamLinear, narrow_adapters

HEAD_TOO = ["q_proj", "down_proj", "lm_head"]
KINDS = {
    "LoRA on two layers": {"target_modules": ["q_proj", "down_proj"]},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA with ranks of its own": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 1}},
    "LoRA on the head": {"target_modules": HEAD_TOO},
    "DoRA on the head": {"target_modules": HEAD_TOO, "use_dora": True},
}
BATCH = padded(token_ids(7, 4, 3))
REAL = BATCH["attention_mask"].bool()
# float32 matmuls of stacked and of separate batches add in different orders; logits here are of size 10.
ROUNDING = {"rtol": 1e-5, "atol": 1e-4}

kinds = pytest.mark.parametrize("kind", KINDS)


def pair_of_models(kind, dtype=torch.float32):
    """(policy, PEFT's own model) with the same weights."""
    base = tiny_base(dtype=dtype)
    policy = tiny_policy(base, peft_config=lora(**KINDS[kind]))
    return policy, plain_peft(base, policy, lora(**KINDS[kind]))


@kinds
def test_logits_equal_the_definition(kind):
    policy, plain = pair_of_models(kind)
    z_theta, z_base = two_passes(plain, **BATCH)
    for strength in (0.0, 0.6, 1.0):
        expected = defined_logps(z_theta, z_base, APART, strength)
        with torch.no_grad():
            actual = policy(**BATCH, strength=strength).logits.double().log_softmax(-1)
        torch.testing.assert_close(actual[REAL], expected[REAL], **ROUNDING)


@kinds
def test_token_statistics_and_their_gradients_equal_two_passes(kind):
    policy, plain = pair_of_models(kind)
    rows = padded(token_ids(7, 4), side="right")
    completion_mask = rows["attention_mask"].bool()
    completion_mask[:, :2] = False
    mask = completion_mask[:, 1:]
    policy.token_statistics(**rows, completion_mask=completion_mask).logps.sum().backward()

    with torch.no_grad(), plain.disable_adapter():
        z_base = plain(**rows).logits
    mixed = mix_streams([plain(**rows).logits, z_base], mix_coefficients("residual", APART.alpha_tilde, APART.alpha_0))
    token_statistics(mixed[:, :-1][mask], z_base[:, :-1][mask], rows["input_ids"][:, 1:][mask]).logps.sum().backward()

    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    actual = {f"base_model.model.{name}": p.grad for name, p in policy.adapter_parameters().items()}
    assert set(actual) == set(expected)
    for name, grad in expected.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("architecture", "targets"), [("mixtral", ["q_proj", "o_proj"]), ("deepseek", ["q_b_proj", "o_proj"])]
)
def test_mixture_of_experts_under_an_attention_lora_equals_the_definition(architecture, targets):
    base = tiny_base(architecture)
    policy = tiny_policy(base, peft_config=lora(target_modules=targets))
    z_theta, z_base = two_passes(plain_peft(base, policy, lora(target_modules=targets)), **BATCH)
    expected = defined_logps(z_theta, z_base, APART, 0.6)
    with torch.no_grad():
        assert torch.equal(policy(**BATCH, strength=0.0).logits, base(**BATCH).logits)
        actual = policy(**BATCH, strength=0.6).logits.double().log_softmax(-1)
    torch.testing.assert_close(actual[REAL], expected[REAL], **ROUNDING)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")  # PEFT's own keys
def test_lora_on_experts_is_refused_by_name():
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    message = r"LoRA on .*gate \(MixtralTopKRouter\) cannot run beside .* as in k_proj o_proj q_proj v_proj\."
    with pytest.raises(ConfigError, match=message):
        tiny_policy(tiny_base("mixtral"), peft_config=lora(target_modules=[*targets, "gate"]))


@pytest.mark.parametrize("kind", ["LoRA on two layers", "DoRA", "DoRA on the head"])
def test_bf16_base_with_float32_adapter_equals_two_passes(kind):
    policy, plain = pair_of_models(kind, torch.bfloat16)
    assert {p.dtype for p in policy.adapter_parameters().values()} == {torch.float32}
    assert {p.dtype for p in policy.base.parameters() if not p.requires_grad} == {torch.bfloat16}
    z_theta, z_base = two_passes(plain, **BATCH)
    expected = defined_logps(z_theta, z_base, APART)
    with torch.no_grad():
        actual = policy(**BATCH).logits.double().log_softmax(-1)
    # bfloat16 keeps 8 bits: logits up to 20 are off by up to 2**-4 each, and the mix weighs two of them.
    torch.testing.assert_close(actual[REAL], expected[REAL], rtol=0.0, atol=0.25)


def test_dora_on_a_bf16_base_is_peft_s_bit_by_bit_at_strength_1():
    base, config = tiny_base(dtype=torch.bfloat16), lora(**KINDS["DoRA on the head"])
    policy = tiny_policy(base, QAdapterConfig(), config)
    plain = plain_peft(base, policy, config)
    with torch.no_grad():
        assert torch.equal(policy(**BATCH).logits[REAL], plain(**BATCH).logits[REAL])


def test_layer_without_a_plan_equals_peft():
    generator = torch.Generator().manual_seed(7)
    base_layer = nn.Linear(5, 11)
    ours, theirs = (
        train_randomly(kind(copy.deepcopy(base_layer), "default", lora(), r=3, lora_alpha=7)).eval()
        for kind in (StreamLinear, LoraLinear)
    )
    x = torch.randn(3, 7, 5, generator=generator)
    assert torch.equal(ours(x), theirs(x))
    ours.merge()
    theirs.merge()
    assert torch.equal(ours(x), theirs(x))


def test_from_base_leaves_the_given_lora_config_usable_for_another_model():
    config = lora()
    tiny_policy(tiny_base("llama"), peft_config=config, trained=False)
    policy = tiny_policy(tiny_base("phi"), peft_config=config, trained=False)
    assert any("dense" in name for name in policy.adapter_parameters())
    assert not any(isinstance(m, StreamLinear) for m in get_peft_model(tiny_base(), config).modules())


REFUSED = {
    "modules_to_save": (lora(modules_to_save=["lm_head"]), r"LoraConfig\.modules_to_save is set"),
    "bias": (lora(bias="all"), "LoraConfig.bias = 'all'"),
    "tokens": (lora(trainable_token_indices=[3]), r"LoraConfig\.trainable_token_indices is set"),
    "replication": (lora(layer_replication=[(0, 2), (1, 2)]), r"LoraConfig\.layer_replication is set"),
    "bias of B": (lora(lora_bias=True), r"LoraConfig\.lora_bias is set"),
    "PiSSA": (lora(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    "OLoRA": (lora(init_lora_weights="olora"), "init_lora_weights = 'olora'"),
    "rank": (lora(r=4097), r"LoraConfig\.r = 4097: must be 4096 or below"),
    "a rank": (lora(rank_pattern={"q_proj": 5000}), r"LoraConfig\.rank_pattern = .*5000.*: ranks must be 4096"),
    "alpha": (lora(lora_alpha=1_000_000), r"LoraConfig\.lora_alpha = 1000000: must lie between 0 and 1e\+06"),
    "an alpha": (lora(alpha_pattern={"q_proj": -1}), r"LoraConfig\.alpha_pattern = .*: must lie between 0 and 1e\+06"),
    "embedding": (lora(target_modules=["embed_tokens", "q_proj"]), r"embed_tokens \(Embedding\)"),
    "IA3": (IA3Config(task_type="CAUSAL_LM"), "peft_config is a IA3Config"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_would_change_the_base_or_not_be_read_back_are_refused(kind):
    peft_config, message = REFUSED[kind]
    base = tiny_base()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ConfigError, match=message):
        QAdapterForCausalLM.from_base(base, APART, peft_config)
    for name, value in base.state_dict().items():
        assert "lora_" in name or torch.equal(value, before[name.replace("base_layer.", "")])


def test_peft_model_as_base_is_refused():
    with pytest.raises(ConfigError, match="base is a PeftModelForCausalLM: give the plain causal language model"):
        QAdapterForCausalLM.from_base(get_peft_model(tiny_base(), lora()))


def test_policy_as_base_is_refused():
    with pytest.raises(ConfigError, match="base is a QAdapterForCausalLM"):
        QAdapterForCausalLM.from_base(tiny_policy())


def test_base_that_carries_an_adapter_already_is_refused():
    policy = tiny_policy()
    with pytest.raises(ConfigError, match="LlamaForCausalLM, carries an adapter already"):
        QAdapterForCausalLM.from_base(policy.base)


def test_unknown_target_is_refused_by_name():
    with pytest.raises(ConfigError, match="no_such_layer"):
        QAdapterForCausalLM.from_base(tiny_base(), APART, lora(target_modules=["no_such_layer"]))


def test_model_arguments_do_not_apply_to_a_given_model():
    with pytest.raises(ConfigError, match=r"\['dtype'\] apply to a model that is loaded by id"):
        QAdapterForCausalLM.from_base(tiny_base(), dtype=torch.bfloat16)


def test_policy_without_adapters_is_refused():
    with pytest.raises(ConfigError, match="no adapter was given"):
        QAdapterForCausalLM(tiny_base(), {}, {})


def test_base_stays_frozen_and_only_the_adapter_trains():
    policy = tiny_policy(trained=False)
    trainable = {name for name, p in policy.base.named_parameters() if p.requires_grad}
    assert trainable == set(policy.adapter_parameters())
    assert all("lora_" in name for name in trainable)


@pytest.mark.parametrize("setting", [("residual", 0.5, 0.0), ("logits", 2.0, 0.0), ("logits", 0.7, 0.4)])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_coefficient_of_a_lone_stream_is_kept(setting, strength):
    """With α₀ = 0 the base's weight is 0 at some strengths; the other stream's is then not 1."""
    config = QAdapterConfig(*setting)
    base = tiny_base()
    policy = tiny_policy(base, config)
    z_theta, z_base = two_passes(plain_peft(base, policy), **BATCH)
    expected = defined_logps(z_theta, z_base, config, strength)
    with torch.no_grad():
        actual = policy(**BATCH, strength=strength).logits.double().log_softmax(-1)
    torch.testing.assert_close(actual[REAL], expected[REAL], **ROUNDING)
    assert actual.shape[-1] == VOCABULARY


def test_copies_of_an_adapter_in_the_bases_dtype_follow_its_changes(tmp_path):
    policy = tiny_policy(tiny_base(dtype=torch.bfloat16)).eval()
    ids = torch.tensor(token_ids(7, 7))
    with torch.no_grad():
        expected = policy(input_ids=ids, strength=0.7).logits
        narrow_adapters(policy.base)
        assert torch.equal(policy(input_ids=ids, strength=0.7).logits, expected)
        for parameter in policy.adapter_parameters().values():
            parameter.mul_(2)
        changed = policy(input_ids=ids, strength=0.7).logits
        narrow_adapters(policy.base)
        assert torch.equal(policy(input_ids=ids, strength=0.7).logits, changed)
    assert not torch.equal(changed, expected)


def test_a_copy_of_a_policy_follows_its_own_changes():
    policy = tiny_policy(tiny_base(dtype=torch.bfloat16)).eval()
    ids = torch.tensor(token_ids(7, 7))
    with torch.no_grad():
        narrow_adapters(policy.base)
        twin = copy.deepcopy(policy)
        (version,) = {parameter._version for parameter in policy.adapter_parameters().values()}
        for _ in range(version):  # the copy counts its changes from 0: up to where the original's count stands
            for parameter in twin.adapter_parameters().values():
                parameter.mul_(2)
        changed = twin(ids, strength=0.7).logits
        narrow_adapters(twin.base)
        assert torch.equal(twin(ids, strength=0.7).logits, changed)
        assert not torch.equal(policy(ids, strength=0.7).logits, changed)


@pytest.mark.parametrize("streams", [1, 2])
def test_products_written_as_sums_are_the_products(streams, monkeypatch):
    policy, ids = tiny_policy(tiny_base(dtype=torch.float64)).eval(), torch.tensor(token_ids(7, 7))
    strength = 1.0 if streams == 1 else 0.7
    with torch.no_grad():
        expected = policy(input_ids=ids, strength=strength).logits
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        actual = policy(input_ids=ids, strength=strength).logits
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_a_target_among_others_that_is_not_there_is_warned_of():
    with pytest.warns(UserWarning, match="no layer of LlamaForCausalLM is called 'vproj'; only the others are adapted"):
        policy = QAdapterForCausalLM.from_base(tiny_base(), APART, lora(target_modules=["q_proj", "vproj"]))
    assert {name.split(".")[-4] for name in policy.adapter_parameters()} == {"q_proj"}
