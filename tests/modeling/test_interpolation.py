"""The dial on weights: one stream of scaled LoRAs, equal to a base with those weights written into it."""

import copy

import models
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch._dynamo.utils import counters
from transformers import StaticCache

from qadapter import ConfigError, QAdapterConfig, QAdapterForCausalLM
from qadapter.export.distil import _student
from qadapter.functional import kl_divergence
from qadapter.modeling.streams import StreamLinear

IDS = torch.tensor(models.token_ids(9, 9, 9))
PROMPTS = models.padded(models.token_ids(6, 2, 4))
PLAIN = QAdapterConfig()  # residual, alpha_0 = alpha_tilde
STRENGTHS = [-0.5, 0.3, 1.0, 2.0]
KINDS = {
    "concise": (models.lora(r=2, target_modules=["q_proj", "v_proj"]), 1),
    "polite": (models.lora(r=4, use_rslora=True), 2),
}


@pytest.fixture(scope="module")
def base():
    return models.tiny_base()


@pytest.fixture(scope="module")
def policy(base):
    return models.tiny_policy(base, PLAIN)


@pytest.fixture(scope="module")
def composed(base):
    """Two adapters of different kinds on one base."""
    configs = dict.fromkeys(KINDS, PLAIN)
    model = QAdapterForCausalLM(
        copy.deepcopy(base), configs, {name: copy.deepcopy(kind) for name, (kind, _) in KINDS.items()}
    )
    return models.train_randomly(model.eval())


def scaled_base(base, policy, **factors):
    """The slow twin: a copy of the base whose weights are W + Σ_k f_k ΔW_k, as PEFT computes ΔW."""
    written = copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in policy.base.named_modules():
            for adapter in (set(factors) & set(layer.lora_A)) if isinstance(layer, LoraLayer) else ():
                written.get_submodule(name).weight += factors[adapter] * layer.get_delta_weight(adapter)
    return written


def logits(model, ids=IDS, **settings):
    with torch.no_grad():
        return model(ids, interpolation="weights", **settings).logits


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("architecture", [*models.FAST_PATHS, "gpt2", "gemma2"])
def test_it_is_the_base_with_the_scaled_lora_in_its_weights(architecture, strength):
    base = models.tiny_base(architecture)
    policy = models.tiny_policy(base, PLAIN)
    with torch.no_grad():
        expected = scaled_base(base, policy, default=strength)(IDS).logits
    torch.testing.assert_close(logits(policy, strength=strength), expected, rtol=1e-4, atol=1e-4)


def test_the_trained_policy_and_the_base_are_its_ends(base, policy):
    with torch.no_grad():
        assert torch.equal(logits(policy, strength=0.0), base(IDS).logits)
        assert torch.equal(logits(policy, strength=1.0), policy(IDS, strength=1.0).logits)
        between = policy(IDS, strength=0.5).logits
    assert not torch.allclose(logits(policy, strength=0.5), between, atol=1e-2)  # another path


def test_rows_of_mixed_strengths_equal_single_runs_and_0_the_base_bit_by_bit(base, policy):
    strengths = torch.tensor([0.0, 0.7, -0.3])
    mixed = logits(policy, strength=strengths)
    with torch.no_grad():
        assert torch.equal(mixed[0], base(IDS).logits[0])
    for row, strength in enumerate(strengths.tolist()):
        torch.testing.assert_close(mixed[row], logits(policy, strength=strength)[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.long])
def test_a_strength_and_weights_of_any_dtype(composed, dtype):
    dial = {"strength": torch.tensor([0, 1, 2]), "adapter_weights": torch.tensor([[1, 0], [0, 1], [1, 1]])}
    given = {name: value.to(dtype) for name, value in dial.items()}
    expected = logits(composed, **{name: value.float() for name, value in dial.items()})
    torch.testing.assert_close(logits(composed, **given), expected)
    texts = composed.generate(IDS, **given, interpolation="weights", do_sample=False, max_new_tokens=3)
    assert torch.equal(texts[:, :9], IDS)


@pytest.mark.parametrize("weights", [(0.8, 0.4), (1.0, -0.5), (0.0, 1.0)])
def test_composition_adds_the_scaled_loras(base, composed, weights):
    named = dict(zip(KINDS, weights, strict=True))
    with torch.no_grad():
        expected = scaled_base(base, composed, **{name: 0.7 * weight for name, weight in named.items()})(IDS).logits
    torch.testing.assert_close(logits(composed, strength=0.7, adapter_weights=named), expected, rtol=1e-4, atol=1e-4)


