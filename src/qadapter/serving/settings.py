"""What the person who starts a server decides."""

import ipaddress
from dataclasses import dataclass

from qadapter.errors import ConfigError


@dataclass(frozen=True)
class ServerSettings:
    """Address and limits of a server.

    Args:
        host: address to listen on; only this machine by default.
        port: 0 takes a free one.
        api_key: what clients must send as `Authorization: Bearer ...`; None asks for nothing.
        max_context: tokens of prompt and answer together; None is the base model's own limit.
        max_batch: choices decoded at once.
        max_queue: prompts that may wait for a place in the batch; more are refused with 429.
        max_n: choices of one prompt.
        max_body_bytes: size of a request's body.
        prefill_tokens: prompt tokens processed between two decoding steps, which bounds how long a new prompt
            holds up the answers under way.
        request_timeout: seconds until an answer must be complete.
        shutdown_timeout: seconds that answers under way get when the server is told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_context: int | None = None
    max_batch: int = 16
    max_queue: int = 64
    max_n: int = 8
    max_body_bytes: int = 2**20
    prefill_tokens: int = 512
    request_timeout: float = 300.0
    shutdown_timeout: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port = {self.port}: must lie in 0 ... 65535 (0 takes a free one).")
        if self.api_key is not None and (not self.api_key.strip() or not self.api_key.isascii()):
            raise ConfigError("the API key is blank or has characters outside ASCII: no client could send it.")
        if self.api_key is not None and self.api_key != self.api_key.strip():
            raise ConfigError("the API key has blanks around it, such as a line's end, which no client could send.")
        if self.max_context is not None and self.max_context < 2:
            raise ConfigError(f"max_context = {self.max_context}: must be at least 2 (one token in, one out).")
        for name in ("max_batch", "max_queue", "max_n", "max_body_bytes", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least 1.")
        if self.max_n > self.max_batch:
            raise ConfigError(
                f"max_n = {self.max_n}: must not exceed max_batch = {self.max_batch}, because the choices of a prompt "
                "are decoded together."
            )
        for name in ("request_timeout", "shutdown_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} = {getattr(self, name)}: must be a positive number of seconds.")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(name: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    if name.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
