"""Drift of tokens under many settings at once, against full logits of separate passes."""

import copy
from dataclasses import replace

import pytest
import torch
from models import APART, ARCHITECTURES, lora, tiny_base, tiny_policy, tiny_tokenizer, token_ids, train_randomly

from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.errors import ConfigError
from qadapter.evaluation import drift as drift_module
from qadapter.evaluation.columns import Column, parse_strengths, strength_columns, unique_names
from qadapter.evaluation.drift import Passage, TokenDrift, measure_passages, measure_texts
from qadapter.evaluation.drift_figures import breakdowns, drift_figures
from qadapter.evaluation.texts import Text
from qadapter.modeling.packed import enable_packing

TEXTS = [Text(row[:split], row[split:]) for row, split in zip(token_ids(5, 9, 7, 3, 12), (2, 1, 6, 1, 4), strict=True)]
LOGITS_FORM = QAdapterConfig(parametrisation="logits", alpha_tilde=2.0, alpha_0=0.7)


def by_definition(model, text, settings):
    """The figures of each token from the full logits of two passes of the model itself."""
    ids, start = torch.tensor([[*text.context, *text.answer]]), len(text.context) - 1
    targets = ids[0, start + 1 :, None]
    with torch.no_grad():
        logps, base = (model(ids, **one).logits[0, start:-1].log_softmax(-1) for one in (settings, {"strength": 0.0}))
    return TokenDrift(
        logps.gather(-1, targets)[:, 0],
        (logps.exp() * (logps - base)).sum(-1),
        (base.exp() * (base - logps)).sum(-1),
        -(logps.exp() * logps).sum(-1),
        (logps.argmax(-1) == base.argmax(-1)).to(logps.dtype),
        (logps.argmax(-1) == targets[:, 0]).to(logps.dtype),
    )


def assert_equal_to_definition(model, columns, tolerance):
    for text, measured in zip(TEXTS, measure_texts(model, TEXTS, columns), strict=True):
        for column in columns:
            expected = by_definition(model, text, column.settings())
            for name, ours, theirs in zip(TokenDrift._fields, measured.columns[column.name], expected, strict=True):
                torch.testing.assert_close(
                    ours, theirs, rtol=0, atol=tolerance, msg=lambda m, c=column, n=name: f"{c.name}, {n}: {m}"
                )


@pytest.mark.parametrize("config", [QAdapterConfig(), APART, LOGITS_FORM], ids=["one stream", "residual", "logits"])
def test_every_strength_equals_a_pass_of_its_own(config):
    model = tiny_policy(config=config).double()
    assert_equal_to_definition(model, strength_columns("policy", [-0.5, 0.25, 1.0, 1.7]), 1e-11)


@pytest.mark.parametrize("architecture", ["gemma2", "phi", "granite", "gpt2"])
def test_soft_caps_biases_and_scales_of_the_head(architecture):
    assert architecture in ARCHITECTURES
    model = tiny_policy(tiny_base(architecture), config=APART)
    assert_equal_to_definition(model, strength_columns("policy", [0.5, 1.0]), 2e-5)  # float32 rounding


def test_an_adapter_on_the_head():
    policy = tiny_policy(peft_config=lora(target_modules=["q_proj", "lm_head"])).double()
    assert_equal_to_definition(policy, strength_columns("policy", [0.5, 1.3]), 1e-11)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_neox"])
def test_packed_rows_give_what_padded_rows_give(architecture, monkeypatch):
    policy, columns = tiny_policy(tiny_base(architecture)).double(), strength_columns("policy", [0.5, 1.0])
    alike = [*TEXTS, *(replace(text, answer=[*text.answer, 5]) for text in TEXTS)]
    packed = measure_texts(policy, alike, columns, batch_tokens=30)
    monkeypatch.setattr(drift_module, "enable_packing", lambda model: False)
    for ours, theirs in zip(packed, measure_texts(policy, alike, columns), strict=True):
        torch.testing.assert_close(ours.base.logps, theirs.base.logps, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.columns, theirs.columns, rtol=1e-5, atol=1e-6)