def test_composition_knows_no_order_and_weight_0_removes_an_adapter(composed):
    one = logits(composed, adapter_weights={"concise": 0.8, "polite": 0.4})
    assert torch.equal(one, logits(composed, adapter_weights={"polite": 0.4, "concise": 0.8}))
    left_out = logits(composed, adapter_weights={"polite": 0.5})
    assert torch.equal(left_out, logits(composed, adapter_weights={"polite": 0.5, "concise": 0.0}))
    assert list(composed.stream_coefficients(1.0, {"polite": 1.0}, "weights")) == ["polite"]
    assert list(composed.stream_coefficients(0.0, None, "weights")) == [None]


def test_weights_a_row_equal_single_runs(composed):
    weights = torch.tensor([[0.0, 1.0], [0.5, -0.3], [1.0, 0.0]])
    mixed = logits(composed, strength=torch.tensor([1.0, 0.5, 2.0]), adapter_weights=weights)
    for row, (strength, own) in enumerate(zip([1.0, 0.5, 2.0], weights.tolist(), strict=True)):
        single = logits(composed, strength=strength, adapter_weights=dict(zip(KINDS, own, strict=True)))
        torch.testing.assert_close(mixed[row], single[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strengths", [0.6, torch.tensor([0.0, 0.6, 1.3])])
def test_one_pass_of_as_many_rows_as_there_are_texts(policy, strengths):
    seen = []
    hook = policy.base.get_decoder().layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    policy.generate(**PROMPTS, strength=strengths, interpolation="weights", do_sample=False, max_new_tokens=3)
    hook.remove()
    assert seen == [3, 3, 3]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 2, "one_row": True},
        {"guidance_scale": 1.5},
        {"do_sample": True, "top_k": 5, "repetition_penalty": 1.2},
    ],
    ids=["greedy", "beams", "static", "assisted", "guided", "sampled"],
)
def test_generation_is_that_of_the_base_with_the_scaled_lora(base, policy, options):
    options = dict(options)
    prompts = {name: value[:1] for name, value in PROMPTS.items()} if options.pop("one_row", False) else PROMPTS
    options = {"do_sample": False, "max_new_tokens": 8, **options}
    written = scaled_base(base, policy, default=0.6)
    torch.manual_seed(0)
    expected = written.generate(**prompts, **options)
    torch.manual_seed(0)
    assert torch.equal(policy.generate(**prompts, strength=0.6, interpolation="weights", **options), expected)
    mixed = torch.full((len(prompts["input_ids"]),), 0.6)
    torch.manual_seed(0)
    assert torch.equal(policy.generate(**prompts, strength=mixed, interpolation="weights", **options), expected)


def test_an_assistant_drafts_for_the_weights_too(base, policy):
    prompt = {name: value[:1] for name, value in PROMPTS.items()}
    options = {"do_sample": False, "max_new_tokens": 8}
    expected = scaled_base(base, policy, default=0.6).generate(**prompt, **options)
    drafted = policy.generate(
        **prompt, strength=0.6, interpolation="weights", assistant_model=copy.deepcopy(base), **options
    )
    assert torch.equal(drafted, expected)


def test_a_generation_of_mixed_strengths_equals_single_runs(policy):
    strengths = [0.0, 0.5, 1.5]
    options = {"interpolation": "weights", "do_sample": False, "max_new_tokens": 6}
    batch = policy.generate(**PROMPTS, strength=torch.tensor(strengths), **options)
    for row, strength in enumerate(strengths):
        single = {name: value[row : row + 1] for name, value in PROMPTS.items()}
        assert torch.equal(batch[row], policy.generate(**single, strength=strength, **options)[0])


def test_the_cap_holds_and_costs_the_bases_stream(base, policy):
    seen = []
    hook = policy.base.get_decoder().layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    capped = logits(policy, strength=1.5, max_kl=0.2)
    hook.remove()
    assert seen == [6]
    with torch.no_grad():
        kl = kl_divergence(capped, base(IDS).logits)
        free = kl_divergence(logits(policy, strength=1.5), base(IDS).logits)
    assert float(kl.max()) <= 0.2 < float(free.max())


