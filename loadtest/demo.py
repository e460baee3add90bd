"""`gpu-balancer demo`: a small fleet on this machine, traffic through it, and a node killed before your eyes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import aiohttp

from loadtest.children import CannotRun
from loadtest.clock import Clock, SystemClock
from loadtest.demo_fleet import Fleet, Place
from loadtest.demo_table import Screen, summary
from loadtest.demo_traffic import PATH, End, Sent, Traffic

# What two cores simulate with ease, all processes together.
RATE_PER_NODE, MAX_RATE_PER_S = 2.5, 10.0
LOOK_EVERY_S = 1.0
CHECK_EVERY_S = 0.1
# Its agent is believed after 3 s of good reports and its share grows from a tenth: 7 s, more on a busy machine.
COMEBACK_WITHIN_S = 30.0
# Of how many lost requests the reason is told at the end.
LOST_TOLD = 5
QUESTION = {"model": "sim-model", "messages": [{"role": "user", "content": "Tell me a story."}], "stream": True}
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class WentBadly(Exception):
    """The demo ran, and did not show what it promises; the text says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """When what happens, in seconds from the first request. `end_s` None: when it is told to end."""

    kill_s: float
    back_s: float
    end_s: float | None

    @classmethod
    def within(cls, seconds: float | None) -> Plan:
        """10 s until the kill and 10 s more until the node is started again; thirds where there is less time."""
        step_s = 10.0 if seconds is None else min(10.0, seconds / 3)
        return cls(kill_s=step_s, back_s=2 * step_s, end_s=seconds)


def run(*, nodes: int, seconds: float | None) -> int:
    """Run the demo for `seconds`, or until SIGINT or SIGTERM, and return the exit status.

    0 when it was told to end. After `seconds`, 1 if a request was lost or the killed node did not come back. 1 also
    when it could not run, 2 for a wrong argument.
    """
    if nodes < 1 or (seconds is not None and seconds <= 0):
        print("gpu-balancer: demo: --nodes and --seconds must be above 0", file=sys.stderr)
        return 2
    try:
        asyncio.run(_until_told(nodes, Plan.within(seconds)))
    except BrokenPipeError:  # whoever read our output has left: nobody is there to watch
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (CannotRun, WentBadly, OSError) as error:
        print(f"gpu-balancer: demo: {error}", file=sys.stderr)
        return 1
    return 0


