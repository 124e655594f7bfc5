"""The dial a token, a row and under conditions; the KL cap; composition of adapters."""

import copy

import models
import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import StaticCache
from transformers.generation import CompileConfig

from qadapter import ConfigError, QAdapterConfig, QAdapterForCausalLM, StepState
from qadapter.functional import kl_divergence
from qadapter.modeling.decoding import stacked_weights
from qadapter.modeling.mixing import capped_logits, times
from qadapter.modeling.policy_part import DIAL

IDS = torch.tensor(models.token_ids(9, 9, 9))


@pytest.fixture(scope="module")
def base():
    return models.tiny_base()


@pytest.fixture(scope="module")
def policy(base):
    return models.tiny_policy(base)


def logits(model, **settings):
    with torch.no_grad():
        return model(IDS, **settings).logits.double()


@pytest.mark.parametrize("strength", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("weights", [(0.8, 0.4), (1.0, -0.5), (0.0, 1.0)])
def test_composition_is_the_sum_of_the_adapters_shifts(composed, strength, weights):
    both, alone = composed
    z_base = logits(both, strength=0.0)
    expected = z_base.clone()
    for (_name, single), weight in zip(alone.items(), weights, strict=True):
        expected += strength * weight * (logits(single) - z_base)
    actual = logits(both, strength=strength, adapter_weights=dict(zip(alone, weights, strict=True)))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # float32 model


def test_one_adapter_of_a_composition_equals_its_own_dial(composed):
    both, alone = composed
    for name, single in alone.items():
        torch.testing.assert_close(
            logits(both, adapter_weights={name: 0.6}), logits(single, strength=0.6), rtol=1e-5, atol=1e-5
        )


def test_composition_does_not_depend_on_the_order_of_the_weights(composed):
    both, _ = composed
    one = logits(both, adapter_weights={"concise": 0.8, "polite": 0.4})
    assert torch.equal(one, logits(both, adapter_weights={"polite": 0.4, "concise": 0.8}))


def test_weight_zero_removes_an_adapter_exactly(composed):
    both, _ = composed
    left_out = logits(both, adapter_weights={"polite": 0.5})
    assert torch.equal(left_out, logits(both, adapter_weights={"polite": 0.5, "concise": 0.0}))
    streams = both.stream_coefficients(1.0, {"polite": 0.5})
    assert "concise" not in streams


def test_all_weights_zero_are_exactly_the_base(composed, base):
    both, _ = composed
    assert torch.equal(logits(both, adapter_weights={}), base(IDS).logits.double())


def test_weights_a_row_equal_single_runs(composed):
    both, _ = composed
    weights = {"concise": torch.tensor([0.0, 0.5, 1.0]), "polite": torch.tensor([1.0, -0.3, 0.0])}
    batch = logits(both, adapter_weights=weights)
    for row in range(3):
        single = {name: float(values[row]) for name, values in weights.items()}
        torch.testing.assert_close(batch[row], logits(both, adapter_weights=single)[row], rtol=1e-4, atol=1e-4)


def test_weights_a_row_generate_what_single_runs_generate(composed):
    both, _ = composed
    weights = {"concise": torch.tensor([0.0, 0.5, 1.0]), "polite": torch.tensor([1.0, -0.3, 0.0])}
    options = {"do_sample": False, "max_new_tokens": 6}
    batch = both.generate(IDS, adapter_weights=weights, **options)
    for row in range(3):
        single = {name: float(values[row]) for name, values in weights.items()}
        assert torch.equal(batch[row : row + 1], both.generate(IDS[row : row + 1], adapter_weights=single, **options))


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("given", [{"concise": torch.tensor(0.8), "polite": 0.4}, torch.tensor([[0.8, 0.4]])])
def test_one_number_as_a_tensor_serves_all_rows_however_many_texts_they_get(composed, options, given):
    both, _ = composed
    texts = []
    for weights, cap in ((given, torch.tensor([0.3])), ({"concise": 0.8, "polite": 0.4}, 0.3)):
        torch.manual_seed(5)
        texts.append(both.generate(IDS, max_new_tokens=4, adapter_weights=weights, max_kl=cap, **options))
    assert torch.equal(*texts)


def test_the_models_own_weights_may_name_some_adapters_only(composed):
    both, alone = composed
    with both.dial(adapter_weights={"polite": 1.0}):
        torch.testing.assert_close(logits(both), logits(alone["polite"]), rtol=1e-4, atol=1e-4)
        assert both.generate(IDS, max_new_tokens=2).shape == (3, IDS.shape[1] + 2)
    before, both.adapter_weights = both.adapter_weights, {"polit": 1.0}
    with pytest.raises(ConfigError, match=r"adapter_weights names \['polit'\]; the adapters are"):
        both.generate(IDS, max_new_tokens=2)
    both.adapter_weights = before


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (None, r"adapter_weights = None: give \{name: weight\}"),
        (torch.ones(1, 2), "adapter_weights = tensor"),
        ({"polit": 1.0}, r"adapter_weights names \['polit'\]; the adapters are"),
    ],
)
def test_a_dial_of_weights_that_are_none_is_refused(composed, weights, said):
    with pytest.raises(ConfigError, match=said), composed[0].dial(adapter_weights=weights):
        pass


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": 0.4},
        {"strength": 1.5, "max_kl": 0.05},
        {"min_kl": 0.1, "decay": 0.7},
        {"strength": torch.tensor([0.0, 0.5, 2.0])},
        {"strength": 0.6, "adapter_weights": {"concise": 0.5}},
    ],
)
def test_within_a_dial_a_call_without_settings_equals_one_with_them(composed, settings):
    both, _ = composed
    expected = both.generate(IDS, max_new_tokens=4, do_sample=False, **settings)
    with both.dial(**settings) as policy:
        assert policy is both
        assert torch.equal(policy.generate(IDS, max_new_tokens=4, do_sample=False), expected)


