"""The subcommands of gpu-balancer. Imports are lazy: `serve` has to answer within a second of its start."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from balancer.settings import Settings


# The operations port answers at once, or not at all.
ASK_S = 10.0


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; the exit status is 0, 1 (could not start, or found nothing), or 2 (wrong usage or settings)."""
    args, rest = _parser().parse_known_args(argv)
    if rest and args.run is not _simulate:
        _parser().parse_args(argv)  # says what is wrong and exits
    args.rest = rest
    args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu-balancer", description="A health-aware load balancer for GPU inference.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the balancer")
    serve.add_argument("--config", metavar="FILE", help="settings file (YAML); default: $BALANCER_CONFIG")
    serve.add_argument("--listen", metavar="HOST:PORT", help="data port")
    serve.add_argument("--ops-listen", metavar="HOST:PORT", help="operations port")
    serve.add_argument(
        "--node",
        action="append",
        default=[],
        metavar="SPEC",
        help="URL[,id=NAME][,agent=URL][,weight=F][,model=NAME]…; once per node",
    )
    serve.add_argument("--redis-url", metavar="URL", help="shared cache and limits; default: in this process")
    serve.set_defaults(run=_serve)

    demo = commands.add_parser("demo", help="everything on this machine: simulated nodes, agents, balancer, traffic")
    demo.add_argument("--nodes", type=int, default=4, metavar="N", help="simulated GPU nodes (default 4)")
    demo.add_argument("--seconds", type=float, default=None, help="end by itself after this long")
    demo.set_defaults(run=_demo)

    check = commands.add_parser("check-config", help="validate a settings file and print what is in force")
    check.add_argument("file", metavar="FILE")
    check.set_defaults(run=_check_config)

    explain = commands.add_parser("explain", help="why a request went where it went")
    explain.add_argument("request_id", metavar="REQUEST_ID", help="the answer's X-Request-Id")
    _add_ops(explain)
    explain.add_argument("--json", action="store_true", help="print it as the admin API tells it")
    explain.set_defaults(run=_explain)

    simulate = commands.add_parser(
        "simulate", add_help=False, help="replay a trace on simulated engines: which policy, how many GPUs"
    )
    simulate.set_defaults(run=_simulate)

    warm_up = commands.add_parser("warmup", help="send the requests of a file, so that the cache has their answers")
    warm_up.add_argument("file", metavar="FILE", help="JSON lines: chat bodies, or objects with a path and a body")
    warm_up.add_argument("--url", default="http://127.0.0.1:8080", help="data port (default http://127.0.0.1:8080)")
    warm_up.add_argument("--concurrency", type=_count, default=5, metavar="N", help="requests at once (default 5)")
    warm_up.add_argument("--key-file", metavar="FILE", help="file with the API key to send them with")
    warm_up.set_defaults(run=_warm_up)

    cache = commands.add_parser("cache", help="look into a balancer's cache").add_subparsers(required=True)
    top = cache.add_parser("top", help="the answers that were asked for most")
    top.add_argument("--count", type=_count, default=20, metavar="N", help="how many (default 20)")
    top.add_argument("--export", metavar="FILE", help="write their requests as a file for warmup (cache.keep_requests)")
    top.set_defaults(run=_cache_top)
    report = cache.add_parser("report", help="lookups, hits, estimated error with its confidence, samples")
    report.set_defaults(run=_cache_report)
    kill = cache.add_parser("kill", help="remove one answer for every wording, and trust its neighbours less")
    kill.add_argument("key", metavar="KEY", help="the entry's key, as the report gives it")
    kill.set_defaults(run=_cache_kill)
    for call in (top, report, kill):
        _add_ops(call)

    new_key = commands.add_parser("new-key", help="make an API key")
    new_key.add_argument("--tenant", required=True, metavar="NAME")
    new_key.set_defaults(run=_new_key)
    return parser


