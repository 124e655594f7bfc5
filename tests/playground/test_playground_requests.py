"""The playground's HTTP side."""

import json
import socket

import models
import pytest
import torch
from playground_client import ask

from qadapter import OffInside

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

from qadapter.generation import encode  # noqa: E402
from qadapter.playground.app import added_texts, create_app  # noqa: E402  of the extra


def test_an_answer_is_streamed_and_then_explained(address):
    *pieces, last = ask(address, strength=1.0)
    assert all(set(piece) == {"text"} for piece in pieces)
    views = last["tokens"]
    assert len(views) == 9
    assert all(view["kl"] >= 0 for view in views)
    assert any(view["kl"] > 1e-3 for view in views)
    assert len(views[0]["top"]) == len(views[0]["base_top"]) == 5
    assert views[0]["top"][0][1] >= views[0]["top"][1][1]


def test_strength_zero_is_the_base_and_moves_no_token(address):
    views = ask(address, strength=0.0)[-1]["tokens"]
    assert all(view["kl"] == pytest.approx(0, abs=1e-6) for view in views)
    assert all(view["logp"] == pytest.approx(view["base_logp"]) for view in views)


def test_the_views_equal_the_policy_own_distributions(address, policy):
    tokenizer = models.tiny_tokenizer()
    views = ask(address, strength=0.6)[-1]["tokens"]
    ids = encode(tokenizer, ["hello"])["input_ids"]
    for view in views:
        with torch.no_grad():
            logps = policy(ids, strength=0.6).logits[0, -1].log_softmax(-1)
        token = int(logps.argmax())
        assert view["text"] == tokenizer.decode([token])
        assert view["logp"] == pytest.approx(float(logps[token]), abs=1e-4)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_a_cap_bounds_the_kl_of_every_token_and_lowers_the_strength(address):
    views = ask(address, strength=1.5, max_kl=0.02)[-1]["tokens"]
    assert max(view["kl"] for view in views) <= 0.02 + 1e-5
    assert min(view["strength"] for view in views) < 1.5


def test_a_threshold_lowers_the_strength_and_leaves_tokens_to_the_base(address):
    views = ask(address, strength=1.5, min_kl=0.4)[-1]["tokens"]
    for view, whole in zip(views[:1], ask(address, strength=1.5)[-1]["tokens"][:1], strict=True):
        assert 0 <= view["strength"] < whole["strength"] == 1.5
        assert view["kl"] < whole["kl"]
    views = ask(address, strength=1.5, min_kl=1e3)[-1]["tokens"]
    assert max(view["kl"] for view in views) < 1e-6
    assert max(view["strength"] for view in views) == 0.0


@pytest.mark.parametrize("max_kl", [None, 0.02])
def test_a_decaying_strength_is_shown_at_every_token(address, policy, max_kl):
    tokenizer = models.tiny_tokenizer()
    views = ask(address, strength=1.5, decay=0.7, max_kl=max_kl)[-1]["tokens"]
    ids = encode(tokenizer, ["hello"])["input_ids"]
    for step, view in enumerate(views):
        assert view["strength"] <= 1.5 * 0.7**step + 1e-6
        if max_kl is None:
            assert view["strength"] == pytest.approx(1.5 * 0.7**step)
        with torch.no_grad():
            logps = policy(ids, strength=torch.tensor([1.5 * 0.7**step]), max_kl=max_kl).logits[0, -1].log_softmax(-1)
        token = int(logps.argmax())
        assert view["text"] == tokenizer.decode([token])
        assert view["logp"] == pytest.approx(float(logps[token]), abs=1e-4)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_tokens_that_are_part_of_a_character_join_to_it():
    tokenizer = models.byte_tokenizer()
    ids = tokenizer("é 😀!", add_special_tokens=False)["input_ids"]
    texts = added_texts(tokenizer, [*ids, tokenizer.eos_token_id, ids[-2], *ids[:1]])
    assert texts == ["", "é", " ", "", "", "", "😀", "!", "</s>", "", ""]


def test_a_token_that_begins_a_character_which_never_comes_keeps_its_whole_ones():
    tokenizer = models.byte_tokenizer(("n", "\u00c3"))  # "n" with the first byte of é
    ids = tokenizer("so né", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(added_texts(tokenizer, [*ids, tokenizer.eos_token_id])) == "so n</s>"


def test_tokens_keep_the_spaces_between_them():
    """SentencePiece's decoders take the space off a token that stands alone."""
    from tokenizers import decoders, pre_tokenizers

    tokenizer = models.tiny_tokenizer(characters=["\u2581the", "\u2581sky", "."])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    assert added_texts(tokenizer, [2, 3, 4]) == ["the", " sky", "."]


def test_an_answer_off_inside_is_the_bases_there(address, monkeypatch):
    monkeypatch.setattr(OffInside, "off", lambda self, text: len(text) < 4)
    views = ask(address, off_inside=True)[-1]["tokens"]
    written = [sum(len(view["text"]) for view in views[:place]) for place in range(len(views))]
    assert [view["strength"] for view in views] == [float(length >= 4) for length in written]
    assert all(view["kl"] < 1e-6 for view, length in zip(views, written, strict=True) if length < 4)


def test_weights_select_the_adapters(address):
    none = ask(address, weights={"concise": 0.0, "polite": 0.0})[-1]["tokens"]
    assert all(view["kl"] == pytest.approx(0, abs=1e-6) for view in none)
    assert any(view["kl"] > 1e-3 for view in ask(address, weights={"polite": 1.0})[-1]["tokens"])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": ""}, 422),
        ({"strength": 99}, 422),
        ({"max_kl": -1}, 422),
        ({"decay": 0}, 422),
        ({"surprise": 1}, 422),
        ({"weights": {"loud": 1.0}}, 400),
        ({"prompt": "x" * 300}, 400),
    ],
)
def test_bad_requests_are_refused_and_the_page_lives_on(address, body, status):
    response = httpx.post(f"{address}/api/answer", json={"prompt": "hello", "max_new_tokens": 4, **body}, timeout=30)
    assert response.status_code == status
    assert ask(address)[-1]["tokens"]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ('{"prompt": "a", "strength": NaN}', "strength: Input should be a finite number"),
        ('{"prompt": "a", "strength": 1e999}', "strength: Input should be a finite number"),
        ('{"prompt": "a", "weights": {"concise": -Infinity}}', "concise: Input should be a finite number"),
        ('{"prompt": "a", "weights": {"concise": 1e30}}', "concise: Input should be less than or equal to 10"),
        ('{"prompt": "\\ud800"}', "prompt: Input should be a valid string"),
        ("{", "JSON decode error"),
        ("[]", "body: Input should be a valid dictionary"),
    ],
)
def test_bodies_that_json_or_text_cannot_repeat_are_refused_in_words(address, raw, said):
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{address}/api/answer", content=raw, headers=headers, timeout=30)
    assert response.status_code == 422
    assert said in response.json()["error"]


def test_a_prompt_that_the_template_refuses_is_refused_in_words(policy):
    from fastapi.testclient import TestClient

    tokenizer = models.tiny_tokenizer("{{ raise_exception('no questions') }}")
    client = TestClient(create_app(policy, tokenizer, "concise"), base_url="http://localhost")
    answer = client.post("/api/answer", json={"prompt": "hello"})
    assert (answer.status_code, answer.json()["error"].endswith("no questions")) == (400, True)


def test_a_burst_of_requests_is_answered_in_turn(address):
    body = json.dumps({"prompt": "hello", "max_new_tokens": 1}).encode()
    head = "POST /api/answer HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    readers = [socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), timeout=90) for _ in range(50)]
    for reader in readers:  # more than there are threads
        reader.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    for reader in readers:
        with reader, reader.makefile("rb") as response:
            assert b'"tokens"' in response.read()


def test_a_foreign_host_name_is_refused(address):
    assert httpx.get(f"{address}/", headers={"Host": "evil.example"}).status_code == 400


def test_the_page_needs_nothing_from_outside(address):
    for name in ("", "page.js", "page.css"):
        text = httpx.get(f"{address}/{name}").text
        assert "http://" not in text
        assert "https://" not in text
    assert httpx.get(f"{address}/../secret").status_code == 404


@pytest.mark.parametrize("max_kl", [None, 0.05])
def test_tokens_of_interpolated_weights_are_those_of_the_policy(plain_address, plain_policy, max_kl):
    dial = {"strength": 1.5, "interpolation": "weights", "max_kl": max_kl}
    views = ask(plain_address, **dial, weights={"concise": 0.8, "polite": 0.4})[-1]["tokens"]
    tokenizer, weights = models.tiny_tokenizer(), {"concise": 0.8, "polite": 0.4}
    ids = encode(tokenizer, ["hello"])["input_ids"]
    for view in views:
        with torch.no_grad():
            logps = plain_policy(ids, adapter_weights=weights, **dial).logits[0, -1].log_softmax(-1)
        token = int(logps.argmax())
        assert view["text"] == tokenizer.decode([token])
        assert view["logp"] == pytest.approx(float(logps[token]), abs=1e-4)
        assert view["strength"] == pytest.approx(1.5) if max_kl is None else view["strength"] < 1.5
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize("server", ["address", "plain_address"])
def test_an_interpolation_that_cannot_be_is_refused(request, server):
    body = {"prompt": "hello", "interpolation": "weights", "decay": 0.9}
    response = httpx.post(f"{request.getfixturevalue(server)}/api/answer", json=body)
    assert response.status_code == 400
    told = {"address": "not of the residual form", "plain_address": "a decay cannot be used"}
    assert told[server] in response.json()["error"]
    body = {"prompt": "hello", "interpolation": "weights", "min_kl": 0.1}
    response = httpx.post(f"{request.getfixturevalue(server)}/api/answer", json=body)
    assert response.status_code == 400
    assert told[server].replace("a decay", "min_kl") in response.json()["error"]