def test_dials_within_dials_leave_what_they_do_not_name_and_end_where_they_began(policy):
    own = {name: getattr(policy, name) for name in DIAL}
    with policy.dial(strength=0.5, max_kl=0.1):
        with pytest.raises(ConfigError, match="max_kl = -1"), policy.dial(max_kl=-1):
            logits(policy)
        with policy.dial(max_kl=None):
            assert (policy.strength, policy.max_kl) == (0.5, None)
        assert (policy.strength, policy.max_kl) == (0.5, 0.1)
    assert {name: getattr(policy, name) for name in DIAL} == own


def test_a_setting_that_the_dial_does_not_have_is_refused(policy):
    refused = pytest.raises(
        ConfigError, match=r"dial sets \['cap'\]; the settings are strength, adapter_weights, max_kl"
    )
    with refused, policy.dial(strength=0.5, cap=0.1):
        pass
    assert policy.strength == 1.0


def test_weights_of_another_number_of_rows_are_refused_by_name(composed):
    with pytest.raises(ConfigError, match=r"adapter_weights\['concise'\] has the shape \(2,\): .* one a row, \(3,\)"):
        composed[0].generate(IDS, max_new_tokens=2, adapter_weights={"concise": torch.ones(2), "polite": torch.ones(3)})


def test_a_cap_needs_no_prompt(policy):
    text = policy.generate(bos_token_id=3, max_new_tokens=4, do_sample=False, max_kl=0.1)
    assert torch.equal(text, policy.generate(torch.tensor([[3]]), max_new_tokens=4, do_sample=False, max_kl=0.1))


def test_unknown_adapter_in_the_weights_is_refused(composed):
    with pytest.raises(ConfigError, match=r"names \['loud'\]; the adapters are \['concise', 'polite'\]"):
        composed[0](IDS, adapter_weights={"loud": 1.0})


def test_strength_a_token_equals_the_strengths_apart(policy):
    strengths = torch.linspace(-0.5, 1.5, 27).view(3, 9)
    mixed = logits(policy, strength=strengths)
    for t in range(9):
        for row in range(3):
            alone = logits(policy, strength=float(strengths[row, t]))[row, t]
            torch.testing.assert_close(mixed[row, t], alone, rtol=1e-5, atol=1e-5)


