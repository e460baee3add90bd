"""Listening sockets, made before anything is announced, so that a port in use ends the start with one clear line."""

from __future__ import annotations

import errno
import socket

from balancer.settings import split_address


def listen(name: str, address: str, *, backlog: int) -> socket.socket:
    """A non-blocking listening socket on HOST:PORT. Raises OSError that says which setting cannot be had, and why."""
    try:
        host, port = split_address(address)
    except ValueError as error:
        raise OSError(errno.EINVAL, f"{name}: {error}") from error
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as error:
        why = "is in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))
        raise OSError(error.errno, f"{name}: {address}: {why}") from error
    made.setblocking(False)
    return made


def address_of(listening: socket.socket) -> str:
    """`host:port` as listened on."""
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
