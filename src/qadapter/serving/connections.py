"""A connection that sends no whole request, or reads no answer, is closed: it would hold one of the process's files."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0
UNREAD_SECONDS = 60.0


class TimedProtocol(H11Protocol):
    """HTTP whose connections end where a head takes longer than HEAD_SECONDS to arrive, or nothing of what is ready to
    be read is read for UNREAD_SECONDS.

    uvicorn has a limit for the time between two requests only; the body's is in body.py. They are aborted, since an
    orderly end would wait for the client; so can requests, whose state holds `abort_connection`.
    """

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], *others: Any, **options: Any) -> None:
        self._running: dict[str, asyncio.TimerHandle] = {}
        super().__init__(config, server_state, app_state | {"abort_connection": self._abort}, *others, **options)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """The time begins with the connection."""
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        """Its first bytes begin the time of each later head; the end of the head ends it."""
        super().data_received(data)
        self._time_head()

    def pause_writing(self) -> None:
        """The client does not keep up: from now on it has its time."""
        super().pause_writing()
        self._start("unread", UNREAD_SECONDS)

    def resume_writing(self) -> None:
        """It does again."""
        self._stop("unread")
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """No time is left running."""
        for what in ("head", "unread"):
            self._stop(what)
        super().connection_lost(exc)

    def _should_upgrade(self) -> bool:
        """Never: nothing here speaks WebSocket, and uvicorn would tell the operator to install something."""
        return False

    def _time_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop("head")
        else:
            self._start("head", HEAD_SECONDS)

    def _start(self, what: str, seconds: float) -> None:
        """Begin the time of something, unless it runs already."""
        if what not in self._running:
            self._running[what] = self.loop.call_later(seconds, self._abort)

    def _stop(self, what: str) -> None:
        if what in self._running:
            self._running.pop(what).cancel()

    def _abort(self) -> None:
        self.transport.abort()