def test_strength_a_token_for_the_last_positions_is_theirs(policy):
    strengths = torch.linspace(-0.5, 1.5, 27).view(3, 9)
    kept = logits(policy, strength=strengths, logits_to_keep=2)
    torch.testing.assert_close(kept, logits(policy, strength=strengths)[:, -2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [2, torch.tensor([1, 4])], ids=["the last", "some"])
def test_one_strength_as_a_table_serves_every_kept_position(policy, kept):
    expected, record = logits(policy, strength=0.7, logits_to_keep=kept), []
    actual = logits(policy, strength=torch.tensor([[0.7]]), logits_to_keep=kept, strength_record=record)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert record[0].tolist() == pytest.approx([0.7] * 3)


def test_weights_a_row_go_along_the_rows_of_strengths_a_token():
    strengths, weights = torch.rand(3, 3), torch.tensor([1.0, 0.5, -2.0])
    assert torch.equal(times(strengths, weights), torch.stack([s * w for s, w in zip(strengths, weights, strict=True)]))


def test_weights_a_row_stand_in_the_adapters_order():
    weights = stacked_weights({"b": torch.tensor([1.0, 2.0]), "a": 0.5}, ["a", "b", "c"], 2, torch.device("cpu"))
    assert weights.tolist() == [[0.5, 1.0, 0.0], [0.5, 2.0, 0.0]]


@pytest.mark.parametrize("cap", [0.0, 1e-4, 0.05, 0.5])
def test_kl_never_exceeds_the_cap_and_reaches_it_where_it_binds(policy, cap):
    z_base, free = logits(policy, strength=0.0), logits(policy, strength=1.5)
    capped = logits(policy, strength=1.5, max_kl=cap)
    kl, unlimited = (kl_divergence(own.double(), z_base.double()) for own in (capped, free))
    assert (kl <= cap + 1e-10).all()  # `z_base` is of a pass with other rows
    binds = unlimited > cap
    assert binds.any()
    torch.testing.assert_close(kl[binds], torch.full_like(kl[binds], cap), rtol=1e-3, atol=6e-6)
    torch.testing.assert_close(capped[~binds], free[~binds])


@pytest.mark.parametrize("cap", [1e-3, 0.05])
def test_the_cap_holds_in_bfloat16(cap):
    policy = models.tiny_policy(models.tiny_base(dtype=torch.bfloat16))
    # The base of the same pass, as a pass of its own rounds otherwise: a cap of 0 leaves nothing else.
    base, capped, free = (logits(policy, strength=1.5, max_kl=limit).double() for limit in (0.0, cap, None))
    assert (kl_divergence(capped, base) <= cap).all()
    assert (kl_divergence(free, base) > cap).any()


@pytest.mark.parametrize("cap", [0.0, 1e-5, 1e-3, 0.3])
def test_the_cap_holds_for_a_vocabulary_whose_kl_float32_rounds(cap):
    base, delta = torch.randn(2, 1, 9, 50_000, generator=torch.Generator().manual_seed(0)) * torch.tensor(5.0)
    capped, _ = capped_logits(base + delta, base, torch.tensor(cap))
    assert (kl_divergence(capped.double(), base.double()) <= cap).all()


def test_an_infinite_cap_changes_nothing_and_a_cap_a_row_is_its_rows(policy):
    torch.testing.assert_close(logits(policy, max_kl=torch.inf), logits(policy), rtol=1e-5, atol=1e-5)
    caps = torch.tensor([torch.inf, 0.0, 0.1])
    batch = logits(policy, max_kl=caps)
    for row, cap in enumerate(caps.tolist()):
        torch.testing.assert_close(batch[row], logits(policy, max_kl=cap)[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["a", "lora", "my.adapter"])
def test_an_adapter_name_that_peft_would_confuse_is_refused(base, name):
    with pytest.raises(ConfigError, match=f"adapter name '{name}' cannot be told from PEFT's"):
        QAdapterForCausalLM(copy.deepcopy(base), {name: models.APART}, {name: models.lora()})


@pytest.mark.parametrize("name", ["half", "train", "training"])
def test_an_adapter_name_that_modules_use_themselves_is_refused(base, name):
    with pytest.raises(ConfigError, match=f"adapter name '{name}' is an attribute of PyTorch's modules: choose"):
        QAdapterForCausalLM(copy.deepcopy(base), {name: models.APART}, {name: models.lora()})


@pytest.mark.parametrize("cap", [-0.1, float("nan")])
def test_a_cap_below_zero_or_nan_is_refused(policy, cap):
    with pytest.raises(ConfigError, match="max_kl = .*: must be 0 or above"):
        policy(IDS, max_kl=cap)


def test_capped_share_is_the_largest_that_fits():
    generator = torch.Generator().manual_seed(0)
    z_base, z = torch.randn(2, 3, 5, 11, generator=generator)
    _, share = capped_logits(4 * z, z_base, torch.tensor(0.2))
    beyond = z_base + (share + 1e-4).unsqueeze(-1) * (4 * z - z_base)
    assert ((kl_divergence(beyond, z_base) > 0.2) | (share == 1)).all()


def test_generate_reports_the_strength_used_at_each_token(policy):
    output = policy.generate(IDS, do_sample=False, max_new_tokens=7, max_kl=0.05, output_strengths=True)
    assert output.strengths.shape == (3, 7)
    assert ((output.strengths >= 0) & (output.strengths <= 1)).all()
    assert (output.strengths < 1).any()
    # The recorded strengths, applied without the cap, give the same text.
    written = output.sequences
    every = torch.ones(3, written.shape[1])
    every[:, 8:-1] = output.strengths
    with torch.no_grad():
        again = policy(written, strength=every).logits.argmax(-1)
    assert torch.equal(again[:, 8:-1], written[:, 9:])


def test_a_number_of_numpy_is_a_number(policy):
    assert torch.equal(logits(policy, strength=np.float32(0.5)), logits(policy, strength=0.5))


def test_callable_strength_sees_every_token_and_equals_a_loop(policy):
    seen = []

    def alternate(state: StepState):
        seen.append((state.input_ids.shape[1], state.prompt_length))
        return torch.where(state.input_ids[:, -1] % 2 == 0, 1.0, 0.2)

    text = policy.generate(IDS, do_sample=False, max_new_tokens=5, strength=alternate)
    assert seen == [(9 + step, 9) for step in range(5)]
    expected = IDS
    for _ in range(5):
        with torch.no_grad():
            now = torch.where(expected[:, -1] % 2 == 0, 1.0, 0.2)
            following = policy(expected, strength=now).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, following], dim=1)
    assert torch.equal(text, expected)


