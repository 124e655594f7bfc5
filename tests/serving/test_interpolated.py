"""A server that interpolates weights: one lane a row, whatever its strength, and every answer the policy's."""

from functools import cache

import openai
import pytest
import torch
from models import lora, tiny_base, token_ids, train_randomly
from served import CONTEXT, MODELS, RunningServer, chat, dial, greedy_text, prompt_ids_of

from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.serving.catalogue import Catalogue
from qadapter.serving.decoder import Decoder, joined
from qadapter.serving.schema import QAdapterOptions

# Request (model, dial) and the same policy as arguments of the model's forward.
POLICIES = [
    ("base", {}, {"strength": 0.0}),
    ("formal", {}, {"adapter_weights": {"first": 1.0}}),
    ("formal", {"strength": 0.4}, {"strength": 0.4, "adapter_weights": {"first": 1.0}}),
    ("concise", {"strength": -0.7}, {"strength": -0.7, "adapter_weights": {"second": 1.0}}),
    ("both", {"strength": 1.5}, {"strength": 1.5, "adapter_weights": {"first": 0.5, "second": 0.5}}),
    (
        "formal",
        {"weights": {"formal": 0.3, "concise": 0.9}, "strength": 0.8},
        {"strength": 0.8, "adapter_weights": {"first": 0.3, "second": 0.9}},
    ),
    ("concise", {"strength": 0.0}, {"strength": 0.0}),
    ("formal", {"strength": 2.0, "max_kl": 0.1}, {"strength": 2.0, "adapter_weights": {"first": 1.0}, "max_kl": 0.1}),
]
LANES = [1, 1, 1, 1, 1, 1, 1, 2]


@cache
def policy(architecture="llama", **kinds):
    """Two random adapters that can be scaled, on a model of float64; nobody changes it."""
    targets = {"target_modules": ["c_attn", "c_fc", "c_proj"]} if architecture == "gpt2" else {}
    adapters = {"first": lora(**targets, **kinds), "second": lora(r=2, **targets, **kinds)}
    base = tiny_base(architecture, torch.float64, max_position_embeddings=CONTEXT)
    model = QAdapterForCausalLM(base, dict.fromkeys(adapters, QAdapterConfig()), adapters).double()
    train_randomly(model.eval()).interpolation = "weights"
    return model


def dials_of(model):
    catalogue = Catalogue(MODELS, model.trained_coefficients(), model.interpolation)
    return [catalogue.dial(name, QAdapterOptions(**options)) for name, options, _ in POLICIES]


def assert_rows_are_defined(model, logits, rows, policies=POLICIES):
    for actual, ids, (_, _, arguments) in zip(logits, rows, policies, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids]), use_cache=False, **arguments).logits[0, -1]
        # transformers takes some constants (rotary frequencies, attention scales) in float32.
        torch.testing.assert_close(actual.log_softmax(-1), expected.log_softmax(-1).to(actual), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("gpt2", {}),
        ("gemma3", {}),
        ("llama", {"target_modules": ("q_proj",), "layers_to_transform": (1,)}),
    ],
)
def test_a_mixed_batch_equals_single_rows_while_rows_join_and_leave(architecture, kinds):
    model = policy(architecture, **kinds)
    decoder, dials = Decoder(model), dials_of(model)
    rows = token_ids(*range(3, 11))
    early, late = decoder.empty(dials[:3]), decoder.empty(dials[3:])
    assert_rows_are_defined(model, decoder.feed(early, rows[:3]), rows[:3], POLICIES[:3])
    assert_rows_are_defined(model, decoder.feed(late, rows[3:]), rows[3:], POLICIES[3:])
    batch = joined([(early, range(3)), (late, range(5))])
    rows = [[*row, 4 + number] for number, row in enumerate(rows)]
    assert_rows_are_defined(model, decoder.feed(batch, [row[-1:] for row in rows]), rows)
    kept = [5, 7, 0, 2]
    batch, rows = joined([(batch, kept)]), [[*rows[row], 9] for row in kept]
    logits = decoder.feed(batch, [[9]] * 4)
    assert_rows_are_defined(model, logits, rows, [POLICIES[row] for row in kept])


def test_a_row_has_one_lane_and_a_capped_one_the_bases_too():
    batch = Decoder(policy()).empty(dials_of(policy()))
    assert [sum(row == own for own, _ in batch.lanes) for row in range(len(POLICIES))] == LANES


def test_a_lora_on_the_head_is_scaled_a_row():
    model = policy(target_modules=("q_proj", "lm_head"))
    rows = token_ids(*range(3, 11))
    assert not model.head.shared
    assert_rows_are_defined(model, Decoder(model).feed(Decoder(model).empty(dials_of(model)), rows), rows)


@pytest.fixture(scope="module")
def server():
    running = RunningServer(policy())
    yield running
    running.stop()


@pytest.mark.parametrize(("name", "options", "arguments"), POLICIES)
def test_an_answer_is_the_policys(server, name, options, arguments):
    with server.client() as client:
        answer = chat(client, "tell me", name, temperature=0, max_tokens=20, extra_body=dial(**options))
    expected = greedy_text(policy(), prompt_ids_of("tell me"), 20, **arguments)
    assert answer.choices[0].message.content == expected


@pytest.mark.parametrize("asked", [{"decay": 0.9}, {"min_kl": 0.1}, {"off_inside": True}])
def test_what_the_cache_would_not_allow_is_refused(server, asked):
    (name,) = asked
    with server.client() as client, pytest.raises(openai.BadRequestError, match=f"{name} needs a server that interpol"):
        chat(client, "tell me", extra_body=dial(**asked))
