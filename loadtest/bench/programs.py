"""Compiles the C parts of the bench, once per version of their source."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = ("-O2", "-std=gnu11")


class CannotCompile(Exception):
    """There is no C compiler, or it refused; the text says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """Paths of the compiled load generator and backend."""

    load: Path
    backend: Path


def compile_all() -> Programs:
    """Both programs, from the cache when their source has not changed; raises CannotCompile."""
    folder = _cache_folder() / _version()
    folder.mkdir(parents=True, exist_ok=True)
    return Programs(load=_compiled("load", folder), backend=_compiled("backend", folder))


def _version() -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gpu-balancer" / "bench"


def _compiled(name: str, folder: Path) -> Path:
    target = folder / name
    if target.exists():
        return target
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise CannotCompile("no C compiler (cc, gcc or clang) on PATH")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed into place: two benches may start at once
        made = Path(scratch) / name
        words = [compiler, *FLAGS, "-o", str(made), str(SOURCES / f"{name}.c"), "-lm"]
        result = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        if result.returncode:
            raise CannotCompile(f"{compiler}: {result.stderr[-500:]}")
        made.rename(target)
    return target
