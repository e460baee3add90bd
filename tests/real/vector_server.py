"""A Redis with vector sets: the one on PATH if it has them, else Debian's, unpacked beside the project."""

from __future__ import annotations

import fcntl
import re
import subprocess
import tempfile
from pathlib import Path

from tests.real.engine import PARTS, Unavailable, fetch, mirror, run
from tests.redis_server import RedisServer, program

PACKAGE, SUITE = "redis-server", "trixie"
# Vector sets came with this version.
LEAST_VERSION = 8


class VectorServer(RedisServer):
    """A server of a test's own. Raises Unavailable where there can be none."""

    def __init__(self, *words: str) -> None:
        self._program = _command()
        super().__init__(*words)

    def command(self) -> list[str]:
        """What runs it."""
        return self._program


def _command() -> list[str]:
    installed = program()
    if installed is not None and _version([installed]) >= LEAST_VERSION:
        return [installed]
    root = available() / "root"
    libraries = root / "usr/lib/x86_64-linux-gnu"
    loader = str(root / "usr/lib64/ld-linux-x86-64.so.2")
    return [loader, "--library-path", str(libraries), str(root / "usr/bin/redis-server")]


def available() -> Path:
    """The folder with the unpacked server, made at the first call. Raises Unavailable."""
    folder = PARTS / f"redis-{SUITE}"
    PARTS.mkdir(exist_ok=True)
    with (PARTS / "redis.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be at it
        if not folder.is_dir():
            _make(folder)
    return folder


def _make(folder: Path) -> None:
    found = mirror()
    with tempfile.TemporaryDirectory(dir=PARTS) as there:
        work = Path(there)
        new = work / "new"
        (new / "root").mkdir(parents=True)
        for package in fetch(found, work, PACKAGE, SUITE):
            run("dpkg", "-x", str(package), str(new / "root"))
        new.rename(folder)


def name() -> str:
    """What it is, for people; empty where there is none."""
    try:
        command = _command()
    except Unavailable:
        return ""
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    return " ".join(re.findall(r"^(Redis) server v=(\S+)", said)[0])


def _version(command: list[str]) -> int:
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"Redis server v=(\d+)", said)
    return int(found[1]) if found else 0


__all__ = ["Unavailable", "VectorServer"]