def test_what_comes_above_a_shared_trunk_is_scaled(base):
    policy = models.train_randomly(QAdapterForCausalLM.from_base(copy.deepcopy(base), PLAIN, models.lora(), 1).eval())
    with torch.no_grad():
        expected = scaled_base(base, policy, default=0.4)(IDS).logits
    torch.testing.assert_close(logits(policy, strength=0.4), expected, rtol=1e-4, atol=1e-4)
    capped = logits(policy, strength=0.4, max_kl=1e9)
    torch.testing.assert_close(capped, expected, rtol=1e-4, atol=1e-4)


def test_a_lora_on_the_head_is_scaled(base):
    policy = models.tiny_policy(base, PLAIN, models.lora(target_modules=["q_proj", "lm_head"]))
    for strength in (0.4, torch.tensor([0.4, 0.4, 0.4])):
        with torch.no_grad():
            expected = scaled_base(base, policy, default=0.4)(IDS).logits
        torch.testing.assert_close(logits(policy, strength=strength), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_scales_in_float32(base):
    policy = models.tiny_policy(models.tiny_base(dtype=torch.bfloat16), PLAIN)
    for module in policy.base.modules():
        if hasattr(module, "narrow_adapters"):
            module.narrow_adapters()
    a_number = logits(policy, strength=0.3)
    a_row = logits(policy, strength=torch.full((3,), 0.3))
    assert a_row.dtype == a_number.dtype == torch.bfloat16
    torch.testing.assert_close(a_row, a_number, rtol=0.05, atol=0.3)  # logits of up to 20, at 8 bits
    exact = models.tiny_policy(models.tiny_base(), PLAIN)
    torch.testing.assert_close(a_row.float(), logits(exact, strength=0.3), rtol=0.1, atol=0.6)


@pytest.mark.parametrize("strength", [0.6, torch.tensor([0.0, 0.6, 1.3])])
def test_with_gradients_the_logits_are_the_same(policy, strength):
    tracked = policy(IDS, strength=strength, interpolation="weights").logits
    assert tracked.requires_grad
    torch.testing.assert_close(tracked.detach(), logits(policy, strength=strength), rtol=1e-4, atol=1e-4)


def test_compiled_steps_do_not_compile_anew_for_another_strength(policy):
    model = copy.deepcopy(policy)
    counters.clear()
    step = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    outputs = []
    with torch.no_grad():
        for strength in (0.2, 0.9):
            cache = StaticCache(config=model.config, max_cache_len=16)
            dial = {"strength": torch.full((3,), strength), "interpolation": "weights"}
            outputs.append(step(IDS, past_key_values=cache, use_cache=True, **dial).logits)
    assert counters["stats"]["unique_graphs"] == 1
    for output, strength in zip(outputs, (0.2, 0.9), strict=True):
        torch.testing.assert_close(output, logits(policy, strength=strength), rtol=1e-4, atol=1e-4)


def test_the_models_own_interpolation_serves_calls_that_set_none(policy):
    with torch.no_grad():
        mixed = policy(IDS, strength=0.5).logits
        with policy.dial(interpolation="weights", strength=0.5):
            assert torch.equal(policy(IDS).logits, logits(policy, strength=0.5))
            assert torch.equal(policy(IDS, interpolation="logits").logits, mixed)


def test_a_folder_is_loaded_with_it(policy, base, tmp_path):
    base.save_pretrained(tmp_path / "base")
    policy.save_pretrained(tmp_path / "adapter")
    loaded = QAdapterForCausalLM.from_pretrained(
        tmp_path / "adapter", base_model=tmp_path / "base", interpolation="weights"
    )
    assert loaded.interpolation == "weights"
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS, strength=0.5).logits, logits(policy, strength=0.5))


@pytest.mark.parametrize(
    ("config", "kind"),
    [(QAdapterConfig(alpha_0=0.5), {}), (QAdapterConfig(parametrisation="logits"), {}), (PLAIN, {"use_dora": True})],
    ids=["alpha", "logits", "dora"],
)
def test_adapters_that_are_no_policy_by_themselves_are_refused(base, config, kind):
    policy = models.tiny_policy(base, config, models.lora(**kind))
    for call in (policy.forward, policy.generate):
        with pytest.raises(ConfigError, match=r"'default' is DoRA, or not of the residual form"):
            call(IDS, strength=0.5, interpolation="weights")


