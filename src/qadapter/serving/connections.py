"""A connection that sends no whole request, or reads no answer, is closed: it would hold one of the process's files."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0


class TimedProtocol(H11Protocol):
    """HTTP whose connections close where a request's head takes longer than HEAD_SECONDS to arrive.

    uvicorn has a limit for the time between two requests only; the body's is in body.py. A request's state holds
    `abort_connection`, for a client that does not read: an orderly end would wait for it.
    """

    _deadline: asyncio.TimerHandle | None = None

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], *others: Any, **options: Any) -> None:
        super().__init__(config, server_state, app_state | {"abort_connection": self._abort}, *others, **options)

    def _abort(self) -> None:
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The time begins with the connection."""
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        """Its first bytes begin the time of each later head; the end of the head ends it."""
        super().data_received(data)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """No time is left running."""
        self._stop()
        super().connection_lost(exc)

    def _time_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