def test_callable_strength_of_the_wrong_shape_is_refused(policy):
    with pytest.raises(ConfigError, match=r"gave the shape \(2,\); one value a row is \(3,\)"):
        policy.generate(IDS, max_new_tokens=2, strength=lambda state: torch.ones(2))


def test_callable_strength_with_assisted_decoding_is_refused(policy):
    with pytest.raises(ConfigError, match="a callable strength cannot be used with prompt_lookup_num_tokens"):
        policy.generate(IDS[:1], max_new_tokens=2, strength=lambda state: 1.0, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_assisted_decoding_gives_the_same_text(policy, base, strength):
    options = {"do_sample": False, "max_new_tokens": 9, "strength": strength}
    plain = policy.generate(IDS[:1], **options)
    assert torch.equal(plain, policy.generate(IDS[:1], prompt_lookup_num_tokens=2, **options))
    assert torch.equal(plain, policy.generate(IDS[:1], assistant_model=copy.deepcopy(base), **options))


def test_callable_strength_in_forward_is_asked_once_for_the_whole_text(policy):
    seen = []

    def by_length(state):
        seen.append((tuple(state.input_ids.shape), state.prompt_length))
        return torch.tensor([0.2, 1.0, -0.5])

    actual = logits(policy, strength=by_length)
    assert seen == [((3, 9), 0)]
    assert torch.equal(actual, logits(policy, strength=torch.tensor([0.2, 1.0, -0.5])))


def test_a_callable_strength_is_refused_where_a_cache_holds_a_part_of_the_text(policy):
    """It would see the new tokens alone."""
    with torch.no_grad():
        cache = policy(IDS, use_cache=True, strength=torch.full((3,), 0.5)).past_key_values
    with pytest.raises(ConfigError, match="reads the text so far: .* without a cache"):
        policy(IDS[:, -1:], past_key_values=cache, strength=lambda state: 0.5)


@pytest.mark.parametrize(
    "value", [float("nan"), torch.tensor([1.0, float("nan"), 0.0]), torch.tensor([3e38, 1.0, 1.0])]
)
def test_callable_strength_that_is_not_finite_is_refused(policy, value):
    with pytest.raises(ConfigError, match=r"strength \(from the callable\) = .*must be.* finite"):
        policy.generate(IDS, max_new_tokens=2, strength=lambda state: value)


def test_kl_from_the_base_is_monotone_in_strength(policy):
    z_base = logits(policy, strength=0.0)
    last = torch.zeros(3, 9, dtype=torch.float64)
    for strength in (0.0, 0.25, 0.5, 1.0, 1.5, 3.0):
        kl = kl_divergence(logits(policy, strength=strength), z_base)
        assert (kl >= last - 1e-6).all()
        last = kl


def test_score_of_a_composition_is_refused(composed):
    both, _ = composed
    with pytest.raises(ConfigError, match=r"score reads one adapter, and this policy has \['concise', 'polite'\]"):
        both.score(IDS, torch.ones_like(IDS), torch.ones_like(IDS, dtype=torch.bool))


RUNS = [
    (QAdapterConfig(), {"strength": 0.0}, 1),
    (QAdapterConfig(), {"strength": 1.0}, 1),
    (QAdapterConfig(), {"strength": 0.5}, 2),
    (QAdapterConfig(), {"strength": 1.0, "max_kl": 0.1}, 2),
    (models.APART, {"strength": 0.0}, 1),
    (models.APART, {"strength": 1.0}, 2),
]


@pytest.mark.parametrize(("config", "settings", "streams"), RUNS)
@pytest.mark.parametrize("generating", [False, True])
def test_only_the_streams_that_are_needed_run_in_one_pass(base, config, settings, streams, generating):
    policy = models.tiny_policy(base, config)
    assert_passes(policy, streams, heads=2 if "max_kl" in settings else 1, generating=generating, **settings)


@pytest.mark.parametrize(("weights", "streams"), [({"concise": 1.0, "polite": 0.5}, 3), ({"concise": 1.0}, 2), ({}, 1)])
def test_a_composition_is_one_pass_of_its_adapters_and_the_base_and_one_head(composed, weights, streams):
    for generating in (False, True):
        assert_passes(composed[0], streams, heads=1, generating=generating, adapter_weights=weights)


def assert_passes(policy, streams, heads, generating, **settings):
    """Each step is one pass of the decoder over `streams` rows for each of ours, and `heads` matmuls with the head."""
    rows, products = [], []
    hooks = [
        policy.base.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0])),
        policy.base.lm_head.register_forward_pre_hook(lambda _, args: products.append(args[0].shape[0])),
    ]
    try:
        if generating:
            policy.generate(IDS, max_new_tokens=4, do_sample=False, **settings)
        else:
            logits(policy, **settings)
    finally:
        for hook in hooks:
            hook.remove()
    steps = 4 if generating else 1
    assert rows == [3 * streams] * steps
    assert products == [3] * heads * steps


