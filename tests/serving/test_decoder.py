"""The model's side: rows of different policies in one batch equal each of them alone."""

import pytest
import torch
from models import ARCHITECTURES, tiny_base, token_ids
from served import two_adapters

from qadapter.errors import ConfigError
from qadapter.serving.catalogue import Catalogue
from qadapter.serving.decoder import Decoder, joined
from qadapter.serving.schema import QAdapterOptions

MODELS = {"formal": {"first": 1.0}, "concise": {"second": 1.0}}
# Policies that need every combination of streams: base only, adapter only, both, all, and a cap that needs the base.
DIALS = [
    ("base", {}),
    ("concise", {}),
    ("formal", {}),
    ("formal", {"strength": 0.7}),
    ("concise", {"strength": 1.4}),
    ("formal", {"strength": -0.5}),
    ("formal", {"weights": {"formal": 0.6, "concise": 0.9}}),
    ("concise", {"max_kl": 0.05}),
    ("formal", {"strength": 2.0, "max_kl": 0.2}),
    ("formal", {"strength": 0.0}),
    ("concise", {"strength": 1.5, "decay": 0.7}),
    ("formal", {"max_kl": 0.05, "decay": 0.5}),
    ("concise", {"strength": 1.4, "min_kl": 0.2}),
    ("formal", {"weights": {"formal": 0.6, "concise": 0.9}, "min_kl": 0.1, "decay": 0.7}),
    ("formal", {"strength": -0.5, "min_kl": 0.1, "max_kl": 0.2}),
    ("concise", {"strength": 0.0, "min_kl": 0.1}),
]
# Rows of float64 models; transformers takes some constants (rotary frequencies, attention scales) in float32.
EXACT = {"rtol": 1e-5, "atol": 1e-5}
# Logits here are of size 10, and the matmuls of different batches add in different orders.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-3}


def dials_of(model):
    catalogue = Catalogue(MODELS, model.trained_coefficients())
    return [catalogue.dial(name, QAdapterOptions(**options)) for name, options in DIALS]


def defined_logits(model, ids, name, options, step):
    """The slow twin: the model's own forward on the whole row, alone and without a cache, `step` tokens on."""
    weights = {"base": {}, "formal": {"first": 1.0}, "concise": {"second": 1.0}}[name]
    if "weights" in options:
        weights = {"first": options["weights"]["formal"], "second": options["weights"]["concise"]}
    strength = options.get("strength", 1.0) * options.get("decay", 1.0) ** step
    with torch.no_grad():
        output = model(
            torch.tensor([ids]),
            strength=torch.tensor([strength], dtype=torch.float64),
            adapter_weights=weights,
            max_kl=options.get("max_kl"),
            min_kl=options.get("min_kl"),
            use_cache=False,
        )
    return output.logits[0, -1]


