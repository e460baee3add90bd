"""gpu-node-agent: the command line, also as `python -m node_agent`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from node_agent import __version__

# Exit codes: what the operator wrote is wrong, and what the machine would not give.
USAGE, FAILED = 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; raises SystemExit only for --help, --version and misuse."""
    arguments = _parser().parse_args(argv)
    from node_agent.settings import SettingsError, load  # pydantic takes a while: not before --help

    try:
        settings = load(_settings_given(arguments), arguments.config)
    except SettingsError as error:
        for line in str(error).splitlines():
            print(f"gpu-node-agent: {line}", file=sys.stderr)
        return USAGE
    return _serve(settings)


def _serve(settings: Any) -> int:
    import asyncio

    from node_agent import app, log

    log.configure(settings.log)
    try:
        asyncio.run(app.serve(settings))
    except app.CannotListen as error:
        print(f"gpu-node-agent: {error}", file=sys.stderr)
        return FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu-node-agent", description="Measures the GPUs and inference servers of this host for gpu-balancer."
    )
    parser.add_argument("--version", action="version", version=f"gpu-node-agent {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run the agent", description="Run the agent until SIGTERM.")
    serve.add_argument(
        "--engine",
        metavar="SPEC",
        action="extend",
        nargs="+",
        help="an inference server of this host: URL[,id=NAME][,kind=NAME|auto][,advertise=URL][,gpus=0+1]"
        "[,metrics=URL]; once per server",
    )
    serve.add_argument("--listen", metavar="HOST:PORT", help="where to answer (default 127.0.0.1:9477)")
    serve.add_argument(
        "--balancer",
        metavar="URL",
        action="extend",
        nargs="+",
        help="push each report to this balancer's operations port; may be repeated",
    )
    serve.add_argument("--config", metavar="FILE", help="settings in YAML (default: $NODE_AGENT_CONFIG)")
    return parser


def _settings_given(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {"engines": arguments.engine, "listen": arguments.listen, "balancers": arguments.balancer}
    return {name: value for name, value in given.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
