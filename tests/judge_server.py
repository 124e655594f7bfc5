"""A chat-completions endpoint that replies as a test tells it to, and a judge that asks it."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from qadapter.evaluation.judges import judge_all
from qadapter.evaluation.judges.endpoint import EndpointJudge


class JudgeServer(ThreadingHTTPServer):
    """A chat-completions endpoint on a free port whose replies a function of the attempt and its body decides."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.ended, self.lock = reply, [], threading.Event(), threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """Nothing: clients that hang up are what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            attempt = len(self.server.requests) - 1
        self.server.reply(self, attempt, body)

    def send(self, content, status=200, **headers):
        content = content if isinstance(content, bytes) else content.encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def say(self, text):
        self.send(json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}))

    def log_message(self, *args):
        pass


@contextmanager
def serving(reply):
    server = JudgeServer(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


class Naps:
    """In place of asyncio.sleep: notes how long it should have slept."""

    def __init__(self):
        self.seconds = []

    async def __call__(self, seconds):
        self.seconds.append(seconds)


def asked(server, comparisons=1, answers=("good", "bad"), **options):
    """Verdicts and naps of an endpoint judge; `good` against `bad` each time unless told otherwise."""
    naps = Naps()
    judge = EndpointJudge(server.url, "m", **{"timeout": 5.0, "sleep": naps, "concurrency": 1} | options)
    a, b = answers
    verdicts = judge_all(judge, [f"question {i}" for i in range(comparisons)], [a] * comparisons, [b] * comparisons)
    return verdicts, naps.seconds


def prefers_good(handler, attempt, body):
    text = body["messages"][0]["content"]
    handler.say("FIRST" if text.index("\ngood\n") < text.index("\nbad\n") else "SECOND")