def assert_rows_are_defined(model, logits, rows, dials=DIALS, step=0):
    tolerance = EXACT if model.dtype == torch.float64 else FLOAT32
    for actual, ids, (name, options) in zip(logits, rows, dials, strict=True):
        expected = defined_logits(model, ids, name, options, step)
        torch.testing.assert_close(actual.log_softmax(-1), expected.log_softmax(-1).to(actual), **tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixed_batch_equals_single_rows_while_rows_join_and_leave(architecture):
    # transformers' eager attention gives NaN for padding in float64: its mask overflows in a float32 softmax.
    eager = ARCHITECTURES[architecture].get("attn_implementation") == "eager"
    # PEFT resolves "all-linear" to nothing for a second adapter on GPT-2.
    peft = {"target_modules": ["c_attn", "c_fc", "c_proj"]} if architecture == "gpt2" else {}
    model = two_adapters(tiny_base(architecture, torch.float32 if eager else torch.float64), **peft)
    decoder, dials = Decoder(model), dials_of(model)
    rows = token_ids(*range(3, 19))

    early = decoder.empty(dials[:4])
    assert_rows_are_defined(model, decoder.feed(early, rows[:4]), rows[:4], DIALS[:4])
    late = decoder.empty(dials[4:])
    assert_rows_are_defined(model, decoder.feed(late, rows[4:]), rows[4:], DIALS[4:])

    batch = joined([(early, range(4)), (late, range(12))])
    for step in range(1, 4):
        rows = [[*row, 4 + step + number] for number, row in enumerate(rows)]
        assert_rows_are_defined(model, decoder.feed(batch, [row[-1:] for row in rows]), rows, step=step)

    kept = [7, 0, 13, 10, 6]
    batch, rows = joined([(batch, kept)]), [rows[row] for row in kept]
    assert batch.width == max(map(len, rows))
    rows = [[*row, 9] for row in rows]
    logits = decoder.feed(batch, [[9]] * 5)
    assert_rows_are_defined(model, logits, rows, [DIALS[row] for row in kept], step=4)


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_prompts_fed_in_chunks_equal_prompts_fed_at_once(chunk):
    model = two_adapters(tiny_base(dtype=torch.float64))
    decoder, dials = Decoder(model), dials_of(model)
    rows = token_ids(11, 2, 7, 11, 1, 3, 4, 5, 6, 9, 8, 10, 3, 5, 7, 2)
    whole = decoder.feed(decoder.empty(dials), rows)
    batch = decoder.empty(dials)
    for start in range(0, 11, chunk):
        parts = [([None] * (11 - len(row)) + row)[start : start + chunk] for row in rows]
        ids = [[token for token in part if token is not None] for part in parts]
        logits = decoder.feed(batch, ids, read=start + chunk >= 11)
    torch.testing.assert_close(logits, whole, **EXACT)


def test_a_row_taken_twice_becomes_two_independent_rows():
    model = two_adapters(tiny_base(dtype=torch.float64))
    decoder, dials = Decoder(model), dials_of(model)[2:4]
    rows = token_ids(4, 6)
    batch = decoder.empty(dials)
    decoder.feed(batch, rows)
    batch = joined([(batch, [1, 0, 1])])
    logits = decoder.feed(batch, [[7], [8], [9]])
    continued = [[*rows[1], 7], [*rows[0], 8], [*rows[1], 9]]
    assert_rows_are_defined(model, logits, continued, [DIALS[3], DIALS[2], DIALS[3]])


def test_a_lora_on_the_head_is_mixed_by_logits():
    peft = {"target_modules": ["q_proj", "lm_head"]}
    model = two_adapters(tiny_base(dtype=torch.float64), **peft)
    rows = token_ids(*range(3, 19))
    decoder = Decoder(model)
    assert not model.head.shared
    assert_rows_are_defined(model, decoder.feed(decoder.empty(dials_of(model)), rows), rows)


def test_a_row_brings_only_the_lanes_it_needs():
    model = two_adapters()
    batch = Decoder(model).empty(dials_of(model))
    lanes = [sum(row == own for own, _ in batch.lanes) for row in range(len(DIALS))]
    assert lanes == [1, 1, 2, 2, 2, 2, 3, 2, 2, 1, 2, 2, 2, 3, 2, 1]


def test_base_rows_equal_the_bare_base_model_bit_for_bit_in_bfloat16():
    model = two_adapters(tiny_base(dtype=torch.bfloat16))
    decoder = Decoder(model)
    ids = token_ids(5)
    logits = decoder.feed(decoder.empty(dials_of(model)[:1]), ids)
    with torch.no_grad(), model.plan.running(None):
        # The head's product of one column, as the decoder's: of several, some processors round otherwise.
        expected = model.base(torch.tensor(ids), logits_to_keep=1).logits[:, -1]
    assert torch.equal(logits, expected.float())


def test_the_cache_grows_beyond_its_spare_columns():
    model = two_adapters(tiny_base(dtype=torch.float64, max_position_embeddings=512))
    decoder, dials = Decoder(model), dials_of(model)[2:4]
    rows = token_ids(3, 5)
    batch = decoder.empty(dials)
    decoder.feed(batch, rows)
    for step in range(300):
        token = 2 + step % 90
        rows = [[*row, token] for row in rows]
        logits = decoder.feed(batch, [[token]] * 2)
    assert_rows_are_defined(model, logits, rows, DIALS[2:4])


def test_a_base_that_keeps_another_memory_is_refused():
    model = two_adapters(tiny_base())
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="linear_attention"):
        Decoder(model)
    model.config.layer_types, model.config.num_kv_shared_layers = None, 1
    with pytest.raises(ConfigError, match="with keys and values of their own"):
        Decoder(model)
