"""Which processes of this host are an engine: who listens on its port, and their children (Linux's /proc)."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

_LISTEN = "0A"
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProcesses:
    """The engine's processes, and a name that no other start of it will ever have."""

    pids: frozenset[int]
    identity: str


def find(url: str, proc: Path = Path("/proc")) -> EngineProcesses | None:
    """Find the processes behind a local URL; None if it is not local, or they cannot be seen from here.

    Reads files of every process of the host: call it from a thread, and not every second.
    """
    parts = urlsplit(url)
    if not is_local(parts.hostname or ""):
        return None
    inodes = _listening_inodes(parts.port or _DEFAULT_PORTS[parts.scheme], proc)
    listeners = _owners(inodes, proc) if inodes else set()
    if not listeners:
        return None
    return EngineProcesses(pids=_with_children(listeners, proc), identity=_identity(min(listeners), proc))


def is_local(host: str) -> bool:
    """True if a host name or address is surely this machine; never asks a name server."""
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if address.is_loopback:
        return True
    try:
        with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))  # only an address of this machine can be bound
    except OSError:
        return False
    return True


def _listening_inodes(port: int, proc: Path) -> set[str]:
    inodes: set[str] = set()
    for table in ("tcp", "tcp6"):
        for fields in map(str.split, _lines(proc / "net" / table)[1:]):
            if len(fields) > 9 and fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(fields[9])
    return inodes


def _owners(inodes: set[str], proc: Path) -> set[int]:
    sockets = {f"socket:[{inode}]" for inode in inodes}
    return {pid for pid in _pids(proc) if not sockets.isdisjoint(_links(proc / str(pid) / "fd"))}


def _with_children(roots: Iterable[int], proc: Path) -> frozenset[int]:
    children: dict[int, list[int]] = {}
    for pid in _pids(proc):
        if (stat := _stat(pid, proc)) is not None:
            children.setdefault(int(stat[1]), []).append(pid)
    found: set[int] = set()
    todo = list(roots)
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo.extend(children.get(pid, ()))
    return frozenset(found)


def _identity(pid: int, proc: Path) -> str:
    """Pid, start time within this boot of the machine, and that boot: pids are used again."""
    stat = _stat(pid, proc)
    boot = _lines(proc / "sys" / "kernel" / "random" / "boot_id")
    return f"{pid}-{stat[19] if stat else '?'}-{boot[0] if boot else '?'}"


def _stat(pid: int, proc: Path) -> list[str] | None:
    """The fields after the command name, which may hold blanks and parentheses: [state, parent, …, 19: start time]."""
    lines = _lines(proc / str(pid) / "stat")
    fields = lines[0].rpartition(")")[2].split() if lines else []
    return fields if len(fields) > 19 else None


def _pids(proc: Path) -> Iterator[int]:
    try:
        names = os.listdir(proc)
    except OSError:
        return
    yield from (int(name) for name in names if name.isdigit())


def _links(folder: Path) -> Iterator[str]:
    try:
        names = os.listdir(folder)
    except OSError:  # another user's process, or one that just ended
        return
    for name in names:
        try:
            yield os.readlink(folder / name)
        except OSError:
            continue


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
