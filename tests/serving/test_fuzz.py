"""Random bodies, the same in every run: always an answer or a clear refusal, and the server lives on."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import error_of, plain_http

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


numbers = st.integers(-3, 9) | st.floats() | st.booleans() | st.none()
anything = st.recursive(
    numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
)
small = st.integers(0, 3) | anything
bodies = st.fixed_dictionaries(
    {"max_tokens": st.integers(0, 5) | st.floats()},
    optional={
        "model": st.sampled_from(["base", "formal", "concise@0.5", "formal@"]) | anything,
        "prompt": st.text(max_size=30) | st.lists(st.integers(0, 96), max_size=9) | anything,
        "messages": st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "x"]), "content": anything})),
        "qadapter": st.fixed_dictionaries({}, optional={"strength": numbers, "max_kl": numbers, "weights": anything}),
        "stream": st.booleans() | anything,
        "echo": st.booleans() | anything,
        "stop": st.text("ab", max_size=2) | anything,
        **dict.fromkeys(("n", "temperature", "top_p", "seed", "logprobs", "top_logprobs", "best_of"), small),
        **dict.fromkeys(("tools", "presence_penalty", "stream_options", "user"), anything),
    },
)


@settings(max_examples=150)
@given(body=bodies, path=st.sampled_from([COMPLETIONS, CHAT]))
def test_any_body_gets_an_answer_or_a_clear_refusal(server, connection, body, path):
    body = {"model": "formal", "prompt" if path == COMPLETIONS else "messages": "a", **body}
    response = connection.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    if response.status_code == 200:
        is_stream = response.headers["content-type"].startswith("text/event-stream")
        assert response.text.endswith("data: [DONE]\n\n") if is_stream else response.json()["choices"]
    else:
        assert response.status_code in (400, 404)
        error_of(response, response.status_code)


@settings(max_examples=80)
@given(raw=st.binary(max_size=60) | st.text('{}[]":,0123456789eE-+. \\untrfalsNI', max_size=40).map(str.encode))
def test_any_bytes_are_refused_and_the_server_answers_afterwards(server, connection, raw):
    response = connection.post(CHAT, content=raw, headers={"Content-Type": "application/json"})
    error_of(response, 400)
    assert connection.get("/health").json() == {"status": "ok"}


@pytest.fixture(scope="module")
def connection(server):
    with plain_http(server.url) as connection:
        yield connection