@pytest.mark.parametrize("strength", [0.0, 0.7, 1.0, torch.tensor([0.0, 0.7, -0.3])], ids=["0", "0.7", "1", "a row"])
def test_a_decoding_step_compiles_to_one_graph_with_a_static_cache(policy, strength):
    compiled = torch.compile(policy.forward, backend="eager", fullgraph=True, dynamic=False)
    texts = []
    for step in (policy.forward, compiled):
        cache = StaticCache(config=policy.config, max_cache_len=16)
        with torch.no_grad():
            tokens = policy(IDS, past_key_values=cache, use_cache=True, strength=strength).logits[:, -1:].argmax(-1)
            written = [tokens]
            for position in range(9, 13):
                places = torch.full((3, 1), position)
                settings = {"past_key_values": cache, "use_cache": True, "strength": strength}
                tokens = step(input_ids=tokens, position_ids=places, **settings).logits.argmax(-1)
                written.append(tokens)
        texts.append(torch.cat(written, dim=1))
    torch.compiler.reset()
    assert torch.equal(*texts)


def test_generate_is_compiled_once_for_all_strengths_and_weights(composed):
    """As it is on a GPU, without a break in the graph; a strength that needs fewer streams has a graph of its own."""
    both, _ = composed
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True  # transformers compiles on accelerators alone
    options = {"max_new_tokens": 5, "do_sample": False}
    compiled = {"cache_implementation": "static", "compile_config": config}
    names = both.adapters
    dials = [
        *({"strength": strength} for strength in (0.6, -0.4, torch.tensor([0.1, 0.9, 1.7]))),
        {"strength": 0.3, "adapter_weights": dict.fromkeys(names, 0.7)},
        {"strength": 0.0},
        {"strength": 0.4, "adapter_weights": {names[0]: 0.5}},
        {"strength": 0.4, "adapter_weights": {names[0]: 0.9}},
        {"strength": 0.4, "min_kl": 0.3},
        {"strength": 1.7, "min_kl": torch.tensor([0.0, 0.2, 0.6])},
    ]
    torch.compiler.reset()
    counters.clear()
    graphs = []
    for dial in dials:
        expected = both.generate(IDS, **options, **dial)
        assert torch.equal(both.generate(IDS, **options, **dial, **compiled), expected)
        graphs.append(counters["stats"]["unique_graphs"])
    torch.compiler.reset()
    assert graphs[:4] == [1] * 4
    assert graphs[-3] <= 5
    assert graphs[-1] == graphs[-2] == graphs[-3] + 1  # one for all thresholds


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # the compiler's own
def test_compiled_answers_are_those_of_eager_passes():
    """By the compiler that users have, on one layer: more of them, traced but not compiled, are tested above."""
    policy = models.tiny_policy(models.tiny_base(num_hidden_layers=1))
    config = CompileConfig(mode=None, fullgraph=True)
    config._compile_all_devices = True
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options["strength"] = torch.tensor([0.0, 0.7, -0.3])
    torch.compiler.reset()
    expected = policy.generate(IDS, **options)
    ours = policy.generate(IDS, **options, cache_implementation="static", compile_config=config)
    torch.compiler.reset()
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