def _add_ops(command: argparse.ArgumentParser) -> None:
    command.add_argument("--ops", default="127.0.0.1:8081", metavar="HOST:PORT", help="operations port, or its URL")
    command.add_argument("--key-file", metavar="FILE", help="file with the admin key, where one is set")


def _count(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def _fail(message: str, status: int) -> NoReturn:
    for line in message.splitlines() or [""]:
        print(f"gpu-balancer: {line}", file=sys.stderr)
    sys.exit(status)


def _serve(args: argparse.Namespace) -> None:
    from balancer import log
    from balancer.app import serve
    from balancer.settings import SettingsError, load

    path = args.config or os.environ.get("BALANCER_CONFIG")
    overrides = _overrides(args)

    def read() -> Settings:
        return _checked(load(path, overrides))

    try:
        settings = read()
    except SettingsError as error:
        _fail(str(error), 2)
    if not settings.nodes:
        _fail("nodes: none are configured; name one with --node URL or in the settings file", 2)
    lines = log.set_up(settings.log.level, settings.log.format)
    try:
        serve(settings, read, log.event_writer(settings.log.level, lines))
    except OSError as error:
        _fail(error.strerror or str(error), 1)
    except SettingsError as error:
        _fail(str(error), 2)
    finally:
        if lines is not None:
            lines.flush()


def _checked(settings: Settings) -> Settings:
    """The settings, if they can be started with. Raises SettingsError."""
    from balancer.settings import SettingsError

    if settings.redis.url is not None:
        from balancer.store.address import parse

        try:
            parse(settings.redis.url)
        except ValueError as error:
            raise SettingsError(str(error)) from error
    if settings.cache.ttl_by_endpoint:
        from balancer.server import ENDPOINTS

        known = {endpoint.name for endpoint in ENDPOINTS.values()}
        if strange := settings.cache.ttl_by_endpoint.keys() - known:
            raise SettingsError(f"cache.ttl_by_endpoint.{min(strange)}: there is no such endpoint")
    return settings


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    if args.listen:
        overrides["listen"] = args.listen
    if args.ops_listen:
        overrides["ops_listen"] = args.ops_listen
    if args.redis_url:
        overrides["redis"] = {"url": args.redis_url}
    if args.node:
        overrides["nodes"] = [_node(spec) for spec in args.node]
    return overrides


def _node(spec: str) -> dict[str, Any]:
    """A node SPEC as settings: `URL[,id=NAME][,agent=URL][,weight=F][,model=NAME]…`."""
    url, *rest = spec.split(",")
    node: dict[str, Any] = {"url": url}
    for part in rest:
        name, separator, value = part.partition("=")
        if not separator or name not in ("id", "agent", "weight", "model"):
            _fail(f"--node {spec}: {part!r} is none of id=, agent=, weight=, model=", 2)
        if name == "model":
            node.setdefault("models", []).append(value)
        else:
            node[name] = value
    return node


def _check_config(args: argparse.Namespace) -> None:
    import yaml

    from balancer.settings import SettingsError, load, masked

    try:
        settings = _checked(load(args.file, {}))
    except SettingsError as error:
        _fail(str(error), 2)
    print(yaml.safe_dump(masked(settings), sort_keys=False, allow_unicode=True), end="")


def _new_key(args: argparse.Namespace) -> None:
    import hashlib
    import secrets

    from balancer.settings import KeyConfig

    key = f"gb-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    try:
        from pydantic import TypeAdapter, ValidationError

        TypeAdapter(KeyConfig).validate_python({"tenant": args.tenant, "sha256": digest})
    except ValidationError as error:
        _fail(f"--tenant: {error.errors()[0]['msg']}", 2)
    print(f"key:      {key}")
    print(f'settings: - {{tenant: {args.tenant}, sha256: "{digest}"}}')
    print("The key is shown once; the settings (auth.keys) hold only its hash.", file=sys.stderr)


def _explain(args: argparse.Namespace) -> None:
    import json
    from urllib.parse import quote

    from balancer.explain import table

    told = _asked(args, "GET", f"/admin/requests/{quote(args.request_id, safe='')}", args.request_id)
    print(json.dumps(told, indent=2) if args.json else table(told))


def _cache_top(args: argparse.Namespace) -> None:
    from pathlib import Path

    from balancer.warmup import export_line

    query = f"count={min(args.count, 1000)}&requests={'true' if args.export else 'false'}"
    top = _asked(args, "GET", f"/admin/cache/top?{query}", args.ops)["top"]
    print(f"{'hits':>9} {'bytes':>9} {'saved s':>9}  {'tenant':<16} {'model':<24} key")
    for one in top:
        told = f"{one['hits']:>9} {one['bytes']:>9} {one['saved_s']:>9.1f}"
        print(f"{told}  {one['tenant']:<16} {one['model']:<24} {one['key']}")
    if args.export:
        lines = [export_line(one) for one in top if "body" in one]
        Path(args.export).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        print(f"{len(lines)} of {len(top)} requests written to {args.export}", file=sys.stderr)
        if top and not lines:
            print("requests are kept only with cache.keep_requests: true", file=sys.stderr)


def _cache_report(args: argparse.Namespace) -> None:
    from balancer.cache_report import written

    print(written(_asked(args, "GET", "/admin/cache/semantic", "report")), end="")


def _cache_kill(args: argparse.Namespace) -> None:
    from urllib.parse import quote

    killed = _asked(args, "DELETE", f"/admin/cache/semantic/{quote(args.key, safe='')}", args.key)
    print(f"killed {killed['killed']}: {killed['answers']} answers, {killed['neighbours']} neighbours trusted less")


def _asked(args: argparse.Namespace, method: str, path: str, what: str) -> Any:
    """What the operations port answers, as `--ops` and `--key-file` say; without an answer the program ends.

    `what` is what its refusal speaks of.
    """
    import http.client
    import json
    from urllib.parse import urlsplit

    from balancer.settings import split_address

    key = _read_key(args.key_file)
    try:
        if "://" not in args.ops:
            split_address(args.ops)
        url = urlsplit(args.ops if "://" in args.ops else f"http://{args.ops}")
        connect = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = connect(url.hostname or "", url.port, timeout=ASK_S)
    except ValueError as error:
        _fail(f"--ops: {error}", 2)
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        connection.request(method, url.path.rstrip("/") + path, headers=headers)
        answer = connection.getresponse()
        told = json.loads(answer.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        _fail(f"{args.ops}: {error or type(error).__name__}", 1)
    finally:
        connection.close()
    if answer.status != 200:
        _fail(f"{what}: {told['error']['message']}", 1)
    return told


def _read_key(path: str | None) -> str | None:
    from pathlib import Path

    try:
        return None if path is None else Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        _fail(f"{path}: {getattr(error, 'strerror', None) or error}", 2)


def _warm_up(args: argparse.Namespace) -> None:
    import asyncio

    from balancer.warmup import Summary, bar, warm_up

    def show(summary: Summary) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{bar(summary)}", end="", file=sys.stderr, flush=True)

    key = _read_key(args.key_file)
    try:
        summary = asyncio.run(warm_up(args.file, url=args.url, concurrency=args.concurrency, key=key, on_progress=show))
    except (ValueError, OSError) as error:
        _fail(getattr(error, "strerror", None) or str(error), 2)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(summary)
    if summary.failed:
        _fail(f"the first failure: {summary.first_failure}", 1)


def _simulate(args: argparse.Namespace) -> None:
    from loadtest.sim.command import main as simulate

    sys.exit(simulate(args.rest))


def _demo(args: argparse.Namespace) -> None:
    from loadtest.demo import run

    sys.exit(run(nodes=args.nodes, seconds=args.seconds))


if __name__ == "__main__":
    main()
