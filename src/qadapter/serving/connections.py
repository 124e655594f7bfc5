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

    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

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

    def pause_writing(self) -> None:
        """The client does not keep up: from now on it has its time."""
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self._abort)

    def resume_writing(self) -> None:
        """It does again."""
        self._stop_unread()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """No time is left running."""
        self._stop()
        self._stop_unread()
        super().connection_lost(exc)

    def _should_upgrade(self) -> bool:
        """Never: nothing here speaks WebSocket, and uvicorn would tell the operator to install something."""
        return False

    def _time_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._abort)

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
