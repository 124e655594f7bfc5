"""Asks a running playground as its page does."""

import json


def ask(address, **body):
    import httpx  # of an extra, whose absence skips the tests

    response = httpx.post(f"{address}/api/answer", json={"prompt": "hello", "max_new_tokens": 9, **body}, timeout=30)
    return [json.loads(line) for line in response.text.splitlines()]