def test_layers_below_the_adapter_run_once():
    policy = tiny_policy(
        config=APART, peft_config=lora(target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    ).double()
    assert policy.shared_layers == 1
    assert enable_packing(policy.base)  # it tries the model, which would count
    runs, columns = [], strength_columns("policy", [0.5, 1.0])
    layers = policy.base.get_decoder().layers
    handles = [layer.mlp.register_forward_hook(lambda *_, n=n: runs.append(n)) for n, layer in enumerate(layers)]
    measure_texts(policy, TEXTS, columns, batch_tokens=10**6)
    assert runs == [0, 1, 1]
    for handle in handles:
        handle.remove()
    assert_equal_to_definition(policy, columns, 1e-11)


def test_compositions_and_weights():
    base = tiny_base()
    model = QAdapterForCausalLM(
        base, {"first": APART, "second": LOGITS_FORM}, {"first": lora(), "second": lora()}
    ).eval()
    train_randomly(model).double()
    columns = [
        Column("both", 0.8),
        Column("weighted", 0.8, {"first": 0.3, "second": -0.4}),
        Column("one", 1.0, {"second": 1.0}),
    ]
    assert_equal_to_definition(model, columns, 1e-11)


@pytest.mark.parametrize(
    "peft_config",
    [{}, {"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "layers_to_transform": [1]}],
)
def test_interpolated_weights_equal_a_pass_of_their_own(peft_config):
    model = tiny_policy(config=QAdapterConfig(), peft_config=lora(**peft_config)).double()
    columns = strength_columns("policy", [-0.5, *(step / 8 for step in range(1, 9)), 1.7], interpolation="weights")
    assert len(columns) > 2 * drift_module.FEW_STREAMS
    assert_equal_to_definition(model, [*columns, Column("logits", 0.5)], 1e-11)


def test_interpolated_weights_of_a_composition():
    adapters = {"first": lora(), "second": lora(r=2)}
    model = QAdapterForCausalLM(tiny_base(), dict.fromkeys(adapters, QAdapterConfig()), adapters).eval()
    train_randomly(model).double()
    columns = [
        Column("both", 0.8, interpolation="weights"),
        Column("weighted", 0.8, {"first": 0.3, "second": -0.4}, interpolation="weights"),
        Column("one", 1.0, {"second": 1.0}, interpolation="weights"),
        Column("none", 1.0, {}, interpolation="weights"),
    ]
    assert_equal_to_definition(model, columns, 1e-11)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"decay": 0.9}, 'a decay cannot be used with interpolation="weights"'), ({"alpha_0": 0.5}, "mixes logits")],
)
def test_what_is_no_interpolation_of_weights_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Column("policy", interpolation="weights", **settings)


@pytest.mark.parametrize("interpolation", ["logits", "weights"])
def test_a_cap_on_the_kl_is_kept_at_every_token(interpolation):
    model = tiny_policy(config=APART if interpolation == "logits" else QAdapterConfig())
    caps = {"capped": 0.05, "free": 50.0}
    columns = [Column(name, 1.5, max_kl=cap, interpolation=interpolation) for name, cap in caps.items()]
    assert_equal_to_definition(model, columns, 2e-5)  # the cap is found in float32
    capped = torch.cat([measured.columns["capped"].kl for measured in measure_texts(model, TEXTS, columns)])
    assert capped.max() < 0.05 + 1e-6
    assert capped.max() > 0.049


