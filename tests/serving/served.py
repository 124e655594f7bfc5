"""Servers on tiny models, run in a thread of the test process and spoken to over a socket."""

import http.client
import json
import threading
import time
from urllib.parse import urlsplit

import httpx
import openai
import torch
from models import APART, SIZES, lora, randomise, tiny_base, tiny_tokenizer, train_randomly
from transformers import AutoConfig, AutoModelForCausalLM

from qadapter import QAdapterConfig, QAdapterForCausalLM
from qadapter.serving.app import Service
from qadapter.serving.server import GracefulServer, listening_socket, url_of
from qadapter.serving.settings import ServerSettings

MODELS = {"formal": {"first": 1.0}, "concise": {"second": 1.0}, "both": {"first": 0.5, "second": 0.5}}
CONTEXT = 200
PATIENCE = 60.0


def two_adapters(base=None, **peft_changes):
    """A policy with two random adapters; at full strength `first` needs both streams, `second` only its own."""
    base = tiny_base(max_position_embeddings=CONTEXT) if base is None else base
    configs = {"first": APART, "second": QAdapterConfig()}
    adapters = {"first": lora(**peft_changes), "second": lora(r=2, **peft_changes)}
    return train_randomly(QAdapterForCausalLM(base, configs, adapters)).eval()


def endless_base():
    """A base whose greedy answers end only at their length."""
    base = tiny_base(max_position_embeddings=100_000)
    with torch.no_grad():
        base.lm_head.weight[1] = 0.0  # </s> has the logit 0, the largest of the others is far above
    return base


def longrope_base(original):
    """A Phi-3 whose positions are other ones in texts of more than `original` tokens."""
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    scaling |= {"original_max_position_embeddings": original, "factor": 4.0}
    sizes = SIZES | {"max_position_embeddings": 4 * original, "original_max_position_embeddings": original}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **sizes, rope_parameters=scaling)).eval()
    randomise(base)
    return base


class RunningServer:
    """A server that accepts connections until `stop`."""

    def __init__(self, model=None, tokenizer=None, models=None, **settings):
        settings = ServerSettings(**{"port": 0, "shutdown_timeout": 1.0, **settings})
        self.service = Service(model or two_adapters(), tokenizer or tiny_tokenizer(), models or MODELS, settings)
        self.listener = listening_socket(self.service.settings.host, 0)
        self.url = url_of(self.listener)
        ready = threading.Event()
        self.server = GracefulServer(self.service, ready.set)
        self._http = plain_http(self.url)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self._thread.start()
        assert ready.wait(PATIENCE)

    def client(self, **options):
        """OpenAI's client for this server; it does not retry."""
        options = {"api_key": "none", "max_retries": 0, "http_client": plain_http(self.url), **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def post(self, path, content, headers=None):
        """The response to raw bytes."""
        headers = {"Content-Type": "application/json", **(headers or {})}
        return self._http.post(path, content=content, headers=headers)

    def get(self, path, headers=None):
        """The response to a GET."""
        return self._http.get(path, headers=headers)

    def open_connection(self):
        """A bare HTTP connection."""
        address = urlsplit(self.url)
        return http.client.HTTPConnection(address.hostname, address.port, timeout=PATIENCE)

    def start_request(self, body, path="/v1/completions"):
        """An HTTP connection over which a request was sent, without waiting for the response."""
        connection = self.open_connection()
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def metric(self, line_start):
        """The value of one line of /metrics; 0 if there is none."""
        lines = self.get("/metrics").text.splitlines()
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(line_start)), 0.0)

    def begin_stop(self):
        """Tell the server to stop, as SIGTERM does."""
        self.server.should_exit = True

    def stop(self):
        """Tell the server to stop and wait until it has."""
        self.begin_stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._http.close()
        self.listener.close()


def plain_http(url):
    """An HTTP client that does not read the machine's certificates first."""
    return httpx.Client(base_url=url, verify=False, timeout=PATIENCE)


def eventually(condition):
    """Wait until `condition()` holds, failing after `PATIENCE` seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.005)


def chat(client, text="hello", model="formal", **options):
    """A chat completion with one message of the user."""
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)


def dial(**options):
    """`extra_body` of OpenAI's client for the dial."""
    return {"qadapter": options}


def greedy_text(model, prompt_ids, tokens, **options):
    """The slow twin of a greedy answer: the model's own forward on the whole row for every token."""
    ids, decay = list(prompt_ids), options.pop("decay", 1.0)
    with torch.no_grad():
        for step in range(tokens):
            now = options | ({"strength": options["strength"] * decay**step} if decay < 1 else {})
            logits = model(torch.tensor([ids]), use_cache=False, **now).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] == 1:
                break
    return tiny_tokenizer().decode(ids[len(prompt_ids) :], skip_special_tokens=True)


def prompt_ids_of(text):
    """The ids of a chat with one message of the user."""
    messages = [{"role": "user", "content": text}]
    return tiny_tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def error_of(response, status):
    """The error object of a response, checked for its shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    return error
