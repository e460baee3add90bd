"""Whose processes listen on an engine's port: on a made-up /proc, and on the real one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from node_agent.processes import find, is_local

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def made_up(proc: Path, *, listening: dict[int, int], processes: dict[int, tuple[int, list[int]]]) -> Path:
    """Write a /proc: `listening` is port -> inode, `processes` is pid -> (parent, inodes it holds)."""
    (proc / "net").mkdir(parents=True)
    (proc / "sys/kernel/random").mkdir(parents=True)
    (proc / "sys/kernel/random/boot_id").write_text("b00t\n")
    rows = [f" 0: 0100007F:{port:04X} 00000000:0000 0A 0:0 00:0 0 0 0 {inode} 1\n" for port, inode in listening.items()]
    rows.append(" 9: 0100007F:1F40 0100007F:C000 01 0:0 00:0 0 0 0 777 1\n")  # a connection, nobody who listens
    (proc / "net/tcp").write_text(HEADER + "".join(rows))
    for pid, (parent, inodes) in processes.items():
        (proc / str(pid) / "fd").mkdir(parents=True)
        fields = ["S", str(parent), *["0"] * 17, str(pid * 100)]
        (proc / str(pid) / "stat").write_text(f"{pid} (engine (x) y) {' '.join(fields)}\n")
        for number, inode in enumerate(inodes):
            (proc / str(pid) / "fd" / str(number)).symlink_to(f"socket:[{inode}]")
    return proc


def test_engine_is_who_listens_and_its_children(tmp_path: Path) -> None:
    proc = made_up(
        tmp_path,
        listening={8000: 555, 9000: 556},
        processes={10: (1, [555, 999]), 11: (10, []), 12: (11, []), 20: (1, [556]), 30: (1, [777])},
    )
    found = find("http://127.0.0.1:8000", proc)
    assert found is not None
    assert found.pids == {10, 11, 12}
    assert found.identity == "10-1000-b00t"


def test_nobody_listening_is_none(tmp_path: Path) -> None:
    assert find("http://127.0.0.1:8000", made_up(tmp_path, listening={}, processes={10: (1, [777])})) is None


def test_listener_that_cannot_be_seen_is_none(tmp_path: Path) -> None:
    assert find("http://127.0.0.1:8000", made_up(tmp_path, listening={8000: 555}, processes={10: (1, [])})) is None


def test_engine_of_another_machine_is_none(tmp_path: Path) -> None:
    proc = made_up(tmp_path, listening={8000: 555}, processes={10: (1, [555])})
    assert find("http://192.0.2.7:8000", proc) is None
    assert find("http://gpu-7.example.com:8000", proc) is None


def test_machine_without_proc_is_none(tmp_path: Path) -> None:
    assert find("http://127.0.0.1:8000", tmp_path / "nothing") is None


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", socket.gethostname()])
def test_names_of_this_machine(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize("host", ["192.0.2.1", "example.com", "", "2001:db8::1"])
def test_names_of_other_machines(host: str) -> None:
    assert not is_local(host)


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="no /proc on this machine")
def test_this_very_process_is_found_with_its_child() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child,
    ):
        found = find(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert child.stdin is not None
        child.stdin.close()
    assert found is not None
    assert {os.getpid(), child.pid} <= found.pids
    again = found.identity
    assert again.startswith(f"{os.getpid()}-")