def test_the_models_own_callable_strength_is_asked_where_a_call_gives_none(policy):
    expected = [logits(policy, strength=0.3), policy.generate(IDS, max_new_tokens=4, do_sample=False, strength=0.3)]
    with policy.dial(strength=lambda state: 0.3):
        assert torch.equal(logits(policy), expected[0])
        assert torch.equal(policy.generate(IDS, max_new_tokens=4, do_sample=False), expected[1])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_kl": torch.ones(2)}, r"max_kl has the shape \(2,\): give one number, or one a row, \(3,\)"),
        ({"adapter_weights": {"default": torch.ones(2)}}, r"adapter_weights\['default'\] has the shape \(2,\)"),
        ({"adapter_weights": torch.ones(2, 1)}, r"adapter_weights has the shape \(2, 1\)"),
        (
            {"output_hidden_states": True},
            r"output_hidden_states: .* within `model.plan.running\(None\)`",
        ),
        ({"output_attentions": True}, "output_attentions: .* Ask model.base"),
    ],
)
def test_what_forward_cannot_give_is_refused(policy, settings, named):
    with pytest.raises(ConfigError, match=named):
        policy(input_ids=IDS, **settings)


def test_the_states_that_forward_refuses_are_had_as_it_says(policy, base):
    states = {}
    with torch.no_grad():
        for stream in (None, "default"):
            with policy.plan.running(stream):
                states[stream] = policy.base(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        expected = base(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(states[None], expected)
    assert not torch.equal(states["default"], expected)


def test_a_tuple_is_given_where_no_dict_is_wanted(policy):
    with torch.no_grad():
        assert torch.equal(policy(input_ids=IDS, return_dict=False)[0], logits(policy))


REAL = "real numbers, of a float type or integers"


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
@pytest.mark.parametrize("name", ["strength", "max_kl", "min_kl", "adapter_weights"])
def test_a_tensor_of_no_real_numbers_is_refused(policy, name, dtype):
    """Truth values are no numbers, and of complex ones the imaginary part would be dropped."""
    values = torch.ones(3, dtype=dtype)
    weights = [{"default": values}, {"default": values[0]}, values.view(3, 1)]
    for value in weights if name == "adapter_weights" else [values, values[0]]:
        for call in (policy, policy.generate):
            with pytest.raises(ConfigError, match=rf"{name}.* is a tensor of {dtype}: give {REAL}"):
                call(IDS, **{name: value})
    if name == "strength":
        with pytest.raises(ConfigError, match=rf"strength \(from the callable\) is a tensor of {dtype}: give {REAL}"):
            policy.generate(IDS, max_new_tokens=2, strength=lambda state: values)


def test_integers_in_a_tensor_are_numbers(policy):
    strengths = torch.tensor([0, 1, 2])
    assert torch.equal(logits(policy, strength=strengths), logits(policy, strength=strengths.float()))


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_strengths_a_row_in_a_list_are_refused_with_the_tensor_that_is_taken(policy, kind):
    for setting in ({"strength": kind([0.1, 0.2, 0.3])}, {"adapter_weights": {"default": kind([0.1, 0.2, 0.3])}}):
        for call in (policy, policy.generate):
            with pytest.raises(ConfigError, match=r"0\.3\]?\)?: give one number, or a tensor of one a row, \(3,\)"):
                call(IDS, **setting)
