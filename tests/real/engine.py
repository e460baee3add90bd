"""llama-server from a Debian suite that has it, unpacked beside the project and run on the CPU.

Nothing is installed: the packages, with the C library they want, are unpacked under `.parts/` and run from there by
their own loader. What this machine lacks for that is said by `Unavailable`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from tests.real import tiny_model
from tests.redis_server import free_port

PARTS = Path(__file__).parents[2] / ".parts"
PACKAGE, SUITE = "llama.cpp-tools", "forky"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT_FOLDER = Path("/etc/apt")
# Fetching takes 5 s, and must not hang a test run where the mirror does not answer.
FETCH_WITHIN_S = 180.0
START_WITHIN_S = 30.0
MODEL = "tiny"
# It gives each connection a thread, idle ones too. Left to itself it makes too few at a burst: new connections then
# wait 5 s, until kept-alive ones are given up.
HTTP_THREADS = "64"


class Unavailable(Exception):
    """There can be no engine here; the text says why."""


def available() -> Path:
    """The folder with the unpacked engine and its model, made at the first call. Raises Unavailable."""
    folder = PARTS / f"llama-{SUITE}"
    PARTS.mkdir(exist_ok=True)
    with (PARTS / "llama.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be at it
        if not folder.is_dir():
            _make(folder)
    return folder


def name() -> str:
    """What it is, for people; empty before it was unpacked."""
    with contextlib.suppress(OSError):
        return (PARTS / f"llama-{SUITE}" / "name").read_text(encoding="utf-8")
    return ""


def _make(folder: Path) -> None:
    found = mirror()
    with tempfile.TemporaryDirectory(dir=PARTS) as there:
        work = Path(there)
        packages = fetch(found, work, PACKAGE, SUITE)
        new = work / "new"
        (new / "root").mkdir(parents=True)
        for package in packages:
            run("dpkg", "-x", str(package), str(new / "root"))
        tiny_model.write(new / "model.gguf")
        version = next(re.split("_", package.name)[1] for package in packages if package.name.startswith(PACKAGE))
        (new / "name").write_text(f"{PACKAGE} {version.replace('%3a', ':')} from {SUITE}", encoding="utf-8")
        new.rename(folder)


def mirror() -> str:
    """Where this machine gets its Debian packages from."""
    if platform.machine() != "x86_64":
        raise Unavailable(f"unpacked only for x86_64, not for {platform.machine()}")
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise Unavailable(f"no {program}")
    if not KEYRING.is_file():
        raise Unavailable(f"no {KEYRING}")
    for uri in _uris():
        if uri.rstrip("/").endswith("/debian"):
            return uri
    raise Unavailable(f"no Debian mirror in {APT_FOLDER}")


def _uris() -> Iterator[str]:
    """The addresses in apt's sources, in both of its formats."""
    for file in sorted((APT_FOLDER / "sources.list.d").glob("*.sources")):
        yield from re.findall(r"^URIs:\s*(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    for file in (APT_FOLDER / "sources.list", *sorted((APT_FOLDER / "sources.list.d").glob("*.list"))):
        if file.is_file():
            yield from re.findall(r"^deb\s+(?:\[[^]]*\]\s+)?(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE)


def fetch(mirror: str, work: Path, package: str, suite: str) -> list[Path]:
    """A package of a suite and all that it needs, C library included, as if nothing were installed."""
    for name in ("lists/partial", "archives/partial"):
        (work / name).mkdir(parents=True)
    (work / "status").touch()
    (work / "sources").write_text(f"deb [signed-by={KEYRING}] {mirror} {suite} main\n", encoding="utf-8")
    options = {
        "Dir::Etc::sourcelist": work / "sources",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::Lists": work / "lists",
        "Dir::State::status": work / "status",
        "Dir::Cache::archives": work / "archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Debug::NoLocking": "1",
        "APT::Sandbox::User": "root",
        "Acquire::http::Timeout": "15",
    }
    apt = ("apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items()))
    run(*apt, "update")
    run(*apt, "-y", "--no-install-recommends", "--download-only", "install", package)
    return sorted((work / "archives").glob("*.deb"))


def run(*words: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=FETCH_WITHIN_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{words[0]} took longer than {FETCH_WITHIN_S:.0f} s") from error
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise Unavailable(f"{words[0]} {words[-1]} failed: {said}")


class Engine:
    """A llama-server process with the tiny model. Its answers at temperature 0 are the same every time."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.url = f"http://127.0.0.1:{port}"

    def __repr__(self) -> str:
        return f"<Engine {self.url} pid={self._process.pid}>"

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does; harmless when it is down."""
        if self._process.returncode is None:
            self._process.kill()

    async def ended(self) -> None:
        """Until the process is gone."""
        await self._process.wait()

    async def answers(self) -> None:
        """Until its model is loaded. Raises AssertionError when it ends or takes too long."""
        ending = asyncio.ensure_future(self._process.wait())
        async with asyncio.timeout(START_WITHIN_S), aiohttp.ClientSession() as session:
            while not await self._is_well(session):
                await asyncio.wait({ending}, timeout=0.02)  # it does not tell when it is ready: ask again
                assert not ending.done(), f"llama-server ended with {ending.result()}"

    async def _is_well(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(f"{self.url}/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False


@asynccontextmanager
async def engine(*, slots: int = 4) -> AsyncIterator[Engine]:
    """A running engine that works on `slots` requests at once. Raises Unavailable."""
    folder = await asyncio.to_thread(available)
    root, port = folder / "root", free_port()
    libraries = root / "usr/lib/x86_64-linux-gnu"
    words = [root / "usr/lib64/ld-linux-x86-64.so.2", "--library-path", f"{libraries}:{libraries}/llama"]
    words += [root / "usr/bin/llama-server", "--model", folder / "model.gguf", "--alias", MODEL]
    words += ["--host", "127.0.0.1", "--port", str(port), "--metrics", "--slots", "--threads", "1"]
    words += ["--threads-http", HTTP_THREADS, "--parallel", str(slots), "--ctx-size", str(slots * tiny_model.CONTEXT)]
    process = await asyncio.create_subprocess_exec(
        *words,
        env={**os.environ, "GGML_BACKEND_PATH": str(libraries / "ggml/backends0" / _backend())},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    running = Engine(process, port)
    try:
        await running.answers()
        yield running
    finally:
        running.kill()
        await running.ended()


def _backend() -> str:
    """The arithmetic that this processor can do."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    has_avx2 = re.search(r"^flags.*\bavx2\b", flags, re.MULTILINE)
    return f"libggml-cpu-{'haswell' if has_avx2 else 'x64'}.so"