async def _until_told(nodes: int, plan: Plan) -> None:
    """The whole of it; any of ENDING_SIGNALS ends it in order, and a second one faster."""
    story = asyncio.create_task(_tell(nodes, plan))
    loop = asyncio.get_running_loop()
    for number in ENDING_SIGNALS:
        loop.add_signal_handler(number, story.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await story


async def _tell(nodes: int, plan: Plan) -> None:
    clock, screen = SystemClock(), Screen(sys.stdout)
    async with contextlib.AsyncExitStack() as stack:
        logs = stack.enter_context(_folder_for_logs())
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        fleet = Fleet(nodes, session, clock, logs)
        stack.push_async_callback(fleet.end)
        screen.say(f"gpu-balancer demo: {nodes} simulated GPU nodes, an agent beside each, a balancer. Starting ...")
        await fleet.start()
        screen.say(what_runs(fleet, logs, with_dashboard=await fleet.has_dashboard()))
        rate_per_s = min(MAX_RATE_PER_S, RATE_PER_NODE * nodes)
        traffic = Traffic(fleet.data_url, session, rate_per_s=rate_per_s, clock=clock, rng=Random(1))
        await Demo(fleet, traffic, screen, clock, plan).run()


@contextlib.contextmanager
def _folder_for_logs() -> Iterator[Path]:
    """A folder that stays, and is named, when something went wrong."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-balancer-demo-"))
    try:
        yield folder
    except (CannotRun, WentBadly) as error:
        raise type(error)(f"{error}\n  the logs are kept in {folder}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def what_runs(fleet: Fleet, logs: Path, *, with_dashboard: bool) -> str:
    """Addresses, and a command to try."""
    ask = ["curl", "-N", fleet.data_url + PATH, "-H", "Content-Type: application/json", "-d", json.dumps(QUESTION)]
    dashboard = [f"  dashboard   {fleet.ops_url}/dashboard"] if with_dashboard else []
    return "\n".join(
        (
            f"  data port   {fleet.data_url}/v1",
            f"  metrics     {fleet.ops_url}/metrics",
            f"  nodes       {fleet.ops_url}/admin/nodes",
            *dashboard,
            *(f"  {place.name:<11} {place.url}   its agent {place.agent_url}/v1/report" for place in fleet.places),
            f"  logs        {logs}",
            "",
            "Ask something yourself:",
            "",
            f"  {shlex.join(ask)}",
            "",
            "Traffic begins. Ctrl-C ends all of it.",
        )
    )


class Demo:
    """What happens while traffic flows, and what is said about it."""

    def __init__(self, fleet: Fleet, traffic: Traffic, screen: Screen, clock: Clock, plan: Plan) -> None:
        self._fleet = fleet
        self._traffic = traffic
        self._screen = screen
        self._clock = clock
        self._plan = plan
        self._began_s = clock.now()
        self._next_look_s = self._began_s
        self._dead: Place | None = None

    async def run(self) -> None:
        """All of it. Raises WentBadly at the end if a request was lost, or the killed node did not come back."""
        came_back = True
        self._traffic.start()
        try:
            await self._watch(lambda: self._elapsed_s >= self._plan.kill_s)
            if len(self._fleet.places) > 1:
                came_back = await self._kill_one()
            else:
                self._screen.say("With one node nobody can take over, so nothing is killed. Try --nodes 3.")
            end_s = self._plan.end_s
            await self._watch(lambda: end_s is not None and self._elapsed_s >= end_s)
            await self._traffic.finish()
        finally:
            await self._traffic.give_up()
            self._sum_up()
        if self._traffic.lost or not came_back:
            raise WentBadly("requests were lost" if self._traffic.lost else "the killed node did not come back")

    @property
    def _elapsed_s(self) -> float:
        return self._clock.now() - self._began_s

    async def _watch(self, over: Callable[[], bool]) -> None:
        """Show everything once a second until it is over. Raises CannotRun if a process has ended by itself."""
        while not over():
            self._traffic.check()
            self._fleet.check(but=self._dead.node if self._dead else None)
            if self._clock.now() >= self._next_look_s:
                self._next_look_s = self._clock.now() + LOOK_EVERY_S
                rows = await self._fleet.look(self._traffic)
                self._screen.show(rows, self._traffic.totals, self._elapsed_s)
            await self._clock.sleep(CHECK_EVERY_S)

    async def _kill_one(self) -> bool:
        """Kill the busiest node, account for what ran, start it again; whether it came back."""
        place, running = await self._busiest()
        before = replace(self._traffic.totals)
        self._dead = place
        under_way = self._traffic.node_is_killed()
        await place.node.kill()
        self._screen.say(
            f"killed node {place.name} (kill -9, pid {place.node.pid}) with {running} requests running on it"
        )
        await self._watch(lambda: all(sent.end for sent in under_way))
        self._screen.say(_account(under_way))
        await self._watch(lambda: self._elapsed_s >= self._plan.back_s)
        await place.node.start()
        self._dead = None
        ended = self._traffic.totals.since(before)
        self._screen.say(
            f"started {place.name} again (pid {place.node.pid}); while it was away {ended.whole} requests "
            f"were answered whole, {ended.failed} failed before their first byte"
        )
        return await self._comes_back(place)

    async def _comes_back(self, place: Place) -> bool:
        started_s = self._clock.now()

        def answers() -> bool:
            return self._traffic.answered_by(place.name, started_s)

        await self._watch(lambda: answers() or self._clock.now() > started_s + COMEBACK_WITHIN_S)
        took_s = self._clock.now() - started_s
        if answers():
            self._screen.say(f"{place.name} is back: {took_s:.1f} s after its start it has answered a request")
            return True
        self._screen.say(f"{place.name} has answered nothing within {took_s:.0f} s of its start")
        return False

    async def _busiest(self) -> tuple[Place, int]:
        """The node with the most requests, once there is one with any."""
        while True:
            in_flight = await self._fleet.in_flight()
            place = max(self._fleet.places, key=lambda place: in_flight.get(place.name, 0))
            if in_flight.get(place.name):
                return place, in_flight[place.name]
            self._traffic.check()
            await self._clock.sleep(CHECK_EVERY_S)

    def _sum_up(self) -> None:
        self._screen.leave()
        lost = [f"lost: {sent.reason}" for sent in self._traffic.lost[:LOST_TOLD]]
        self._screen.say("\n".join((f"{self._elapsed_s:.0f} s in all: {summary(self._traffic.totals)}", *lost)))


def _account(under_way: set[Sent]) -> str:
    """What became of the requests that were under way when the node was killed."""
    ends = [sent.end for sent in under_way]
    whole, failed, cut, broken = (ends.count(end) for end in End)
    streams = f"{cut} streams cut mid-way ended with an error event" if cut else "no stream was cut mid-way"
    if broken:
        streams += f", {broken} broke off without one"
    return (
        f"of the {len(ends)} requests under way at that moment {whole} were answered whole, "
        f"{failed} failed before their first byte; {streams}"
    )