def test_another_alpha_0_is_the_policy_of_that_setting():
    model = tiny_policy(config=APART).double()
    other = copy.deepcopy(model)
    other.configs = {"default": QAdapterConfig(alpha_tilde=APART.alpha_tilde, alpha_0=0.9)}
    (column,) = columns = [Column("other", 0.7, alpha_0=0.9)]
    for text, measured in zip(TEXTS, measure_texts(model, TEXTS, columns), strict=True):
        expected = by_definition(other, text, {"strength": 0.7})
        for ours, theirs in zip(measured.columns["other"], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    with pytest.raises(ConfigError, match="not by generating"):
        column.settings()


def test_an_untouched_adapter_is_exactly_the_base():
    model = tiny_policy(config=QAdapterConfig(), trained=False)
    for measured in measure_texts(model, TEXTS, strength_columns("policy", [0.5, 1.0, 3.0])):
        for own in measured.columns.values():
            assert torch.equal(own.logps, measured.base.logps)
            assert torch.equal(own.entropy, measured.base.entropy)
            assert own.kl.abs().max() == own.reverse_kl.abs().max() == 0
            assert own.agreement.min() == 1


def test_neither_batches_nor_blocks_change_a_number(monkeypatch):
    model, columns = tiny_policy(config=APART).double(), strength_columns("policy", [0.5, 1.0])
    columns.append(Column("decaying", 1.7, decay=0.7))
    expected = measure_texts(model, TEXTS, columns)
    monkeypatch.setattr(drift_module, "BLOCK_ELEMENTS", 300)
    monkeypatch.setattr(drift_module, "default_chunk_size", lambda weight: 4)
    for one, other in zip(expected, measure_texts(model, TEXTS, columns, batch_tokens=1), strict=True):
        for name in ("policy", "policy@0.5", "decaying"):
            for ours, theirs in zip(one.columns[name], other.columns[name], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_places_may_repeat_and_share_what_was_read():
    """Several last tokens after the same words: one row of the batch, as many scored tokens."""
    model, columns = tiny_policy(config=APART).double(), strength_columns("policy", [0.5, 1.0], decay=0.7)
    texts = [Text([5, 9], [7, last]) for last in (3, 4, 11)]
    apart = measure_texts(model, texts, columns)
    passage = Passage([5, 9, 7], [1, 2, 2, 2], [7, 3, 4, 11], [0, 1, 1, 1])
    (together,) = measure_passages(model, [passage], columns)
    for number, text in enumerate(apart):
        for name, own in [("base", text.base), *text.columns.items()]:
            shared = together.base if name == "base" else together.columns[name]
            for alone, at_once in zip(own, shared, strict=True):
                torch.testing.assert_close(at_once[[0, number + 1]], alone, rtol=0, atol=1e-12)


def test_progress_counts_every_text_and_the_mode_is_restored():
    model, done = tiny_policy().train(), []
    measure_texts(model, TEXTS, [Column("policy")], batch_tokens=12, advance=done.append)
    assert sum(done) == len(TEXTS)
    assert len(done) > 1
    assert model.training


def test_texts_of_one_prompt_count_once_in_every_breakdown():
    """Each text three times, said to belong together, tells no more than each text once."""
    texts = [replace(text, category="odd" if index % 2 else None) for index, text in enumerate(TEXTS)]
    drifts, tokenizer = measure_texts(tiny_policy(), texts, [Column("policy")]), tiny_tokenizer()
    once = breakdowns(drifts, texts, "policy", tokenizer)
    thrice = breakdowns(drifts * 3, texts * 3, "policy", tokenizer, groups=list(range(len(texts))) * 3)
    assert once.keys() == thrice.keys() == {"category", "token", "position"}
    for kind, parts in once.items():
        for name, figures in parts.items():
            for figure, interval in figures.items():
                again = thrice[kind][name][figure]
                assert again.n == 3 * interval.n
                assert again[:3] == pytest.approx(interval[:3], rel=1e-9, abs=1e-12, nan_ok=True), (kind, name, figure)


def test_intervals_of_shares_and_divergences_stay_within_their_ends():
    texts = [Text([3], [5, 6]), Text([4], list(range(7, 40)))]
    figures = drift_figures(measure_texts(train_randomly(tiny_policy(), scale=0.3), texts, [Column("policy", 1.5)]))
    for figure in ("kl", "reverse_kl", "entropy", "loss", "agreement"):
        interval = figures["policy"][figure]
        assert 0 <= interval.low <= interval.value <= interval.high
    assert figures["policy"]["agreement"].high <= 1
    assert figures["policy"]["loss_change"].low < 0  # two texts tell little: no end holds a change


def test_numbers_that_are_not_finite_are_refused():
    model = tiny_policy()
    with torch.no_grad():
        # Not a query's: attention on some CPUs makes zeros of NaN queries.
        next(p for name, p in model.adapter_parameters().items() if "v_proj" in name).fill_(torch.nan)
    with pytest.raises(ConfigError, match="'policy' are not finite: the adapter is damaged"):
        measure_texts(model, TEXTS, [Column("policy")])


@pytest.mark.parametrize(
    ("text", "strengths"),
    [
        ("1", [1.0]),
        ("0.25,0.5,1", [0.25, 0.5, 1.0]),
        ("1,0.5,1", [0.5, 1.0]),
        ("0:1:3", [0.0, 0.5, 1.0]),
        ("-0", [0.0]),
    ],
)
def test_strengths_are_lists_or_ranges(text, strengths):
    assert parse_strengths(text) == strengths


@pytest.mark.parametrize("text", ["", "a", "1,,2", "nan", "inf", "0:1", "0:1:1", "0:1:1e3", "0:1:99999", "0:1:2:3"])
def test_other_strengths_are_refused_in_one_line(text):
    with pytest.raises(ConfigError, match="--strengths .*: give numbers such as .* \\(of 2 to 1000\\)") as raised:
        parse_strengths(text)
    assert "\n" not in str(raised.value)


def test_columns_have_short_and_different_names():
    assert unique_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert unique_names(["x/run", "y/run"]) == ["x/run", "y/run"]
    assert unique_names(["runs/base", "runs/b"]) == ["runs/base", "runs/b"]
    assert [column.name for column in strength_columns("a", [0.0, 0.5, 1.0])] == ["a@0.5", "a"]
    with pytest.raises(ConfigError, match="same folder is named twice"):
        unique_names(["x/run", "x/run/"])


def test_settings_of_columns_are_checked():
    model = tiny_policy()
    for wrong in ({"strength": float("nan")}, {"max_kl": -1.0}, {"alpha_0": float("inf")}):
        with pytest.raises(ConfigError, match="must be a finite number"):
            Column("wrong", **wrong)
    with pytest.raises(ConfigError, match=r"names \['x'\]; the adapters are \['default'\]"):
        measure_texts(model, TEXTS, [Column("policy", adapter_weights={"x": 1.0})])


def test_a_column_measures_an_adapter_that_the_models_own_weights_leave_out():
    first, second = "first", "second"
    model = QAdapterForCausalLM(tiny_base(), {first: APART, second: LOGITS_FORM}, {first: lora(), second: lora()})
    column = Column("second", adapter_weights={second: 1.0})
    expected = column.direction(model)
    with model.dial(adapter_weights={first: 1.0}), Column("first", adapter_weights={first: 1.0}).applied(model):
        assert column.direction(model) == expected
    model.adapter_weights = {first: 1.0}
    assert column.direction(model) == expected


def test_a_column_applied_to_a_model_is_taken_back():
    model = tiny_policy()
    before = (model.strength, dict(model.adapter_weights), model.max_kl)
    with Column("half", 0.5, {"default": 0.3}, 0.1).applied(model):
        assert (model.strength, model.adapter_weights, model.max_kl) == (0.5, {"default": 0.3}, 0.1)
    assert (model.strength, dict(model.adapter_weights), model.max_kl) == before
