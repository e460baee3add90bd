"""Chat traffic for locust: `locust -f loadtest/locustfile.py --host http://127.0.0.1:8080`.

Locust's own figure ends with the headers, which a balancer may send long before the first token. So each answer fires
events of its own: `first token`, `token gap (mean)` and `whole answer`, in milliseconds.

Environment: LOADTEST_HOST (instead of --host), LOADTEST_API_KEY, LOADTEST_MODEL, LOADTEST_SEED (0),
LOADTEST_STREAM_SHARE (0.8), LOADTEST_LONG_SHARE (0.1), LOADTEST_THINK_S (1.0, mean pause between a user's questions).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from random import Random
from typing import Any

import orjson
from locust import HttpUser, task

from loadtest.clock import SystemClock
from loadtest.traffic import ChatMix, Conversation, conversations

SETTINGS = os.environ
PATH = "/v1/chat/completions"


class BadAnswer(Exception):
    """An answer that says 200 and is not whole."""


class ChatUser(HttpUser):
    """Somebody who chats: a question, an answer, a pause, and so on through one conversation after the other."""

    host = SETTINGS.get("LOADTEST_HOST")
    _numbers = itertools.count()

    def wait_time(self) -> float:
        """Seconds to the next question."""
        return self._rng.expovariate(1.0 / self._think_s) if self._think_s > 0 else 0.0

    def on_start(self) -> None:
        mix = ChatMix(
            model=SETTINGS.get("LOADTEST_MODEL"),
            stream_share=float(SETTINGS.get("LOADTEST_STREAM_SHARE", "0.8")),
            long_share=float(SETTINGS.get("LOADTEST_LONG_SHARE", "0.1")),
        )
        seed = int(SETTINGS.get("LOADTEST_SEED", "0"))
        self._think_s = float(SETTINGS.get("LOADTEST_THINK_S", "1.0"))
        self._clock = SystemClock()
        self._rng = Random(f"{seed}/{next(self._numbers)}")
        # All users share system prompts and frequent questions, and take turns at their conversations.
        self._talks = _every_other(conversations(mix, Random(seed)), self._rng)
        self._talk: Conversation | None = None
        if key := SETTINGS.get("LOADTEST_API_KEY"):
            self.client.headers["Authorization"] = f"Bearer {key}"

    @task
    def chat(self) -> None:
        """Ask once, and read the answer to its end."""
        if self._talk is None or self._talk.over:
            self._talk = next(self._talks)
        body = self._talk.ask(self._rng)
        began_s = self._clock.now()
        with self.client.post(PATH, json=body, stream=True, catch_response=True, name="headers") as response:
            if response.status_code != 200:
                response.failure(f"{response.status_code} {response.text[:200]}")
                self._talk = None
                return
            try:
                lines = response.iter_lines(chunk_size=None)
                answer = self._read_stream(lines, began_s) if body.get("stream") else _read_whole(response.content)
            except (BadAnswer, OSError, ValueError) as error:
                response.failure(str(error))
                self._fire("whole answer", began_s, error)
                self._talk = None
                return
            self._fire("whole answer", began_s)
            self._talk.hear(answer)

    def _read_stream(self, lines: Iterable[bytes], began_s: float) -> str:
        """The text of a stream; fires its first token and mean gap. Raises BadAnswer where [DONE] is missing."""
        pieces: list[str] = []
        times_s: list[float] = []
        whole = False
        for data in _events(lines):
            whole = whole or data == b"[DONE]"
            piece = "" if whole else _piece(data)
            if not piece:
                continue
            times_s.append(self._clock.now())
            if not pieces:
                self._fire("first token", began_s, now=times_s[0])
            pieces.append(piece)
        if not whole:
            raise BadAnswer("the stream ended without [DONE]")
        if len(pieces) > 1:
            self._fire("token gap (mean)", 0.0, now=(times_s[-1] - times_s[0]) / (len(pieces) - 1))
        return "".join(pieces)

    def _fire(self, name: str, began_s: float, error: Exception | None = None, now: float | None = None) -> None:
        ended_s = self._clock.now() if now is None else now
        self.environment.events.request.fire(
            request_type="CHAT",
            name=name,
            response_time=(ended_s - began_s) * 1000.0,
            response_length=0,
            exception=error,
            context={},
        )


def _every_other(source: Iterator[Conversation], rng: Random) -> Iterator[Conversation]:
    """Skip some, so that users with the same source are not in step."""
    while True:
        yield next(itertools.islice(source, rng.randrange(20), None))


def _events(lines: Iterable[bytes]) -> Iterator[bytes]:
    return (line[6:] for line in lines if line.startswith(b"data: "))


def _piece(data: bytes) -> str:
    """The text of one chunk, often none. Raises BadAnswer for an error event."""
    chunk: dict[str, Any] = orjson.loads(data)
    if "error" in chunk:
        raise BadAnswer(str(chunk["error"].get("code") or chunk["error"]))
    choices = chunk.get("choices") or [{}]
    return str((choices[0].get("delta") or {}).get("content") or "")


def _read_whole(content: bytes) -> str:
    return str(orjson.loads(content)["choices"][0]["message"]["content"])
