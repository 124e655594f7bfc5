"""Whatever is wrong with a request is said in OpenAI's shape, and the server lives on."""

import gzip
import json
import time

import httpx
import openai
import pytest
import torch
from models import tiny_base, tiny_tokenizer
from pydantic import ValidationError
from served import CONTEXT, RunningServer, chat, dial, endless_base, error_of, two_adapters

from qadapter.serving.api_errors import ApiError
from qadapter.serving.schema import ChatRequest, CompletionRequest, parse

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
VALID = {"model": "formal", "prompt": "a", "max_tokens": 2}
VALID_CHAT = {"model": "formal", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


def with_raw(name, raw):
    """The valid body with one field as raw JSON."""
    return (json.dumps(VALID)[:-1] + f', "{name}": {raw}}}').encode()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (b'{"model": "\\ud800"}', "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"seed": ' + b"9" * 6000 + b"}", "not valid JSON"),
        (with_raw("qadapter", '{"strength": NaN}'), "NaN is no JSON number"),
        (with_raw("qadapter", '{"strength": -Infinity}'), "-Infinity is no JSON number"),
        (with_raw("temperature", "NaN"), "NaN is no JSON number"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(server, raw, said):
    error = error_of(server.post(COMPLETIONS, raw), 400)
    assert said in error["message"]
    assert error["code"] == "invalid_json"


FIELDS = {
    "decay": ["0", "1.1", "-0.5", "true", '"0.9"'],
    "off_inside": ["1", '"true"', "[]"],
    "strength": ["1e999", "-1e999", '"1"', "true", "101", "[1]"],
    "min_kl": ["-0.1", "1e999", "true"],
    "max_kl": ["-0.1", "1e999", '"a"'],
    "weights": ["{}1", '{"formal": 1e999}', '{"formal": 1000}', "[]", '{"formal": null}'],
    "unknown": ["1"],
}


@pytest.mark.parametrize(("name", "raw"), [(name, raw) for name, raws in FIELDS.items() for raw in raws])
def test_a_dial_that_is_no_finite_number_is_refused(server, name, raw):
    error = error_of(server.post(COMPLETIONS, with_raw("qadapter", f'{{"{name}": {raw}}}')), 400)
    assert error["code"] in ("invalid_value", "unknown_parameter", "invalid_json")
    assert name in error["message"] or error["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "4"}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop.0"),
        ({"stop": [1]}, "stop.0"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logprobs": 6}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [97]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [[1.0]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [4, "a"]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"echo": "yes"}, "echo"),
        ({"suffix": "b"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": 2, "n": 1}, "best_of"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"top_k": 5}, "top_k"),
        ({"model": "x" * 201}, "model"),
    ],
)
def test_a_completion_parameter_out_of_range_is_named(server, changes, param):
    error = error_of(server.post(COMPLETIONS, json.dumps({**VALID, **changes})), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_prompts_are_counted_before_they_are_encoded(server):
    error = error_of(server.post(COMPLETIONS, json.dumps({**VALID, "prompt": [[97]] * 65})), 400)
    assert "at most 64 at once" in error["message"]


MANY = {f"key{number}": 1 for number in range(90_000)}


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        (COMPLETIONS, MANY, "the body"),
        (COMPLETIONS, {"qadapter": MANY}, "qadapter"),
        (COMPLETIONS, {"qadapter": {"weights": MANY}}, "qadapter.weights"),
        (COMPLETIONS, {"prompt": [[1]] * 170_000}, "prompt"),
        (COMPLETIONS, {"stop": [1] * 500_000}, "stop.0"),
        (CHAT, {"chat_template_kwargs": MANY}, "chat_template_kwargs"),
        (CHAT, {"messages": [{"role": "user", "content": "a"} | MANY]}, "messages.0"),
        (CHAT, {"messages": [{"role": "user", "content": [MANY]}]}, "messages.0.content"),
    ],
)
def test_a_body_full_of_what_nobody_asks_for_is_refused_at_once(path, changes, param):
    """While it is checked nobody else is answered."""
    kind, valid = (CompletionRequest, VALID) if path == COMPLETIONS else (ChatRequest, VALID_CHAT)
    start = time.process_time()
    with pytest.raises(ApiError) as caught:
        parse(kind, {**valid, **changes})
    assert time.process_time() - start < 0.5  # seconds, before
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (CompletionRequest, {"prompt": ["a"] + [1] * 1000}),
        (CompletionRequest, {"prompt": [[""] * 1000]}),
        (ChatRequest, {"messages": [{}] * 1000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 1000}]}),
    ],
)
def test_a_list_is_checked_up_to_its_first_mistake(kind, changes):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "formal", **changes})
    assert caught.value.error_count() <= 3


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "assistant", "content": None, "refusal": "no"}]}, "messages.0.refusal"),
        ({"messages": [{"role": "assistant", "content": [{"type": "refusal"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.0"),
        ({"messages": [5]}, "messages.0"),
        ({"reasoning_effort": 1}, "reasoning_effort"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"messages": [VALID_CHAT["messages"][0] | {"reasoning_content": "b"}]}, "messages.0.reasoning_content"),
        ({"messages": [VALID_CHAT["messages"][0] | {"refusal": "b"}]}, "messages.0.refusal"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"n": True}, "n"),
    ],
)
def test_a_chat_parameter_that_is_wrong_or_unsupported_is_named(server, changes, param):
    assert error_of(server.post(CHAT, json.dumps({**VALID_CHAT, **changes})), 400)["param"] == param


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "reads text only: leave the message out"),
        ({"role": "assistant", "content": None, "refusal": "no"}, "reads text only: leave the message out"),
        ({"role": "tool", "tool_call_id": "1", "content": "4"}, "tools are not supported"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "parts of type 'image_url' are not"),
    ],
)
def test_what_is_no_text_is_refused_with_the_way_out(server, message, said):
    """As an agent's history has it: content is null beside a call of a tool."""
    body = {**VALID_CHAT, "messages": [VALID_CHAT["messages"][0], message]}
    error = error_of(server.post(CHAT, json.dumps(body)), 400)
    assert said in error["message"]
    assert error["code"] == "unsupported_parameter"
    assert error["param"].startswith("messages.1.")


