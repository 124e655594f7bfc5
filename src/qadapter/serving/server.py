"""Running the application with uvicorn, and stopping it without cutting answers off."""

import asyncio
import socket
from collections.abc import Callable

import uvicorn

from qadapter.errors import ConfigError
from qadapter.serving.app import Service, create_app
from qadapter.serving.connections import TimedProtocol

# What uvicorn waits beyond our own deadline, for the last bytes.
LAST_BYTES_SECONDS = 5


class GracefulServer(uvicorn.Server):
    """A server that, told to stop, takes no new connections, lets answers end within the deadline, and fails the rest.

    SIGTERM and SIGINT stop it when it runs in the main thread; elsewhere set `should_exit`.

    Args:
        service: what it serves.
        on_ready: called once connections are accepted.
    """

    def __init__(self, service: Service, on_ready: Callable[[], None] = lambda: None) -> None:
        self.service, self._on_ready = service, on_ready
        seconds = service.settings.shutdown_timeout
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=TimedProtocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=int(seconds) + LAST_BYTES_SECONDS,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for answers under way, at most as long as the settings say."""
        seconds = self.service.settings.shutdown_timeout
        deadline = asyncio.get_running_loop().call_later(seconds, self.service.engine.refuse_all)
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket bound to the address, ready to be served.

    Raises:
        ConfigError: the address is taken or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}. Choose another --port or --host.") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The address of a listening socket as clients write it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
