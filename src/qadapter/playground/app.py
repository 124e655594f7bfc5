"""The playground's HTTP side: one page, one description of the policy, one streaming answer at a time."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from types import MappingProxyType
from typing import Annotated, Any, Literal

import anyio
import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from qadapter.detokenising import Detokeniser
from qadapter.errors import ConfigError, QAdapterError
from qadapter.generation import Sampling, encode, stream_text
from qadapter.inspection import inspect_tokens
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.bases import context_limit
from qadapter.modeling.conditions import OffInside
from qadapter.modeling.mixing import refuse_changing

MAX_PROMPT_CHARACTERS = 20_000
MAX_NEW_TOKENS = 1024
STATIC = {"": "page.html", "page.js": "page.js", "page.css": "page.css"}
TYPES = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
# Only this machine's own names: a page of another site cannot reach the model by renaming itself.
LOCAL_HOSTS = ["localhost", "127.0.0.1"]
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}

MAX_STRENGTH = 10.0
Dial = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]


class AnswerRequest(BaseModel):
    """What the page asks for: one answer at one setting of the dial."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)
    strength: Dial = 1.0
    weights: dict[str, Dial] | None = None
    max_kl: float | None = Field(default=None, ge=0)
    min_kl: float | None = Field(default=None, ge=0)
    decay: float = Field(default=1.0, gt=0, le=1)
    off_inside: bool = False
    interpolation: Literal["logits", "weights"] = "logits"
    max_new_tokens: int = Field(default=128, ge=1, le=MAX_NEW_TOKENS)
    temperature: float = Field(default=0.0, ge=0, le=5)
    seed: int = Field(default=0, ge=0, lt=2**63)

    def settings(self, tokenizer: Any) -> dict[str, Any]:
        """The policy's settings, as of `generate`."""
        return {
            "strength": OffInside(tokenizer, self.strength) if self.off_inside else self.strength,
            "adapter_weights": self.weights,
            "max_kl": self.max_kl,
            "min_kl": self.min_kl,
            "decay": self.decay,
            "interpolation": self.interpolation,
        }


def create_app(
    model: QAdapterForCausalLM,
    tokenizer: Any,
    title: str,
    strength: float = 1.0,
    labels: Mapping[str, str] = MappingProxyType({}),
) -> FastAPI:
    """The application; one answer is generated at a time, and a reader who leaves ends theirs.

    Args:
        strength: where the page's slider stands at first.
        labels: what the sliders of adapters are called where it is not their names.
    """
    app = FastAPI(title="qadapter playground", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS)
    # Waiting for it must not hold a thread: the answer under way needs one for each of its pieces.
    busy = asyncio.Lock()

    @app.exception_handler(RequestValidationError)
    async def refuse(_: Request, error: RequestValidationError) -> Response:
        # FastAPI's own answer repeats the input, and JSON has neither NaN nor half characters.
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, status_code=422)

    @app.get("/api/policy")
    def policy() -> dict[str, Any]:
        return {
            "title": title,
            "base": model.base_source.name,
            "adapters": dict(model.adapter_weights),
            "labels": dict(labels),
            "strength": strength,
            "interpolations": interpolations_of(model),
            "max_new_tokens": MAX_NEW_TOKENS,
        }

    @app.post("/api/answer")
    async def answer(body: AnswerRequest, request: Request) -> Response:
        try:
            check(model, tokenizer, body)
        except QAdapterError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        events = until_gone(answer_events(model, tokenizer, body), request, busy)
        return StreamingResponse(events, media_type="application/x-ndjson", headers=HEADERS)

    @app.get("/")
    @app.get("/{name}")
    def static(name: str = "") -> Response:
        file = STATIC.get(name)
        if file is None:
            return JSONResponse({"error": f"there is no page {name!r}"}, status_code=404)
        text = files("qadapter.playground").joinpath("static", file).read_text(encoding="utf-8")
        return Response(text, media_type=TYPES[file.rsplit(".", 1)[1]], headers=HEADERS)

    return app


def interpolations_of(model: QAdapterForCausalLM) -> list[str]:
    """What the strength can be of, the default first."""
    try:
        model.checked_interpolation("weights")
    except ConfigError:
        return ["logits"]
    return ["logits", "weights"]


def check(model: QAdapterForCausalLM, tokenizer: Any, body: AnswerRequest) -> None:
    """Raise QAdapterError for a dial that cannot be, and a prompt that is refused or leaves no room for an answer."""
    model.stream_coefficients(body.strength, body.weights, body.interpolation)
    if body.interpolation == "weights":
        changing = {"a decay": body.decay < 1, "min_kl": body.min_kl, "off_inside": body.off_inside}
        refuse_changing(next((what for what, wanted in changing.items() if wanted), ""))
    length = encode(tokenizer, [body.prompt])["input_ids"].shape[1]
    limit = context_limit(model.config)
    if limit is not None and length + body.max_new_tokens > limit:
        raise ConfigError(
            f"the prompt has {length} tokens; with {body.max_new_tokens} new ones that passes the model's {limit}."
        )


def answer_events(
    model: QAdapterForCausalLM, tokenizer: Any, body: AnswerRequest
) -> Generator[dict[str, Any], None, None]:
    """{"text": piece} as they come, then {"tokens": views}."""
    finished: list[tuple[torch.Tensor, int]] = []
    sampling = Sampling(body.max_new_tokens, body.temperature, seed=body.seed)
    settings = body.settings(tokenizer)
    pieces = stream_text(
        model, tokenizer, body.prompt, sampling, on_end=lambda ids, start: finished.append((ids, start)), **settings
    )
    try:
        for piece in pieces:
            yield {"text": piece}
    finally:
        pieces.close()
    ids, start = finished[0]
    views = inspect_tokens(model, tokenizer, ids, start, settings)
    texts = added_texts(tokenizer, ids[0, start:].tolist())
    yield {"tokens": [asdict(view) | {"text": text} for view, text in zip(views, texts, strict=True)]}


def added_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token of an answer adds to its text: nothing while a character is not complete; a special one its name.

    A token's own text has no halves of characters, and with SentencePiece no space before it.
    """
    detokeniser, special = Detokeniser(tokenizer), set(tokenizer.all_special_ids)
    texts = [tokenizer.decode([token]) if token in special else detokeniser.push(token) for token in ids]
    last = max((place for place, token in enumerate(ids) if token not in special), default=None)
    if last is not None:
        texts[last] += detokeniser.flush()  # of a token that also began a character which never came
    return texts


async def until_gone(
    events: Generator[dict[str, Any], None, None], request: Request, busy: asyncio.Lock
) -> AsyncIterator[str]:
    """The events as lines of JSON, while `busy` is held; closes their source when the reader has gone."""
    end = object()
    following: Callable[[], Any] = lambda: next(events, end)  # noqa: E731
    async with busy:
        try:
            while not await request.is_disconnected():
                event = await anyio.to_thread.run_sync(following)
                if event is end:
                    return
                yield json.dumps(event) + "\n"
        except Exception as error:
            yield json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n"
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(events.close)