def test_a_prompts_wrong_item_is_told_what_a_prompt_may_be(server):
    for prompt in ([[1.0]], [True], [4, "a"], {"text": "a"}, [None]):
        error = error_of(server.post(COMPLETIONS, json.dumps({**VALID, "prompt": prompt})), 400)
        assert "a list of ids (integers)" in error["message"]
        assert error["param"] == "prompt"


@pytest.mark.parametrize("coding", ["gzip", "zstd", "identity, br"])
def test_a_compressed_body_is_refused_with_the_way_out(server, coding):
    raw = gzip.compress(json.dumps(VALID).encode())
    error = error_of(server.post(COMPLETIONS, raw, {"Content-Encoding": coding}), 415)
    assert "send the body uncompressed" in error["message"]
    assert server.post(COMPLETIONS, json.dumps(VALID), {"Content-Encoding": "identity"}).status_code == 200


def test_long_numbers_are_cut_in_messages(server):
    error = error_of(server.post(COMPLETIONS, json.dumps({**VALID, "prompt": [10**4000]})), 400)
    assert len(error["message"]) < 200
    error = error_of(server.post(COMPLETIONS, b'{"seed": ' + b"9" * 6000 + b"}"), 400)
    assert error["message"] == "the body is not valid JSON: it has a number of too many digits."


@pytest.mark.parametrize("name", ["messages", "model"])
def test_a_missing_parameter_is_named(server, name):
    body = {key: value for key, value in VALID_CHAT.items() if key != name}
    error = error_of(server.post(CHAT, json.dumps(body)), 400)
    assert (error["param"], error["code"]) == (name, "missing_required_parameter")


