"""A running playground, for its requests and for its page."""

import threading
import time
from contextlib import contextmanager

import models
import pytest

from qadapter import QAdapterConfig, QAdapterForCausalLM


@pytest.fixture(scope="module")
def policy():
    base = models.tiny_base(max_position_embeddings=256)
    lora = models.lora
    policy = QAdapterForCausalLM(
        base, {"concise": models.APART, "polite": models.APART}, {"concise": lora(), "polite": lora(r=2)}
    ).eval()
    policy.adapter_weights = {"concise": 1.0, "polite": 0.0}
    return models.train_randomly(policy, scale=0.25)


@pytest.fixture(scope="module")
def plain_policy():
    """One whose weights can be interpolated."""
    base = models.tiny_base(max_position_embeddings=256)
    configs = dict.fromkeys(("concise", "polite"), QAdapterConfig())
    policy = QAdapterForCausalLM(base, configs, {"concise": models.lora(), "polite": models.lora(r=2)}).eval()
    return models.train_randomly(policy, scale=0.25)


@pytest.fixture(scope="module")
def address(policy):
    """The address of a running playground; ends with the module."""
    with running(policy) as url:
        yield url


@pytest.fixture(scope="module")
def plain_address(plain_policy):
    """Likewise, of `plain_policy`."""
    with running(plain_policy) as url:
        yield url


@contextmanager
def running(policy):
    """The address of a playground that runs within the context."""
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    from qadapter.playground.app import create_app

    config = uvicorn.Config(create_app(policy, models.tiny_tokenizer(), "concise"), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=20)
    assert not thread.is_alive()
