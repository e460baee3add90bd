"""The proxies under test: how each is set up in front of the backend. A third one is a class and a row's cell more."""

import contextlib
import getpass
import grp
import hashlib
import http.client
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from loadtest.bench import processes
from loadtest.bench.rows import Setup

MODEL = "bench-model"
KEY = "sk-bench-0123456789abcdef0123456789abcdef"
NEVER_REACHED = 1_000_000_000  # limits that are checked on every request and never refuse one
START_WITHIN_S = 60.0
NGINX_CONF = Path(__file__).with_name("nginx.conf")
NGINX_PLACES = "/usr/sbin:/usr/local/sbin:/usr/local/bin:/opt/homebrew/bin"


class ProxyFailed(Exception):
    """The proxy did not start or did not answer; the text carries the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one start of a proxy keeps its files, listens, and finds what it talks to."""

    folder: Path
    port: int
    node_ports: Sequence[int]
    redis_port: int | None = None


class Proxy(Protocol):
    """One proxy that can be measured."""

    name: str

    def missing(self) -> str | None:
        """Why it cannot be measured on this machine, or None."""
        ...

    def command(self, place: Place, setup: Setup) -> list[str]:
        """Write its configuration into `place.folder`; return the words that start it in the foreground."""
        ...


class Nginx:
    """nginx with `nginx.conf` of this folder."""

    name = "nginx"

    def __init__(self) -> None:
        self.path = shutil.which("nginx") or shutil.which("nginx", path=NGINX_PLACES)

    def missing(self) -> str | None:
        return None if self.path else "nginx is not installed (Debian: apt-get install nginx-light)"

    def command(self, place: Place, setup: Setup) -> list[str]:
        """`setup` changes nothing here but the number of nodes, already in `place`."""
        user = f"user {getpass.getuser()} {grp.getgrgid(os.getgid()).gr_name};" if os.getuid() == 0 else ""
        values = {
            "USER": user,
            "FILES": str(processes.open_files_limit()),
            "PORT": str(place.port),
            "SERVERS": "\n".join(f"        server 127.0.0.1:{port};" for port in place.node_ports),
        }
        text = NGINX_CONF.read_text()
        for name, value in values.items():
            text = text.replace(f"@{name}@", value)
        (place.folder / "nginx.conf").write_text(text)
        return [str(self.path), "-p", f"{place.folder}/", "-c", "nginx.conf", "-e", "error.log"]


class Balancer:
    """`gpu-balancer serve` with a settings file of its own; `command_line` replaces the installed program."""

    name = "balancer"

    def __init__(self, command_line: str | None = None) -> None:
        self.words = shlex.split(command_line) if command_line else [sys.executable, "-m", "balancer"]
        self._own = command_line is None

    def missing(self) -> str | None:
        if self._own:
            package = importlib.util.find_spec("balancer")
            there = package and importlib.util.find_spec("balancer.__main__")
            return None if there else "the package balancer, or its __main__.py, is not there"
        return None if shutil.which(self.words[0]) else f"{self.words[0]} is not on PATH"

    def command(self, place: Place, setup: Setup) -> list[str]:
        path = place.folder / "balancer.yaml"
        path.write_text(yaml.safe_dump(self.settings(place, setup), sort_keys=False))
        return [*self.words, "serve", "--config", str(path)]

    def settings(self, place: Place, setup: Setup) -> dict[str, Any]:
        """Defaults, but for what a measurement needs; `models` are named, so nothing has to be discovered."""
        made: dict[str, Any] = {
            "listen": f"127.0.0.1:{place.port}",
            "ops_listen": f"127.0.0.1:{processes.free_port()}",
            "nodes": [
                {"url": f"http://127.0.0.1:{port}", "id": f"node-{number}", "models": [MODEL]}
                for number, port in enumerate(place.node_ports)
            ],
            "cache": {"enabled": True, "hits_per_second": NEVER_REACHED},
            "log": {"level": "info", "format": "json"},
        }
        if setup.keys:
            key = {"tenant": "bench", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}
            limits = {"requests_per_minute": NEVER_REACHED, "burst": NEVER_REACHED, "tokens_per_minute": NEVER_REACHED}
            made["auth"] = {"keys": [key | limits]}
        if setup.redis:
            made["redis"] = {"url": f"redis://127.0.0.1:{place.redis_port}/0"}
            made["cache"]["memory_bytes"] = 0
        if setup.patient:
            made["timeouts"] = {"idle_s": 600, "stall_s": 600}
            made["upstream"] = {"max_connections_per_node": 16384}
        return made


@contextlib.contextmanager
def started(proxy: Proxy, place: Place, setup: Setup, core: int) -> Iterator[tuple[int, float]]:
    """The proxy, answering; yields its process id and the seconds from spawn to its first good answer."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BALANCER_")}
    words = proxy.command(place, setup)
    with open(place.folder / "proxy.log", "wb") as log:
        begun = time.perf_counter()
        with processes.running(words, core=core, output=log, environment=environment) as process:
            _first_answer(process, place, setup, begun + START_WITHIN_S)
            yield process.pid, time.perf_counter() - begun


def _first_answer(process: subprocess.Popen[bytes], place: Place, setup: Setup, deadline: float) -> None:
    answer = "nothing"
    while time.perf_counter() < deadline:
        if process.poll() is not None:
            raise ProxyFailed(f"ended with {process.returncode}: {log_end(place)}")
        try:
            answer = _ask(place.port, KEY if setup.keys else None)
        except (OSError, http.client.HTTPException) as error:
            answer = str(error) or type(error).__name__
        if answer == "200":
            return
        time.sleep(0.002)
    raise ProxyFailed(f"no good answer in {START_WITHIN_S:.0f} s ({answer}): {log_end(place)}")


def _ask(port: int, key: str | None) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Are you there?"}], "temperature": 0}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read(300).decode(errors="replace")
        return "200" if response.status == 200 else f"{response.status} {text}"
    finally:
        connection.close()


def log_end(place: Place) -> str:
    """The last words of the proxy's logs."""
    logs = [place.folder / name for name in ("proxy.log", "error.log")]
    return (
        " ".join(log.read_text(errors="replace")[-800:].strip() for log in logs if log.exists()) or "its log is empty"
    )
