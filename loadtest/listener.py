"""A listening socket that can be closed and opened again on the same port, which stays ours in between."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

# Enough for any test's burst of connections to wait its turn in the kernel.
BACKLOG = 4096


class Listener:
    """Bound from `bind` to `release`; accepts connections from `open` to `close`, and refuses them otherwise."""

    def __init__(self, host: str, port: int, accept: Callable[[], asyncio.Protocol]) -> None:
        self.host = host
        self.port = port
        self._accept = accept
        self._holder: socket.socket | None = None
        self._server: asyncio.Server | None = None

    def __repr__(self) -> str:
        return f"<Listener :{self.port} {'open' if self.is_open else 'refusing'}>"

    @property
    def is_open(self) -> bool:
        return self._server is not None

    def bind(self) -> None:
        """Make the port ours; port 0 becomes a free one. Raises OSError."""
        self._holder = _bound(self.host, self.port)
        self.port = self._holder.getsockname()[1]

    async def open(self) -> None:
        """Accept connections from now on."""
        if self._server is None:
            loop = asyncio.get_running_loop()
            listening = _bound(self.host, self.port)
            self._server = await loop.create_server(self._accept, sock=listening, backlog=BACKLOG)

    def close(self) -> None:
        """Refuse connections from now on; those accepted stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def release(self) -> None:
        """Give the port up."""
        self.close()
        if self._holder is not None:
            self._holder.close()


def _bound(host: str, port: int) -> socket.socket:
    """A bound TCP socket. With SO_REUSEADDR a second one may be bound beside it as long as only one of them listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY on what is accepted; without, small writes wait 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setblocking(False)
    try:
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock
