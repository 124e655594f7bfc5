"""vLLM's own HTTP server on an exported folder, asked as its users ask it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from served import MIXED, assert_same, exported, prompts, tiny_folder

HERE = Path(__file__).parent
START_SECONDS, REQUEST_SECONDS, STOP_SECONDS = 300, 120, 30
OPTIONS = "--dtype float32 --enforce-eager --max-model-len 256 --block-size 32 --generation-config vllm"
OPTIONS += f" --served-model-name policy --kv-cache-memory-bytes {32 * 2**20}"


@contextlib.contextmanager
def server(folder, log):
    """The address of a server on `folder`, once it is up; its processes are gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    command = [sys.executable, str(HERE / "api_server.py"), "--model", str(folder), *OPTIONS.split()]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        running = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_up(running, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        running.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # the engine's process, if it was left behind
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def wait_until_up(running, address, log):
    """Return when the server answers; fail when its process has ended or the time is up."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and running.poll() is None:
        with contextlib.suppress(URLError, OSError), urlopen(address, timeout=5):
            return
        time.sleep(0.5)
    pytest.fail(f"no server (exit code {running.poll()}):\n{log.read_text()[-4000:]}")


def completions(address, rows, tokens=12, **xargs):
    """Greedy answers to a batch of prompts, in the shape of the engine's own."""
    body = {
        "model": "policy",
        "prompt": rows,
        "max_tokens": tokens,
        "temperature": 0,
        "logprobs": 5,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,
        **({"vllm_xargs": xargs} if xargs else {}),
    }
    headers = {"Content-Type": "application/json"}
    request = Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    with urlopen(request, timeout=REQUEST_SECONDS) as response:
        return [answer(choice["logprobs"]) for choice in json.load(response)["choices"]]


def answer(logprobs):
    """The tokens and the likeliest tokens' log-probabilities of one choice."""

    def number(token):
        return int(token.removeprefix("token_id:"))

    return SimpleNamespace(
        token_ids=[number(token) for token in logprobs["tokens"]],
        logprobs=[
            {number(token): SimpleNamespace(logprob=value) for token, value in row.items()}
            for row in logprobs["top_logprobs"]
        ],
    )


def streaming(address, row, tokens):
    """The connection of an answer whose first piece has come."""
    connection = HTTPConnection(address.removeprefix("http://"), timeout=REQUEST_SECONDS)
    body = {"model": "policy", "prompt": row, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    assert connection.getresponse().readline().startswith(b"data: ")
    return connection


def metric(address, name):
    """The sum of the server's counters of that name."""
    with urlopen(f"{address}/metrics", timeout=REQUEST_SECONDS) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}{{"))


@pytest.mark.slow
def test_strengths_over_http_and_a_server_that_survives_wrong_ones_and_a_client_that_leaves(tmp_path):
    policy, _ = tiny_folder(tmp_path)
    rows = prompts(*MIXED)
    with server(exported(policy, tmp_path / "out"), tmp_path / "server.log") as address:
        for strength in (0.3, 1.7):
            answers = completions(address, rows, qadapter_strength=strength)
            assert_same(policy, rows, answers, strength=strength)
        for wrong, message in [
            ({"qadapter_strength": "high"}, "qadapter_strength = 'high': must be a finite number"),
            ({"qadapter_strength": 1e39}, "qadapter_strength = 1e+39: must lie within"),
            ({"qadapter_strenght": 0.5}, "'qadapter_strenght' is unknown"),
        ]:
            with pytest.raises(HTTPError) as refusal:
                completions(address, rows, **wrong)
            with refusal.value as response:
                assert response.code == 400
                assert message in json.load(response)["error"]["message"]
        assert_same(policy, rows, completions(address, rows))  # at the exported strength, after the refusals
        before = metric(address, "generation_tokens_total")
        with ThreadPoolExecutor(1) as pool:
            leaving = streaming(address, rows[1], 180)
            others = pool.submit(completions, address, rows, tokens=40, qadapter_strength=0.3)
            leaving.close()
            assert_same(policy, rows, others.result(), strength=0.3)
        end = time.monotonic() + REQUEST_SECONDS
        while metric(address, "num_requests_running") and time.monotonic() < end:
            time.sleep(0.1)
        assert 0 < metric(address, "generation_tokens_total") - before - 40 * len(rows) < 180
