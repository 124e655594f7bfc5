"""Places, time and size are bounded, and whoever goes away frees a place."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from models import tiny_tokenizer
from served import RunningServer, chat, endless_base, eventually, two_adapters

from qadapter.serving.answers import CompletionShape

FOREVER = {"model": "formal", "prompt": "a", "temperature": 0, "max_tokens": 50_000}
SHORT = {**FOREVER, "max_tokens": 3}


@pytest.mark.parametrize("stream", [False, True])
def test_closing_the_connection_frees_the_place(running, stream):
    server = running(max_batch=2, max_n=2)
    connection = server.start_request({**FOREVER, "n": 2, "stream": stream})
    eventually(lambda: server.service.engine.running == 2)
    connection.close()
    eventually(lambda: server.service.engine.running == 0)
    assert server.post("/v1/completions", json.dumps({**SHORT, "n": 2})).status_code == 200


def test_closing_a_clients_stream_frees_the_place(running):
    server = running()
    with server.client() as client:
        stream = chat(client, temperature=0, max_tokens=50_000, stream=True)
        next(stream)
        eventually(lambda: server.service.engine.running == 1)
        stream.close()
        eventually(lambda: server.service.engine.running == 0)


def test_closing_the_connection_while_waiting_frees_the_place_in_the_queue(running):
    server = running(max_batch=1, max_n=1)
    first = server.start_request(FOREVER)
    eventually(lambda: server.service.engine.running == 1)
    second = server.start_request(FOREVER)
    eventually(lambda: server.service.engine.waiting == 1)
    second.close()
    eventually(lambda: server.service.engine.waiting == 0)
    first.close()
    eventually(lambda: server.service.engine.running == 0)


def test_a_long_prompt_is_given_up_between_its_chunks(running):
    server = running(prefill_tokens=1)
    connection = server.start_request({**FOREVER, "prompt": "a" * 50_000, "max_tokens": 1})
    eventually(lambda: server.service.engine._prefill is not None)
    connection.close()
    eventually(lambda: server.service.engine._prefill is None)
    assert server.post("/v1/completions", json.dumps(SHORT)).status_code == 200


def test_answers_go_on_while_a_long_prompt_is_read(running):
    server = running(prefill_tokens=1)
    answering = server.start_request(FOREVER)
    eventually(lambda: server.service.engine.running == 1)
    reading = server.start_request({**FOREVER, "prompt": "a" * 50_000, "max_tokens": 1})
    eventually(lambda: server.service.engine._prefill is not None)
    prefill, line = server.service.engine._prefill, 'qadapter_generated_tokens_total{model="formal"}'
    generated = server.metric(line)  # first: the request takes time
    read = prefill.done
    eventually(lambda: prefill.done >= read + 50)
    assert server.metric(line) - generated >= 40
    answering.close()
    reading.close()


def test_a_full_queue_is_429_and_the_client_may_retry(running):
    server = running(max_batch=1, max_n=1, max_queue=1)
    connections = [server.start_request(FOREVER)]
    eventually(lambda: server.service.engine.running == 1)
    connections.append(server.start_request(FOREVER))
    eventually(lambda: server.service.engine.waiting == 1)
    with server.client() as client:
        with pytest.raises(openai.RateLimitError, match="queue") as caught:
            client.completions.create(**SHORT)
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "queue_full"
        for connection in connections:
            connection.close()
        eventually(lambda: server.service.engine.running == 0)
        assert client.completions.create(**SHORT).usage.completion_tokens == 3


def test_a_request_of_several_prompts_is_queued_whole_or_not_at_all(running):
    server = running(max_batch=1, max_n=1, max_queue=3)
    connection = server.start_request(FOREVER)
    eventually(lambda: server.service.engine.running == 1)
    queued = server.start_request({**SHORT, "prompt": ["a", "b"]})
    eventually(lambda: server.service.engine.waiting == 2)
    assert server.post("/v1/completions", json.dumps({**SHORT, "prompt": ["a", "b"]})).status_code == 429
    assert server.service.engine.waiting == 2
    connection.close()
    assert queued.getresponse().status == 200
    queued.close()


@pytest.mark.parametrize("max_batch", [1, 3])
def test_more_requests_than_places_are_all_answered_in_turn(running, max_batch):
    server = running(max_batch=max_batch, max_n=1)
    with server.client() as client, ThreadPoolExecutor(10) as pool:
        prompts = [f"{number}" * (1 + number) for number in range(10)]

        def ask(prompt):
            return client.completions.create(**{**SHORT, "prompt": prompt, "max_tokens": 8}).choices[0].text

        assert list(pool.map(ask, prompts)) == [ask(prompt) for prompt in prompts]


def test_an_answer_that_takes_too_long_is_504_and_its_place_is_freed(running):
    server = running(request_timeout=1.0)
    with server.client() as client:
        with pytest.raises(openai.InternalServerError, match="not complete within") as caught:
            client.completions.create(**FOREVER)
        assert caught.value.status_code == 504
        eventually(lambda: server.service.engine.running == 0)
        with pytest.raises(openai.APIError, match="not complete within"):
            list(client.completions.create(**FOREVER, stream=True))
        eventually(lambda: server.service.engine.running == 0)
        assert client.completions.create(**SHORT).usage.completion_tokens == 3


@pytest.mark.parametrize("declared", [True, False])
def test_a_large_body_is_413(running, declared):
    server = running(max_body_bytes=1000)
    body = json.dumps({**SHORT, "prompt": "a" * 1000}).encode()
    content = body if declared else iter([body])  # an iterator is sent in chunks, without a length
    response = server.post("/v1/completions", content)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert server.post("/v1/completions", json.dumps(SHORT)).status_code == 200


def begin_body(server):
    """A connection over which the first ten of the 100 bytes of a request have been sent."""
    connection = server.open_connection()
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b'{"model": ')
    return connection


def test_a_body_that_does_not_arrive_is_408(running, monkeypatch):
    monkeypatch.setattr("qadapter.serving.body.BODY_SECONDS", 0.1)
    server = running()
    connection = begin_body(server)
    response = connection.getresponse()
    assert response.status == 408
    assert json.loads(response.read())["error"]["code"] == "body_timeout"
    connection.close()


def test_a_client_that_leaves_before_its_body_is_there_is_no_failure_of_the_server(running, caplog):
    server = running()
    connection = begin_body(server)
    connection.close()
    eventually(lambda: server.metric('qadapter_requests_total{route="/v1/completions",status="499"}') == 1)
    assert "Traceback" not in caplog.text


def test_stopping_lets_answers_end(running):
    server = running(shutdown_timeout=60)
    results = []

    def ask():
        results.append(server.post("/v1/completions", json.dumps({**FOREVER, "max_tokens": 400})))

    asker = threading.Thread(target=ask)
    asker.start()
    eventually(lambda: server.service.engine.running == 1)
    server.stop()
    asker.join()
    assert results[0].json()["usage"]["completion_tokens"] == 400


def test_stopping_ends_answers_that_take_too_long_with_an_error(running):
    server = running(shutdown_timeout=0.3)
    results = []

    def ask(stream):
        results.append(server.post("/v1/completions", json.dumps({**FOREVER, "stream": stream})))

    askers = [threading.Thread(target=ask, args=[stream]) for stream in (False, True)]
    for asker in askers:
        asker.start()
    eventually(lambda: server.service.engine.running == 2)
    server.stop()
    for asker in askers:
        asker.join()
    whole, streamed = sorted(results, key=lambda response: -response.status_code)
    assert whole.status_code == 503
    assert whole.json()["error"]["code"] == "shutting_down"
    assert '"code":"shutting_down"' in streamed.text.strip().splitlines()[-1]


@pytest.mark.parametrize("asked_before", [False, True])
def test_a_connection_that_never_sends_a_whole_head_is_closed(server, monkeypatch, asked_before):
    """However slowly its bytes come, and whether or not it asked something before."""
    monkeypatch.setattr("qadapter.serving.connections.HEAD_SECONDS", 0.5)
    with socket.create_connection(server.listener.getsockname()[:2], timeout=10) as connection:
        if asked_before:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        start = time.monotonic()
        try:
            while time.monotonic() < start + 10:
                connection.sendall(b"A: b\r\n")
                time.sleep(0.05)
        except OSError:  # the other end is closed
            pass
        assert 0.3 < time.monotonic() - start < 5
    assert server.get("/health").status_code == 200


def test_an_answer_may_take_longer_than_a_head(running, monkeypatch):
    monkeypatch.setattr("qadapter.serving.connections.HEAD_SECONDS", 0.5)
    server = running()
    with server.client() as client:
        for _ in range(2):  # by the same connection
            start = time.monotonic()
            client.completions.create(**{**FOREVER, "max_tokens": 600})
            assert time.monotonic() - start > 0.5


class SlowTokenizer:
    """A tokenizer that takes its time over some texts."""

    def __init__(self):
        self._tokenizer, self.release, self.seen = tiny_tokenizer(), threading.Event(), []

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __deepcopy__(self, memo):
        return tiny_tokenizer()

    def __call__(self, text, **options):
        self.seen.append(text)
        if text == "slow":
            self.release.wait(20)
        return self._tokenizer(text, **options)


def test_prompts_that_wait_for_the_tokenizer_count_as_queued_and_have_the_requests_time():
    tokenizer = SlowTokenizer()
    server = RunningServer(two_adapters(endless_base()), tokenizer, max_queue=3, request_timeout=3.0)
    try:
        slow = server.start_request({**SHORT, "prompt": "slow"})
        eventually(lambda: tokenizer.seen == ["slow"])
        gone = server.start_request({**SHORT, "prompt": "gone"})
        eventually(lambda: server.service._tokenised == 2)
        with ThreadPoolExecutor() as pool:
            late = pool.submit(server.post, "/v1/completions", json.dumps({**SHORT, "prompt": "late"}))
            eventually(lambda: server.service._tokenised == 3)
            assert server.post("/v1/completions", json.dumps(SHORT)).status_code == 429
            gone.close()
            eventually(lambda: server.service._tokenised == 2)
            assert server.post("/v1/completions", json.dumps({**SHORT, "prompt": ["a", "b"]})).status_code == 429
            assert late.result().status_code == 504
        tokenizer.release.set()
        assert slow.getresponse().status == 504
        assert server.post("/v1/completions", json.dumps(SHORT)).status_code == 200
        assert not {"gone", "late"} & set(tokenizer.seen)  # nobody waited for these any more
        slow.close()
    finally:
        tokenizer.release.set()
        server.stop()


def test_a_stream_that_its_client_does_not_read_ends_in_time(running, monkeypatch):
    monkeypatch.setattr("qadapter.serving.exchange.LAST_EVENT_SECONDS", 0.2)
    server = running(request_timeout=1.0, max_batch=8, max_n=8)
    body = json.dumps({**FOREVER, "n": 8, "stream": True, "logprobs": 5}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.listener.getsockname()[:2])
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        connection.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        eventually(lambda: server.service.engine.running == 8)
        eventually(lambda: server.service.engine.running == 0)
        eventually(lambda: not server.server.server_state.connections - set(kept_alive(server)))
    ended = 'qadapter_requests_total{route="/v1/completions",status="504"}'
    eventually(lambda: server.metric(ended) == 1)


def test_a_connection_whose_answers_nobody_reads_is_ended(server, monkeypatch):
    """Here of many questions at once, whose answers fill every buffer on the way."""
    monkeypatch.setattr("qadapter.serving.connections.UNREAD_SECONDS", 0.5)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.listener.getsockname()[:2])
        connection.settimeout(20)
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20_000)

        def is_closed():
            try:
                connection.send(b"\r\n")
            except OSError:
                return True
            return False

        eventually(is_closed)
    assert server.get("/health").status_code == 200


def test_a_stream_that_fails_within_is_counted_as_the_servers_fault(running, monkeypatch, caplog):
    server = running()
    monkeypatch.setattr(CompletionShape, "delta", lambda *_: {}["no such field"])
    with server.client() as client, pytest.raises(Exception, match="incomplete|peer closed|Connection"):
        list(client.completions.create(**SHORT, stream=True))
    eventually(lambda: server.metric('qadapter_requests_total{route="/v1/completions",status="500"}') == 1)
    assert "failed" in caplog.text


def kept_alive(server):
    """Connections that wait for another request."""
    return [one for one in server.server.server_state.connections if one.cycle is None or one.cycle.response_complete]


@pytest.mark.parametrize(("leaves", "status"), [(False, 504), (True, 499)])
def test_how_a_stream_ended_is_counted(running, leaves, status):
    server = running(request_timeout=30.0 if leaves else 1.0)
    with server.client() as client:
        stream = client.completions.create(**FOREVER, stream=True)
        if leaves:
            next(stream)
            stream.close()
        else:
            with pytest.raises(openai.APIError, match="not complete within"):
                list(stream)
        assert list(client.completions.create(**SHORT, stream=True))
    counted = 'qadapter_requests_total{route="/v1/completions",status="%d"}'
    eventually(lambda: (server.metric(counted % status), server.metric(counted % 200)) == (1, 1))
