"""Sends a batch's requests, so many at a time, and writes down what comes back.

Each request has an idempotency key made of its content: who runs a batch again gets what is still known of the first time instead of
computing it twice. Busy and restarting servers are waited for; they are no answer. States of a request: to do -> sent -> (again, after a
pause) -> written.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from llmos.ctl.batch_file import Line, Output
from llmos.errors import Unavailable

LAST = 19  # nice
_AGAIN = frozenset({429, 502, 503})
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 15.0
_ANSWER_S = 24 * 3600.0  # a batch is patient: at lowest priority an answer may take long


@dataclass(frozen=True, slots=True)
class Server:
    """`give_up_s`: for so long nobody may have answered."""

    url: str
    key: str
    verify: bool
    give_up_s: float


class BatchRun:
    """`run` until all is written. `on_done` is called after each answer."""

    def __init__(
        self, server: Server, output: Output, concurrency: int, on_done: Callable[[], object],
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:  # fmt: skip
        self._server = server
        self._output = output
        self._concurrency = concurrency
        self._on_done = on_done
        self._transport = transport
        self._answered_at = 0.0

    async def run(self, lines: Iterator[Line]) -> None:
        """Raises `Unavailable` if nobody answers for too long."""
        self._answered_at = asyncio.get_running_loop().time()
        timeout = httpx.Timeout(_ANSWER_S, connect=10.0)
        limits = httpx.Limits(max_connections=self._concurrency)
        headers = {"authorization": f"Bearer {self._server.key}"}
        async with httpx.AsyncClient(
            base_url=self._server.url, headers=headers, timeout=timeout, limits=limits, verify=self._server.verify,
            trust_env=False, transport=self._transport,
        ) as client:  # fmt: skip
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._concurrency):
                        group.create_task(self._work(client, lines))
            except* Unavailable as errors:
                raise errors.exceptions[0] from None

    async def _work(self, client: httpx.AsyncClient, lines: Iterator[Line]) -> None:
        for line in lines:  # shared: each takes the next one
            if line.custom_id in self._output.done:
                continue
            answer = await self._answer(client, line)
            try:
                body: Any = answer.json()
            except ValueError:
                body = answer.text
            self._output.write(line, answer.status_code, body, answer.headers.get("x-request-id", ""))
            self._on_done()

    async def _answer(self, client: httpx.AsyncClient, line: Line) -> httpx.Response:
        content = json.dumps({"priority": LAST} | line.body).encode()
        headers = {"content-type": "application/json", "idempotency-key": _key(line, content)}
        pause = _FIRST_PAUSE_S
        while True:
            try:
                answer = await client.post(line.url, content=content, headers=headers)
                problem = f"the server answers {answer.status_code}"
                if answer.status_code not in _AGAIN:
                    self._answered_at = asyncio.get_running_loop().time()
                    return answer
                wait = max(pause, _retry_after(answer))
            except httpx.TransportError as error:
                problem, wait = f"{type(error).__name__}: {error}", pause
            if asyncio.get_running_loop().time() - self._answered_at > self._server.give_up_s:
                raise Unavailable(f"no answer for {self._server.give_up_s:g} s: {problem}")
            await asyncio.sleep(min(wait, _LONGEST_PAUSE_S))
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def _key(line: Line, content: bytes) -> str:
    digest = hashlib.blake2b(content, digest_size=16, person=b"llmos-batch")
    digest.update(line.url.encode() + b"\0" + line.custom_id.encode(errors="surrogatepass"))
    return f"batch-{digest.hexdigest()}"


def _retry_after(answer: httpx.Response) -> float:
    try:
        return float(answer.headers.get("retry-after", "0"))
    except ValueError:
        return 0.0
