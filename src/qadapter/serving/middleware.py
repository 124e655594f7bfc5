"""What happens to every request: an id, a line in the access log, figures, and who may come in."""

import hashlib
import hmac
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qadapter.serving.api_errors import ApiError, internal_error
from qadapter.serving.metrics import Metrics
from qadapter.serving.settings import ServerSettings, is_loopback

access_log = logging.getLogger("qadapter.serving.access")
logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
ADDRESS = re.compile(r"[A-Za-z0-9.:%_-]{1,64}")
OPEN_PATHS = frozenset({"/health"})


def error_response(error: ApiError) -> JSONResponse:
    """The response for an error."""
    return JSONResponse(error.to_dict(), error.status, headers=error.headers)


class RequestRecord:
    """Gives every request an id (the client's own if it is harmless), logs and counts it, and catches what failed."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        offered = Headers(scope=scope).get("x-request-id", "")
        request_id = offered if REQUEST_ID.fullmatch(offered) else uuid.uuid4().hex
        started, status = time.perf_counter(), 0

        async def recorded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, recorded)
        except Exception:
            logger.exception("request %s failed", request_id)
            if status == 0:
                await error_response(internal_error())(scope, receive, recorded)
        finally:
            self._write(scope, request_id, status, time.perf_counter() - started)

    def _write(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        # A stream's, of which the status that was sent says nothing.
        status = scope.get("state", {}).get("outcome", status)
        route = getattr(scope.get("route"), "path", "unknown")
        self.metrics.requests.labels(route, status).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        client = (scope.get("client") or ("-",))[0]
        if not ADDRESS.fullmatch(client):  # uvicorn takes what a proxy on this machine says in X-Forwarded-For
            client = "-"
        # The path as it came over the wire is ASCII without control characters; the decoded one may be anything.
        path = scope.get("raw_path", b"").decode("ascii", "replace")[:200]
        access_log.info(
            "%s %s %s %s %d %.3fs %s", request_id, client, scope["method"], path, status, seconds, _note(scope)
        )


def note(scope: Scope, text: str) -> None:
    """Have `text` appear in the request's line of the access log."""
    scope.setdefault("state", {})["note"] = text


def _note(scope: Scope) -> str:
    return scope.get("state", {}).get("note", "-")


class Gate:
    """Lets in who has the API key; where none is asked for, keeps out web pages that aim at this machine.

    A page of another site can have its own name resolve to 127.0.0.1 (DNS rebinding) and would then talk to a local
    server as to its own. Its requests carry that name in the Host header.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            error = self._refusal(Headers(scope=scope))
            if error is not None:
                return await error_response(error)(scope, receive, send)
        await self.app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        key = self.settings.api_key
        if key is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() == "bearer" and _same(given.strip(), key):
                return None
            message = "the API key is missing or wrong: send Authorization: Bearer KEY."
            return ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        name = re.sub(r":\d+$", "", headers.get("host", "")).strip("[]")  # without the port
        if self.settings.on_loopback and not is_loopback(name):
            message = "this server answers to localhost only; start it with an API key to use other names."
            return ApiError(403, message, "host_not_allowed")
        return None


def _same(given: str, expected: str) -> bool:
    """Whether the texts are equal, in a time that tells nothing about where they differ or how long they are."""
    digests = (hashlib.sha256(text.encode()).digest() for text in (given, expected))
    return hmac.compare_digest(*digests)
