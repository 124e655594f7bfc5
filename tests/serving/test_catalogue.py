"""What names and dials mean as weights of streams."""

import pytest

from qadapter.errors import ConfigError
from qadapter.functional import mix_coefficients
from qadapter.serving.api_errors import ApiError
from qadapter.serving.catalogue import Catalogue
from qadapter.serving.schema import QAdapterOptions

TRAINED = {"first": mix_coefficients("residual", 0.5, 1.1), "second": mix_coefficients("residual", 0.1, 0.1)}
CATALOGUE = Catalogue(
    {"formal": {"first": 1.0}, "concise": {"second": 1.0}, "mix": {"first": 0.5, "second": 2.0}}, TRAINED
)


def coefficients(name, **options):
    return dict(CATALOGUE.dial(name, QAdapterOptions(**options)).coefficients)


def test_a_policy_equal_to_its_adapter_needs_one_stream():
    assert coefficients("concise") == {"second": 1.0}


def test_a_policy_mixes_its_adapter_and_the_base():
    assert coefficients("formal") == pytest.approx({"first": 1.0, None: 1.2})


def test_strength_goes_from_the_base_through_the_policy_and_beyond():
    for strength in (0.3, 1.7, -0.4):
        expected = {"first": strength, None: (1 - strength) + strength * 1.2}
        assert coefficients("formal", strength=strength) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("base", {}),
        ("base", {"strength": 0.0}),
        ("base", {"decay": 1.0}),
        ("base", {"off_inside": False}),
        ("formal", {"strength": 0.0, "off_inside": True}),
        ("base", {"min_kl": 0.0}),
        ("formal", {"strength": 0.0, "min_kl": 0.1}),
        ("formal", {"strength": 0.0}),
        ("mix", {"weights": {}}),
    ],
)
def test_no_weight_is_the_base_alone(name, options):
    assert coefficients(name, **options) == {None: 1.0}


def test_weights_replace_the_models_own():
    weights = {"concise": 0.5, "mix": 0.2}
    expected = {"first": 0.1, "second": 0.9, None: 1 + 0.1 * 0.2 - 0.9}
    assert coefficients("formal", weights=weights) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "strength"), [("formal@0.5", 0.5), ("mix@-2", -2.0), ("concise@0", 0.0)])
def test_a_strength_may_follow_the_name(name, strength):
    served = name.partition("@")[0]
    assert CATALOGUE.named(name) == (served, strength)
    assert coefficients(name) == coefficients(served, strength=strength)
    assert coefficients(name, weights={"concise": 0.5}) == coefficients(
        served, weights={"concise": 0.5}, strength=strength
    )


@pytest.mark.parametrize(
    "name", ["formal@", "formal@x", "formal@nan", "formal@1e3", "@0.5", "base@0.5", "formal@ 1", "formal@0.5@2"]
)
def test_what_is_no_name_with_a_strength_is_no_model(name):
    with pytest.raises(ApiError, match="does not exist here.*with a strength: formal@0.5") as raised:
        CATALOGUE.dial(name, QAdapterOptions())
    assert raised.value.status == 404


def test_one_strength_is_given():
    with pytest.raises(ApiError, match="both give a strength"):
        CATALOGUE.dial("formal@0.5", QAdapterOptions(strength=0.5))
    with pytest.raises(ApiError, match="exceeds 100"):
        CATALOGUE.dial("formal@101", QAdapterOptions())


def test_a_cap_brings_the_base_along():
    dial = CATALOGUE.dial("concise", QAdapterOptions(max_kl=0.1))
    assert dict(dial.coefficients) == {"second": 1.0, None: 0.0}
    assert dial.max_kl == 0.1


def test_a_threshold_takes_the_policy_at_strength_1_and_the_base():
    dial = CATALOGUE.dial("formal", QAdapterOptions(strength=0.3, min_kl=0.1, decay=0.9))
    assert dict(dial.coefficients) == coefficients("formal", max_kl=1.0)
    assert (dial.min_kl, dial.strength, dial.decay) == (0.1, 0.3, 0.9)
    assert dial.at("first", 5) == dial.coefficients["first"]  # the strength comes on top
    assert dict(CATALOGUE.dial("concise", QAdapterOptions(min_kl=0.0)).coefficients) == {"second": 1.0}


NOT_THE_BASES = (
    {"max_kl": 0.1}, {"max_kl": 0.0}, {"min_kl": 0.1}, {"decay": 0.9}, {"off_inside": True},
    {"strength": 0.0, "max_kl": 1},
)  # fmt: skip


@pytest.mark.parametrize("options", NOT_THE_BASES)
def test_the_base_has_no_dial(options):
    field = next(name for name in options if name != "strength")
    with pytest.raises(ApiError, match=f"{field} = .* does nothing for model 'base'") as refusal:
        coefficients("base", **options)
    assert (refusal.value.status, refusal.value.to_dict()["error"]["param"]) == (400, f"qadapter.{field}")


def test_weights_that_multiply_beyond_all_measure_are_refused():
    with pytest.raises(ApiError, match="strength times weight"):
        coefficients("formal", strength=50.0, weights={"formal": 50.0})


def test_an_adapter_cannot_be_called_base():
    with pytest.raises(ConfigError, match="rename its folder"):
        Catalogue({"base": {"first": 1.0}}, TRAINED)


def test_no_adapter_has_the_name_of_anothers_strength():
    with pytest.raises(ConfigError, match="'formal@0.5', by which 'formal' is asked for at a strength"):
        Catalogue({"formal": {"first": 1.0}, "formal@0.5": {"second": 1.0}}, TRAINED)
    assert Catalogue({"other@0.5": {"second": 1.0}}, TRAINED).named("other@0.5@2") == ("other@0.5", 2.0)