@pytest.mark.parametrize("generates", [False, True])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interpolation": "weight"}, r"interpolation = 'weight': it must be one of logits, weights"),
        ({"strength": lambda state: 0.5}, "a callable strength cannot be used"),
        ({"strength": torch.full((3, 9), 0.5)}, "strength has the shape"),
        ({"strength": float("nan")}, "strength = nan"),
    ],
)
def test_what_it_cannot_do_is_refused(policy, settings, message, generates):
    settings = {"interpolation": "weights", **settings}
    with pytest.raises(ConfigError, match=message):
        policy.generate(IDS, **settings) if generates else policy(IDS, **settings)


def test_a_decay_is_refused(policy):
    with pytest.raises(ConfigError, match="a decay cannot be used"):
        policy.generate(IDS, strength=0.5, decay=0.9, interpolation="weights")


def test_a_cache_of_other_streams_is_refused(policy):
    with torch.no_grad():
        first = policy(IDS, strength=0.5, interpolation="weights", use_cache=True)
        with pytest.raises(ConfigError, match=r"holds the streams \['a blend'\]"):
            policy(IDS[:, :1], strength=0.5, past_key_values=first.past_key_values)
        policy(IDS[:, :1], strength=0.5, interpolation="weights", past_key_values=first.past_key_values)


def test_a_cache_of_another_strength_is_refused(policy):
    with torch.no_grad():
        first = policy(IDS, strength=0.3, interpolation="weights", use_cache=True)
        with pytest.raises(ConfigError, match="holds what LoRAs scaled by .0.3. made of the text"):
            policy(IDS[:, :1], strength=0.9, interpolation="weights", past_key_values=first.past_key_values)


def test_adapters_without_weight_do_not_run(composed, monkeypatch):
    seen = set()
    for method in ("_adapted", "_adapt_in_place"):
        own = getattr(StreamLinear, method)

        def heard(layer, result, x, name, *factor, own=own):
            seen.add(name)
            return own(layer, result, x, name, *factor)

        monkeypatch.setattr(StreamLinear, method, heard)
    for weights in ({"polite": 1.0}, {"polite": 1.0, "concise": 0.5}):
        seen.clear()
        dial = {"strength": 0.7, "adapter_weights": weights, "interpolation": "weights"}
        composed.generate(**PROMPTS, **dial, max_new_tokens=2)
        assert seen == set(weights)


def test_adapters_may_have_the_names_of_other_streams(base):
    names = {"base": models.lora(), "a blend": models.lora(r=2)}
    model = QAdapterForCausalLM(copy.deepcopy(base), dict.fromkeys(names, PLAIN), names)
    models.train_randomly(model.eval())
    dial = {"adapter_weights": {"base": 1.0}, "use_cache": True}
    with torch.no_grad():
        cache = model(IDS, strength=1.0, **dial).past_key_values
        with pytest.raises(ConfigError, match="holds the streams"):
            model(IDS[:, :1], strength=0.0, past_key_values=cache, **dial)
        cache = model(IDS, strength=1.0, adapter_weights={"a blend": 1.0}, use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="holds the streams"):
            model(IDS[:, :1], strength=0.5, interpolation="weights", past_key_values=cache, **dial)


def test_a_plus_is_no_adapters_name(base):
    with pytest.raises(ConfigError, match=r"adapter name '\+'"):
        QAdapterForCausalLM(copy.deepcopy(base), {"+": PLAIN}, {"+": models.lora()})


def test_a_distilled_lora_begins_where_the_policy_is(policy, base, tmp_path):
    base.save_pretrained(tmp_path / "base")
    policy.save_pretrained(tmp_path / "adapter")
    model = QAdapterForCausalLM.from_pretrained(
        tmp_path / "adapter", base_model=tmp_path / "base", interpolation="weights"
    )
    with torch.no_grad():
        student = _student(model, {"strength": 0.5}).eval()(IDS).logits
    torch.testing.assert_close(student, logits(policy, strength=0.5), rtol=1e-4, atol=1e-4)


def test_a_merged_policy_runs_at_strength_1(policy):
    model = copy.deepcopy(policy)
    with model.merged(), torch.no_grad():
        torch.testing.assert_close(logits(model, strength=1.0), logits(policy, strength=1.0), rtol=1e-4, atol=1e-4)
        with pytest.raises(ConfigError, match=r"merged: .*not the streams \['a blend'\]"):
            logits(model, strength=0.5)