@pytest.mark.parametrize(
    ("model", "options"),
    [("gpt-4", {}), ("formal", {"weights": {"rude": 1.0}}), ("formal", {"weights": {"base": 1.0}})],
)
def test_an_unknown_model_is_404(client, model, options):
    with pytest.raises(openai.NotFoundError, match="formal, concise, both") as caught:
        chat(client, model=model, extra_body=dial(**options))
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("options", [{"strength": 0.5}, {"weights": {"formal": 1.0}}])
def test_the_base_has_no_dial(client, options):
    with pytest.raises(openai.BadRequestError, match="no adapter to give weight to"):
        chat(client, model="base", extra_body=dial(**options))


@pytest.mark.parametrize(("length", "tokens"), [(CONTEXT, None), (CONTEXT + 1, None), (CONTEXT - 10, 11)])
def test_too_long_a_context_is_refused(client, length, tokens):
    with pytest.raises(openai.BadRequestError, match=f"context is {CONTEXT} tokens") as caught:
        client.completions.create(model="formal", prompt="x" * length, max_tokens=tokens or 1)
    assert caught.value.code == "context_length_exceeded"


def test_the_whole_context_can_be_used(client):
    answer = client.completions.create(model="formal", prompt="x" * (CONTEXT - 10), max_tokens=10, temperature=0)
    assert answer.usage.total_tokens <= CONTEXT
    chatted = chat(client, "x" * (CONTEXT - 15), temperature=0)
    assert chatted.usage.total_tokens <= CONTEXT


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/", 404), ("GET", "/v1/nothing", 404), ("GET", "/v1/models/nothing", 404), ("GET", "/docs", 404),
    ("POST", f"{CHAT}/", 404),
    ("GET", CHAT, 405), ("DELETE", "/v1/models/formal", 405), ("POST", "/health", 405),
])  # fmt: skip
def test_wrong_paths_and_methods_are_errors_of_the_same_shape(server, method, path, status):
    error_of(httpx.request(method, server.url + path), status)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_taken(server, kind):
    error_of(server.post(COMPLETIONS, json.dumps(VALID), {"Content-Type": kind}), 415)


REFUSING_TEMPLATE = "{{ raise_exception('roles must alternate') }}"


@pytest.mark.parametrize(
    ("template", "said"), [(REFUSING_TEMPLATE, "roles must alternate."), (None, "use /v1/completions.")]
)
def test_a_conversation_that_no_template_renders_is_400(template, said):
    server = RunningServer(tokenizer=tiny_tokenizer(template))
    try:
        assert said in error_of(server.post(CHAT, json.dumps(VALID_CHAT)), 400)["message"]
    finally:
        server.stop()


class Fragile(torch.nn.Module):
    """The last norm of a base, which fails for batches with a row whose number of new tokens is in `breaks_at`."""

    def __init__(self, base):
        super().__init__()
        self.inner, base.model.norm = base.model.norm, self
        self.breaks_at = ()

    def forward(self, hidden):
        if hidden.shape[1] in self.breaks_at:
            raise RuntimeError("secret detail of the inside")
        return self.inner(hidden)


@pytest.fixture
def fragile_server():
    base = endless_base()
    fragile = Fragile(base)
    server = RunningServer(two_adapters(base))
    yield server, fragile
    server.stop()


def test_a_failing_model_is_500_without_internals_and_the_next_request_is_answered(fragile_server):
    server, fragile = fragile_server
    fragile.breaks_at = (1,)
    error = error_of(server.post(COMPLETIONS, json.dumps(VALID)), 500)
    assert "secret" not in json.dumps(error)
    streamed = server.post(COMPLETIONS, json.dumps({**VALID, "stream": True}))
    assert json.loads(streamed.text.removeprefix("data: "))["error"] == error
    server.post(COMPLETIONS, json.dumps(VALID))
    assert server.get("/health").status_code == 503
    assert server.metric("qadapter_failed_steps_total") == 3
    fragile.breaks_at = ()
    assert server.post(COMPLETIONS, json.dumps(VALID)).status_code == 200
    assert server.get("/health").status_code == 200


