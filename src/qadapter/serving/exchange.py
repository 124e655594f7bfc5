"""A request's way from the event loop to the engine's thread and back."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qadapter.serving.answers import Collected, ResponseShape, usage
from qadapter.serving.api_errors import ApiError
from qadapter.serving.engine import Engine
from qadapter.serving.jobs import Delta, Event, Failure, Job

Result = TypeVar("Result")
LAST_EVENT_SECONDS = 5.0  # after the deadline, for a client that reads slowly
CLIENT_GONE = 499  # nginx's status for it; nobody receives it, the access log shows it


class ClientGone(Exception):
    """Nobody waits for the response any more."""


class Exchange:
    """The events of one request's jobs.

    Args:
        engine: works on the jobs.
        seconds: until the last event must be there.
        on_first: called when the first token is there.
    """

    def __init__(self, engine: Engine, seconds: float, on_first: Callable[[], None]) -> None:
        self._engine, self._seconds, self._on_first = engine, seconds, on_first
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + seconds
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.jobs: Sequence[Job] = ()
        self.tokens = 0
        self.outcome: int | None = None  # of a stream that was sent to its end, which its status could not know

    def deliver(self, event: Event) -> None:
        """Hand an event over from the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    @property
    def last_call(self) -> float:
        """When a stream that its client does not read ends, by the loop's clock."""
        return self._deadline + LAST_EVENT_SECONDS

    async def ready(self, request: Request, work: Awaitable[list[Job]]) -> list[Job]:
        """The jobs that `work` makes of the request, which may have to wait for others' prompts.

        Raises:
            ApiError: what `work` raises, or the time is up (504).
            ClientGone: the client closed the connection.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                return await _unless(work, _disconnection(request))
        except TimeoutError:
            raise self._too_late() from None

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs, which report to `deliver`.

        Raises:
            ApiError: 429 or 503.
        """
        self.jobs = jobs
        self._engine.submit(jobs)

    def cancel(self) -> None:
        """Free the places of answers that are not complete."""
        self._engine.cancel(self.jobs)

    async def deltas(self) -> AsyncIterator[Delta]:
        """What the answers gain, until all have ended.

        Raises:
            ApiError: a job failed, or the time is up (504).
        """
        open_answers = sum(len(job.answers) for job in self.jobs)
        while open_answers:
            try:
                async with asyncio.timeout_at(self._deadline):
                    event = await self._events.get()
            except TimeoutError:
                raise self._too_late() from None
            if isinstance(event, Failure):
                raise event.error
            if self.tokens == 0 and event.tokens:
                self._on_first()
            self.tokens += event.tokens
            open_answers -= event.finish_reason is not None
            yield event

    def _too_late(self) -> ApiError:
        message = f"the answer was not complete within {self._seconds:g} s: ask for fewer tokens."
        return ApiError(504, message, "timeout")

    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        return usage(sum(len(job.prompt_ids) for job in self.jobs), self.tokens)

    async def whole(self, request: Request, shape: ResponseShape) -> dict[str, Any]:
        """The complete response; given up when the client goes away.

        Raises:
            ApiError: see `deltas`.
            ClientGone: the client closed the connection.
        """
        choices: dict[int, Collected] = {}

        async def collect() -> None:
            async for delta in self.deltas():
                choices.setdefault(delta.index, Collected()).add(delta)

        try:
            await _unless(collect(), _disconnection(request))
        finally:
            self.cancel()
        return shape.whole(choices, self.usage())

    async def events(self, shape: ResponseShape) -> AsyncIterator[str]:
        """The response as server-sent events; an error after the first of them is an event, too."""
        try:
            indices = [answer.index for job in self.jobs for answer in job.answers]
            for chunk in shape.first_chunks(indices):
                yield _event(chunk)
            async for delta in self.deltas():
                if delta.text or delta.reports or delta.finish_reason:
                    yield _event(shape.chunk([shape.delta(delta)]))
            if shape.wants_usage:
                yield _event(shape.last_chunk(self.usage()))
            self.outcome = 200
            yield "data: [DONE]\n\n"
        except ApiError as error:
            self.outcome = error.status
            yield _event(error.to_dict())


class EventStream(StreamingResponse):
    """An exchange's server-sent events; its places are freed however the stream ends."""

    def __init__(self, exchange: Exchange, shape: ResponseShape) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(exchange.events(shape), media_type="text/event-stream", headers=headers)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})
        state["outcome"] = 500  # what it stays where anything fails
        try:
            async with asyncio.timeout_at(self._exchange.last_call):
                await super().__call__(scope, receive, send)
            state["outcome"] = self._exchange.outcome or CLIENT_GONE
        except TimeoutError:  # the client does not read, so nothing can be sent
            state["outcome"] = 504
            state.get("abort_connection", lambda: None)()
            await asyncio.sleep(0)  # until the connection is lost: else uvicorn misses the end of the response
        finally:
            self._exchange.cancel()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


async def _disconnection(request: Request) -> None:
    """Return when the client is gone; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless(work: Awaitable[Result], end: Awaitable[None]) -> Result:
    """The result of `work`; raises ClientGone if `end` comes first."""
    wanted = asyncio.ensure_future(work)
    tasks: list[asyncio.Future[Any]] = [wanted, asyncio.ensure_future(end)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            raise ClientGone
        return wanted.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
