"""Processes of the bench: started on a core of their own, ended by their id, and read from /proc."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

STOP_AFTER_S = 5.0  # from SIGTERM to SIGKILL; whatever is still open then is the bench's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """The proxy's core, and the one of load and backend."""

    proxy: int
    load: int


def choose_cores(wanted: str | None) -> Cores:
    """The two cores of `wanted` ("PROXY,LOAD"), else the first two this process may use; ValueError without two."""
    allowed = sorted(os.sched_getaffinity(0))
    chosen = [int(core) for core in wanted.split(",")] if wanted else allowed[:2]
    if len(chosen) != 2 or chosen[0] == chosen[1] or not set(chosen) <= set(allowed):
        raise ValueError(f"two different cores are needed, out of {allowed}")
    return Cores(proxy=chosen[0], load=chosen[1])


def stay_on(core: int) -> None:
    """Keep this process, and what it starts from now on, on one core, with as many open files as allowed."""
    os.sched_setaffinity(0, {core})
    most = open_files_limit()
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextlib.contextmanager
def running(
    words: Sequence[str],
    *,
    core: int | None = None,
    output: int | IO[bytes] = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, ended with everything it started when the block is left."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})  # inherited: no code runs between fork and exec
    errors = subprocess.DEVNULL if output == subprocess.DEVNULL else None if output == subprocess.PIPE else output
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=output, stderr=errors, start_new_session=True, env=environment
        )
    finally:
        os.sched_setaffinity(0, before)
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.terminate()
        process.wait(STOP_AFTER_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_AFTER_S)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else's processes are in it
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()


def open_files_limit() -> int:
    """How many files one process of this bench may open."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return most if most != resource.RLIM_INFINITY else 1 << 20


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def family(pid: int) -> list[int]:
    """`pid` and every process below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            after_name = (entry / "stat").read_text().rpartition(")")[2]
            children.setdefault(int(after_name.split()[1]), []).append(int(entry.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def rss_kib(pids: Sequence[int]) -> int:
    """Resident memory of these processes together, in KiB."""
    return sum(_rss_kib(pid) for pid in pids)


def _rss_kib(pid: int) -> int:
    for name, field in (("smaps_rollup", "Rss:"), ("status", "VmRSS:")):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
                if line.startswith(field):
                    return int(line.split()[1])
    raise OSError(f"the memory of process {pid} cannot be read")
