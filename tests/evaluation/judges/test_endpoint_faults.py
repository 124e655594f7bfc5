"""Endpoints that misbehave in every way: retried, given up, and never counted as a win."""

import time
from email.utils import formatdate

import pytest
from judge_server import asked, prefers_good, serving

from qadapter.evaluation.judges import win_rate
from qadapter.evaluation.judges.endpoint import GIVE_UP_AFTER, seconds_to_wait


def drip(handler, attempt, body):
    """One byte at a time: each comes soon, the whole never."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.ended.wait(0.02):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def drip_headers(handler, attempt, body):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while not handler.server.ended.wait(0.02):
        handler.wfile.write(b"x")
        handler.wfile.flush()


def hang(handler, attempt, body):
    handler.server.ended.wait(20)


def cut_short(handler, attempt, body):
    """A refusal whose body never comes whole: its status and its Retry-After hold."""
    handler.send_response(429)
    handler.send_header("Content-Length", "100")
    handler.send_header("Retry-After", "7")
    handler.end_headers()
    handler.wfile.write(b"{")
    handler.close_connection = True


MISBEHAVIOUR = {
    "rate-limits in half a reply": (cut_short, "HTTP status 429"),
    "fails": (lambda handler, attempt, body: handler.send("broken", 500), "HTTP status 500"),
    "hangs": (hang, "no reply within 0.2 s"),
    "drips": (drip, "no reply within 0.2 s"),
    "drips headers": (drip_headers, "no reply within 0.2 s"),
    "answers nonsense": (lambda handler, attempt, body: handler.say("I like both!"), "the reply is none of FIRST"),
    "answers an essay": (
        lambda handler, attempt, body: handler.say("FIRST, as SECOND is worse"),
        "the reply is none of",
    ),
    "answers nothing": (lambda handler, attempt, body: handler.say(None), "the reply is no chat completion"),
    "answers no JSON": (lambda handler, attempt, body: handler.send("<html>"), "the reply is no chat completion"),
    "answers too much": (lambda handler, attempt, body: handler.send(b"x" * (1 << 21)), "more than 1048576 bytes"),
    "hangs up": (lambda handler, attempt, body: handler.connection.close(), "Error"),
    "redirects": (lambda handler, attempt, body: handler.send("", 302, Location="/"), "HTTP status 302"),
    "rate-limits": (lambda handler, attempt, body: handler.send("", 429, Retry_After="7"), "HTTP status 429"),
}


@pytest.mark.parametrize("name", MISBEHAVIOUR)
def test_an_endpoint_that_misbehaves_is_retried_then_reported_missing(name):
    reply, reason = MISBEHAVIOUR[name]
    with serving(reply) as server:
        verdicts, naps = asked(server, timeout=0.2 if reason.startswith("no reply") else 5.0, attempts=3)
        attempts = len(server.requests)
    assert verdicts[0].winner is None
    assert reason in verdicts[0].reason
    assert win_rate(verdicts).wins == 0
    assert win_rate(verdicts).missing == 1
    if name == "redirects":  # no other attempt can help
        assert (attempts, naps) == (1, [])
    else:
        # On a busy machine an attempt may be over before the server has read it; the naps between them tell the number.
        assert attempts <= 3 if reason.startswith("no reply") else attempts == 3
        assert naps == ([7.0, 7.0] if name.startswith("rate-limits") else [1.0, 2.0])
        assert "(attempt 3 of 3)" in verdicts[0].reason


@pytest.mark.parametrize("name", [name for name in MISBEHAVIOUR if name != "redirects"])
def test_an_endpoint_that_recovers_is_believed(name):
    reply, reason = MISBEHAVIOUR[name]

    def once(handler, attempt, body):
        return reply(handler, attempt, body) if attempt == 0 else prefers_good(handler, attempt, body)

    with serving(once) as server:
        verdicts, naps = asked(server, timeout=0.5 if reason.startswith("no reply") else 5.0)
    assert verdicts[0].winner == "a"
    assert len(naps) == 1


def test_an_endpoint_that_fails_for_the_second_order_only_gives_no_verdict():
    def reply(handler, attempt, body):
        return prefers_good(handler, attempt, body) if attempt == 0 else handler.send("", 503)

    with serving(reply) as server:
        verdicts, _ = asked(server, attempts=2)
    assert verdicts[0].winner is None


def test_an_endpoint_that_is_down_is_given_up_and_never_counted_as_a_win():
    with serving(prefers_good) as server:
        pass
    verdicts, naps = asked(server, comparisons=GIVE_UP_AFTER + 5, attempts=2)
    assert win_rate(verdicts).missing == GIVE_UP_AFTER + 5
    assert len(naps) == GIVE_UP_AFTER
    assert "ConnectError" in verdicts[0].reason
    assert "not asked: 8 comparisons in a row had no verdict" in verdicts[-1].reason


def test_waits_are_bounded_whatever_the_endpoint_asks_for():
    with serving(lambda handler, attempt, body: handler.send("", 429, Retry_After="86400")) as server:
        _, naps = asked(server, attempts=2)
    assert naps == [60.0]


def test_retry_after_is_read_as_seconds_or_date():
    assert seconds_to_wait("1.5") == 1.5
    assert 50 < seconds_to_wait(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert seconds_to_wait(formatdate(time.time() - 60, usegmt=True)) == 0
    assert [seconds_to_wait(text) for text in (None, "soon", "nan", "inf")] == [None] * 4
