"""The paths under /sim: faults, state and simulated GPUs of a fake node, for whoever runs it as a program."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import orjson

from loadtest.connection import Request
from loadtest.faults import fault_from_json
from loadtest.reply import Reply

if TYPE_CHECKING:
    from loadtest.fake_node import FakeNode

# How much of a recorded body is told.
BODY_CHARS = 4096


async def control(node: FakeNode, request: Request, reply: Reply) -> None:
    """Answer one request under /sim; 400 with the reason where it makes no sense."""
    try:
        value = request.json() if request.body else {}
        result = await _act(node, request.method, request.path, value)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        await reply.json({"error": str(error)}, status=400)
        return
    if result is None:
        await reply.json({"detail": "Not Found"}, status=404)
        return
    await reply.whole(orjson.dumps(result), headers=(("x-simulated", "1"),))
    if (request.method, request.path) == ("POST", "/sim/die"):
        await reply.connection.flush()
        node.die(value.get("back_after_s"))


async def _act(node: FakeNode, method: str, path: str, value: Any) -> object:
    """Do what is asked and say how things are then; None for what is unknown."""
    match method, path:
        case "GET", "/sim/faults":
            pass
        case "POST", "/sim/faults":
            for fault in [fault_from_json(one) for one in (value if isinstance(value, list) else [value])]:
                node.faults.add(fault)
        case "DELETE", "/sim/faults":
            node.faults.clear()
            node.faults.release()
        case "GET" | "POST" | "DELETE", "/sim/gpus":
            return _gpus(node, method, value)
        case "GET", "/sim/requests":
            return [_told(request) for request in node.requests]
        case "DELETE", "/sim/requests":
            node.forget()
            return state(node)
        case ("GET", "/sim/state") | ("POST", "/sim/die"):
            return state(node)
        case "POST", _:
            return await _command(node, path, value)
        case _:
            return None
    return [{"fault": rule.fault, "matched": rule.matched, "hits": rule.hits} for rule in node.faults.rules]


async def _command(node: FakeNode, path: str, value: Any) -> object:
    match path:
        case "/sim/node":
            node.speed = float(value.get("speed", node.speed))
            if "frozen" in value:
                (node.engine.freeze if value["frozen"] else node.engine.thaw)()
            node.deaf = bool(value.get("deaf", node.deaf))
        case "/sim/release":
            node.faults.release()
        case "/sim/refuse":
            node.refuse(value.get("back_after_s"))
        case "/sim/come_back":
            await node.come_back()
        case _:
            return None
    return state(node)


def state(node: FakeNode) -> dict[str, object]:
    """The node in figures."""
    return {
        "url": node.url,
        "listening": node.listening,
        "frozen": node.engine.frozen,
        "deaf": node.deaf,
        "speed": node.speed,
        "requests": len(node.requests),
        "checks": len(node.checks),
        "in_flight": node.in_flight,
        "cancelled": node.cancelled,
        "connections": len(node.connections),
        "connections_made": node.connections_made,
        "running": len(node.model.running),
        "waiting": len(node.model.waiting),
        "requests_by_path": Counter(request.path for request in node.requests),
        "requests_by_state": Counter(request.state for request in node.requests),
        "requests_by_status": Counter(str(request.status) for request in node.requests),
    }


def _gpus(node: FakeNode, method: str, value: Any) -> object:
    if method == "POST":
        fields = dict(value)
        node.gpus.patch(fields, fields.pop("index", None))
    elif method == "DELETE":
        node.gpus.clear()
    return node.gpus.read(node.model, node.clock.now())


def _told(request: Request) -> dict[str, object]:
    return {
        "index": request.index,
        "connection": request.connection,
        "method": request.method,
        "target": request.target,
        "headers": request.headers,
        "state": request.state,
        "status": request.status,
        "events_sent": request.events_sent,
        "body_bytes": len(request.body),
        "body": request.body[:BODY_CHARS].decode("utf-8", "replace"),
    }
