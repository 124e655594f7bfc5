"""Who may come in, and what is written down about it."""

import json
import logging
import re

import httpx
import openai
import pytest
from served import RunningServer, chat, eventually, longrope_base, two_adapters

from qadapter.errors import ConfigError
from qadapter.serving.server import listening_socket
from qadapter.serving.settings import ServerSettings

BODY = json.dumps({"model": "formal", "prompt": "top secret", "max_tokens": 3})


@pytest.fixture(scope="module")
def guarded():
    server = RunningServer(api_key="sesame-1")
    yield server
    server.stop()


@pytest.mark.parametrize("key", ["", "sesame", "sesame-12", "Sesame-1", "x" * 500])
def test_a_wrong_key_is_401(guarded, key):
    response = guarded.post("/v1/completions", BODY, {"Authorization": f"Bearer {key}"} if key else None)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("scheme", ["Basic", "Bearers", ""])
def test_the_right_key_in_another_scheme_is_401(guarded, scheme):
    assert guarded.post("/v1/completions", BODY, {"Authorization": f"{scheme} sesame-1".strip()}).status_code == 401


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_schemes_name_has_no_case(guarded, scheme):
    """RFC 9110, section 11.1."""
    assert guarded.post("/v1/completions", BODY, {"Authorization": f"{scheme} sesame-1"}).status_code == 200


def test_the_right_key_opens(guarded):
    with guarded.client(api_key="sesame-1") as client:
        assert chat(client, max_tokens=2).usage.completion_tokens <= 2
    with guarded.client(api_key="guess") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


@pytest.mark.parametrize("path", ["/metrics", "/v1/models", "/nothing"])
def test_everything_but_health_needs_the_key(guarded, path):
    assert guarded.get(path).status_code == 401
    assert guarded.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.5"])
def test_without_a_key_other_names_for_this_machine_are_refused(server, host):
    response = server.post("/v1/completions", BODY, {"Host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LocalHost.", "localhost:1234", "127.0.0.1:8000", "[::1]:8000", "[::1]"])
def test_this_machines_own_names_are_fine(server, host):
    assert server.get("/v1/models", {"Host": host}).status_code == 200


def test_with_a_key_any_name_is_fine(guarded):
    headers = {"Host": "llm.example", "Authorization": "Bearer sesame-1"}
    assert guarded.get("/v1/models", headers).status_code == 200


def test_every_response_carries_a_request_id(server, client):
    first, second = server.get("/v1/models"), server.get("/nothing")
    assert re.fullmatch("[0-9a-f]{32}", first.headers["x-request-id"])
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert server.get("/health", {"X-Request-Id": "mine-1.a_b"}).headers["x-request-id"] == "mine-1.a_b"
    assert server.get("/health", {"X-Request-Id": "no spaces"}).headers["x-request-id"] != "no spaces"
    assert chat(client, max_tokens=1)._request_id


def test_the_access_log_has_a_line_a_request_without_what_was_said(server, caplog):
    with caplog.at_level(logging.INFO, "qadapter.serving.access"):
        server.post("/v1/completions", BODY, {"X-Request-Id": "logged-1"})
        server.get("/nothing%0Aforged line", {"X-Request-Id": "logged-2"})
        eventually(lambda: sum(line.startswith("logged-") for line in caplog.messages) == 2)
    first, second = (line for line in caplog.messages if line.startswith("logged-"))
    pattern = r"logged-1 127\.0\.0\.1 POST /v1/completions 200 \d+\.\d+s model=formal prompt_tokens=10"
    assert re.fullmatch(pattern, first)
    assert "secret" not in caplog.text
    assert "\n" not in second
    assert " 404 " in second


@pytest.mark.parametrize(
    ("forwarded", "logged"), [("203.0.113.9", "203.0.113.9"), ("1.2.3.4 GET /v1/forged 200", "-"), ("\x1b[31m", "-")]
)
def test_the_access_log_names_no_client_that_is_no_address(server, caplog, forwarded, logged):
    with caplog.at_level(logging.INFO, "qadapter.serving.access"):
        server.get("/v1/models", {"X-Request-Id": "forwarded-1", "X-Forwarded-For": forwarded})
        eventually(lambda: any(line.startswith("forwarded-1") for line in caplog.messages))
    (line,) = (line for line in caplog.messages if line.startswith("forwarded-1"))
    assert re.fullmatch(rf"forwarded-1 {re.escape(logged)} GET /v1/models 200 \d+\.\d+s -", line)


def test_metrics_count_requests_tokens_and_time():
    server = RunningServer()
    try:
        with server.client() as client:
            answer = chat(client, model="concise", max_tokens=5, n=2)
            with pytest.raises(openai.NotFoundError):
                chat(client, model="unknown")
        expected = {
            'qadapter_requests_total{route="/v1/chat/completions",status="200"}': 1,
            'qadapter_requests_total{route="/v1/chat/completions",status="404"}': 1,
            'qadapter_request_seconds_count{route="/v1/chat/completions"}': 2,
            'qadapter_prompt_tokens_total{model="concise"}': answer.usage.prompt_tokens,
            'qadapter_generated_tokens_total{model="concise"}': answer.usage.completion_tokens,
            "qadapter_first_token_seconds_count": 1,
            "qadapter_running_answers": 0,
            "qadapter_waiting_prompts": 0,
        }
        assert httpx.head(f"{server.url}/health").status_code == 200
        eventually(lambda: all(server.metric(line) == value for line, value in expected.items()))
        assert 'model="unknown"' not in server.get("/metrics").text
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"port": 70_000}, "port"),
        ({"api_key": " "}, "blank"),
        ({"api_key": "clé"}, "ASCII"),
        ({"api_key": "sesame\n"}, "blanks around"),
        ({"max_context": 1}, "max_context"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_batch": 4}, "max_n = 8: must not exceed max_batch = 4"),
        ({"max_queue": 0}, "max_queue"),
        ({"request_timeout": 0.0}, "request_timeout"),
        ({"shutdown_timeout": float("inf")}, "shutdown_timeout"),
        ({"request_timeout": float("nan")}, "request_timeout"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        ServerSettings(**settings)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("LocalHost.", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_loopback_is_recognised(host, loopback):
    assert ServerSettings(host=host).on_loopback is loopback


def test_the_default_address_is_loopback():
    assert ServerSettings().on_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_an_address_that_cannot_be_had_is_refused(server, host):
    port = server.listener.getsockname()[1]
    with pytest.raises(ConfigError, match=f"cannot listen on {host} port {port}"):
        listening_socket(host, port)


def test_more_context_than_the_base_was_made_for_is_refused():
    with pytest.raises(ConfigError, match="at most 200 tokens can be served"):
        RunningServer(max_context=10_000)


def test_answers_end_where_longrope_would_change_all_positions_of_a_batch():
    """Beyond, an answer would depend on how long its neighbours are."""
    server = RunningServer(two_adapters(longrope_base(original=32)))
    try:
        with server.client() as client:
            options = {"model": "formal", "max_tokens": 12, "temperature": 0}
            alone = client.completions.create(prompt="short", **options)
            both = client.completions.create(prompt=["short", "a long prompt here"], **options)
            assert both.choices[0].text == alone.choices[0].text
            with pytest.raises(openai.BadRequestError, match="context is 32 tokens"):
                client.completions.create(prompt="a prompt that is longer than before", **options)
    finally:
        server.stop()
    with pytest.raises(ConfigError, match="at most 32 tokens can be served"):
        RunningServer(two_adapters(longrope_base(original=32)), max_context=100)