def test_a_prompt_that_fails_leaves_answers_under_way_alone(fragile_server):
    server, fragile = fragile_server
    options = {"model": "formal", "prompt": "aaa", "temperature": 0, "max_tokens": 60}
    with server.client() as client:
        alone = client.completions.create(**options).choices[0].text
        stream = client.completions.create(**options, stream=True)
        text = next(stream).choices[0].text
        fragile.breaks_at = (7,)
        error_of(server.post(COMPLETIONS, json.dumps({**VALID, "prompt": "b" * 7})), 500)
        assert text + "".join(chunk.choices[0].text for chunk in stream) == alone


def test_a_failing_step_ends_the_streams_it_served_with_an_error(fragile_server):
    server, fragile = fragile_server
    with server.client() as client:
        stream = chat(client, temperature=0, max_tokens=5000, stream=True)
        next(stream)
        fragile.breaks_at = (1,)
        with pytest.raises(openai.APIError, match="failed to answer"):
            list(stream)
        fragile.breaks_at = ()
        assert chat(client, max_tokens=3, temperature=0).usage.completion_tokens == 3


def test_logits_that_are_not_finite_end_their_own_answer_only():
    base = tiny_base(max_position_embeddings=CONTEXT)
    base.model.embed_tokens.weight.data[5] = float("nan")
    server = RunningServer(two_adapters(base))
    try:
        with server.client() as client:
            with pytest.raises(openai.InternalServerError, match="not finite"):
                client.completions.create(model="formal", prompt=[4, 5, 6])
            assert client.completions.create(model="formal", prompt=[4, 6], max_tokens=3, temperature=0).choices[0].text
            with pytest.raises(openai.InternalServerError, match="not finite"):
                client.completions.create(model="formal", prompt=[[4, 6], [4, 5, 6]], logprobs=1)
        assert server.metric("qadapter_failed_steps_total") == 0
        assert server.get("/health").status_code == 200
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("variables", "param"),
    [
        ({"suffix": 5}, "chat_template_kwargs"),  # text + 5
        ({"depth": "high"}, "chat_template_kwargs"),  # "high" > 3
        ({"depth": 0}, "chat_template_kwargs"),  # 12 / 0
        ({"name": 5}, "chat_template_kwargs"),  # 5.strip()
        ({"suffix": "refuse"}, "messages"),  # by the template's own words
    ],
)
def test_a_variable_that_the_template_cannot_use_is_400(caplog, variables, param):
    template = (
        "{{ messages[0]['content'] + (suffix | default('')) }}{% if depth is defined and depth > 3 or 12 / (depth | "
        "default(1)) > 20 %}x{% endif %}{{ name.strip() if name is defined }}"
        "{{ raise_exception('no such suffix') if suffix == 'refuse' }}"
    )
    server = RunningServer(tokenizer=tiny_tokenizer(template))
    try:
        for good in ({}, {"suffix": "a", "depth": 5, "name": "b"}):
            assert server.post(CHAT, json.dumps({**VALID_CHAT, "chat_template_kwargs": good})).status_code == 200
        error = error_of(server.post(CHAT, json.dumps({**VALID_CHAT, "chat_template_kwargs": variables})), 400)
    finally:
        server.stop()
    (name,) = variables
    assert (error["param"], error["code"]) == (param, "invalid_value")
    assert (f"the chat template fails with {name} as given: " in error["message"]) == (param != "messages")
    assert "Traceback" not in caplog.text


def test_what_asks_for_nothing_is_accepted_and_changes_no_answer(server):
    def text(**changes):
        response = server.post(CHAT, json.dumps({**VALID_CHAT, "temperature": 0, **changes}))
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    empty = {"reasoning_content": "", "reasoning": "", "refusal": ""}
    asked = [*said, {"role": "user", "content": "c"}]
    assert text(messages=[said[0], said[1] | empty, asked[2]]) == text(messages=asked)
    assert text(reasoning_effort="none", verbosity="medium") == text()
