"""The application: routes, and what stands behind them."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from qadapter.modeling import QAdapterForCausalLM
from qadapter.serving.admission import Admission
from qadapter.serving.answers import response_shape
from qadapter.serving.api_errors import ApiError
from qadapter.serving.body import json_object
from qadapter.serving.catalogue import Catalogue
from qadapter.serving.decoder import Decoder
from qadapter.serving.engine import Engine
from qadapter.serving.exchange import CLIENT_GONE, ClientGone, EventStream, Exchange
from qadapter.serving.jobs import Job
from qadapter.serving.metrics import Metrics
from qadapter.serving.middleware import Gate, RequestRecord, error_response, note
from qadapter.serving.schema import ChatRequest, CompletionRequest, GenerationRequest, parse
from qadapter.serving.settings import ServerSettings


class Service:
    """A loaded policy with all that answers requests for it.

    Args:
        model: the policy, with every adapter that is served.
        tokenizer: of its base.
        models: {served name: {adapter of `model`: weight}}.
        settings: limits.
    """

    def __init__(
        self,
        model: QAdapterForCausalLM,
        tokenizer: Any,
        models: Mapping[str, Mapping[str, float]],
        settings: ServerSettings,
    ) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.catalogue = Catalogue(models, model.trained_coefficients(), model.interpolation)
        self.admission = Admission(model, tokenizer, self.catalogue, settings)
        self.engine = Engine(Decoder(model), settings, self.metrics)
        self.started = int(time.time())
        # One thread: tokenizers are not for several, and a long prompt must not hold up the event loop.
        self.tokenising = ThreadPoolExecutor(1, thread_name_prefix="qadapter-prompts")
        self._tokenised = 0  # prompts that are in that thread or wait for it
        self._counting = threading.Lock()

    async def answer(self, request: Request, kind: type[GenerationRequest]) -> Response:
        """The response to a generation request.

        Raises:
            ApiError: whatever is wrong with it.
            ClientGone: the client closed the connection.
        """
        arrived = time.perf_counter()
        self.engine.require_places(1 + self._tokenised)
        wanted: GenerationRequest = parse(kind, await json_object(request, self.settings.max_body_bytes))
        exchange = Exchange(
            self.engine,
            self.settings.request_timeout,
            lambda: self.metrics.first_token_seconds.observe(time.perf_counter() - arrived),
        )
        exchange.submit(await self._jobs(request, wanted, exchange))
        jobs = exchange.jobs
        prompt_tokens = sum(len(job.prompt_ids) for job in jobs)
        self.metrics.prompt_tokens.labels(jobs[0].model).inc(prompt_tokens)
        shape = response_shape(wanted)
        note(request.scope, f"model={wanted.model} prompt_tokens={prompt_tokens}")
        if wanted.stream:
            return EventStream(exchange, shape)
        return JSONResponse(await exchange.whole(request, shape))

    async def _jobs(self, request: Request, wanted: GenerationRequest, exchange: Exchange) -> Sequence[Job]:
        """What the request's prompts come to; given up before its turn where the client or the time is gone."""
        prompts = len(wanted.prompt) if isinstance(wanted, CompletionRequest) else 1
        prompts = min(prompts, self.settings.max_queue)  # more are refused when they are counted there

        def count(change: int) -> None:
            with self._counting:
                self._tokenised += change

        self.engine.require_places(prompts + self._tokenised)  # others have come while the body was read
        count(prompts)
        work = self.tokenising.submit(self.admission.jobs, wanted, exchange.deliver)
        # Not when it is given up: until it is done it takes the thread.
        work.add_done_callback(lambda _: count(-prompts))
        return await exchange.ready(request, asyncio.wrap_future(work))

    def model_card(self, name: str) -> dict[str, Any]:
        """One entry of /v1/models."""
        return {"id": name, "object": "model", "created": self.started, "owned_by": "qadapter"}


def create_app(service: Service) -> FastAPI:
    """The ASGI application; its lifespan starts and stops the engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop)
            service.tokenising.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="qadapter", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan, redirect_slashes=False
    )
    app.add_middleware(Gate, settings=service.settings)
    app.add_middleware(RequestRecord, metrics=service.metrics)  # the last one added is the outermost
    _add_error_handlers(app)

    @app.post(ChatRequest.path)
    async def chat(request: Request) -> Response:
        return await service.answer(request, ChatRequest)

    @app.post(CompletionRequest.path)
    async def complete(request: Request) -> Response:
        return await service.answer(request, CompletionRequest)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card(name) for name in service.catalogue.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.catalogue.named(name)
        return service.model_card(name)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        healthy = service.engine.healthy
        return JSONResponse({"status": "ok" if healthy else "failing"}, 200 if healthy else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(ClientDisconnect)  # before the body was there
    @app.exception_handler(ClientGone)
    async def give_up(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            message, code = "there is nothing at this path; the API is under /v1.", "not_found"
        else:
            message, code = f"{error.detail}.", "method_not_allowed" if error.status_code == 405 else "invalid_request"
        return error_response(ApiError(error.status_code, message, code, headers=error.headers))
