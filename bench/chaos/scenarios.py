"""What a client of the chaos run does: one scenario after another, each a small program as a user would write it.

    one_shot       a stream from its start to its end
    stopped        one that a stop string ends
    collected      a stream, and once more from the middle after its end
    conversation   spawn, then turns of append and generate
    forked         a conversation that goes on in several copies at once
    taken_over     another client becomes the reader in the middle; sometimes it leaves, and comes back for the rest
    asked_twice    the same request again, under the same client_request_id, while the first is being read
    awaited        somebody else waits for the end
    one_by_one     a second sequence that waits for the first (`after`)

`requests.py` writes down all that comes; here nothing is judged.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from chaos.material import TURNS, Material, Wanted
from chaos.requests import GaveUp, Reading, Requests, Start
from llmos import AsyncClient
from llmos.client.asequence import AsyncSequence
from llmos.codes import SeqState
from llmos.errors import NotFound

T = TypeVar("T")
_RUN_IDS = 10**9


class Scenarios:
    """One client. `visitor`: another one, for what somebody else does."""

    _client: AsyncClient  # of the scenario that is played

    def __init__(self, visitor: AsyncClient, requests: Requests, material: Material, chance: random.Random) -> None:
        self._visitor = visitor
        self._requests = requests
        self._material = material
        self._chance = chance
        self._name = f"{chance.randrange(_RUN_IDS):09}"
        self._num_keys = 0
        self._choices: list[tuple[Callable[[], Awaitable[object]], int]] = [
            (self.one_shot, 4), (self.stopped, 1), (self.collected, 1), (self.conversation, 3), (self.forked, 2),
            (self.taken_over, 1), (self.asked_twice, 1), (self.awaited, 1), (self.one_by_one, 1),
        ]  # fmt: skip

    async def play_one(self, client: AsyncClient) -> bool:
        """A scenario by chance. False: it came to grief and ended early; the history says why."""
        self._client = client
        scenarios, weights = zip(*self._choices)
        (scenario,) = self._chance.choices(scenarios, weights)
        try:
            await scenario()
        except GaveUp:
            return False
        return True

    def _new_key(self) -> str:
        self._num_keys += 1
        return f"{self._name}-{self._num_keys}"

    # ------------------------------------------------------------ one-shot sequences

    async def one_shot(self, *, stops: bool = False) -> Reading:
        prompt, place = self._material.begin(self._chance)
        return await self._generate(Reading(), prompt, self._material.output(self._chance, place, stops=stops))

    async def stopped(self) -> None:
        await self.one_shot(stops=True)

    async def collected(self) -> None:
        prompt, place = self._material.begin(self._chance)
        wanted = self._material.output(self._chance, place)
        reading = await self._generate(Reading(), prompt, wanted)
        await self._attach(reading, wanted, self._chance.randint(0, wanted.count))

    async def taken_over(self) -> None:
        prompt, place = self._material.begin(self._chance)
        wanted = self._material.output(self._chance, place)
        first = Reading()

        async def other() -> None:
            if await first.reaches(self._chance.randint(1, wanted.count // 2)):
                self._requests.hand_over(first)
                start = self._chance.randint(0, first.tokens)
                if self._chance.random() < 0.5:  # leave, and come back for the rest; the sequence goes on meanwhile
                    part = await self._attach(first, wanted, start, upto=self._chance.randint(1, wanted.count))
                    start += part.tokens
                await self._attach(first, wanted, start)

        await _together(self._generate(first, prompt, wanted, may_lose=True), other())

    async def asked_twice(self) -> None:
        prompt, place = self._material.begin(self._chance)
        wanted = self._material.output(self._chance, place)
        key = self._new_key()
        first = Reading()

        async def second() -> None:
            if await first.reaches(self._chance.randint(1, wanted.count // 2)):
                self._requests.hand_over(first)
                await self._generate(Reading(), prompt, wanted, key=key)

        await _together(self._generate(first, prompt, wanted, key=key, may_lose=True), second())

    async def awaited(self) -> None:
        prompt, place = self._material.begin(self._chance)
        wanted = self._material.output(self._chance, place)
        reading = Reading()

        async def other() -> None:
            if await reading.reaches(1):
                await self._wait(reading, wanted)

        await _together(self._generate(reading, prompt, wanted), other())

    async def one_by_one(self) -> None:
        prompt, place = self._material.begin(self._chance)
        wanted = self._material.output(self._chance, place)
        first = Reading()

        async def second() -> None:
            if await first.reaches(1):
                prompt, place = self._material.begin(self._chance)
                following = self._material.output(self._chance, place)
                await self._generate(Reading(), prompt, following, after=[first.rid])

        await _together(self._generate(first, prompt, wanted), second())

    async def _generate(
        self, reading: Reading, prompt: Any, wanted: Wanted, *, key: str | None = None, may_lose: bool = False,
        **options: Any,
    ) -> Reading:  # fmt: skip
        key = key or self._new_key()
        options |= wanted.options | {"client_request_id": key}
        try:
            return await self._requests.read(
                reading, "generate", lambda: self._client.generate(prompt, stream=True, **options), key=key,
                answer=wanted.answer, waits="after" in options,
            )  # fmt: skip
        except GaveUp:
            if not may_lose:
                raise
            return reading

    async def _attach(self, reading: Reading, wanted: Wanted, start: int, *, upto: int | None = None) -> Reading:
        """As another client, from offset `start` on."""
        assert reading.rid is not None
        sequence = self._visitor.sequence(reading.rid)
        return await self._requests.read(
            Reading(), "attach", lambda: sequence.attach(start), upto=upto, rid=reading.rid, start=start,
            answer=wanted.answer,
        )  # fmt: skip

    async def _wait(self, reading: Reading, wanted: Wanted) -> None:
        assert reading.rid is not None
        sequence = self._visitor.sequence(reading.rid)
        await self._requests.ask(
            "wait", sequence.wait, lambda ending: {"reason": ending.reason, "output_tokens": ending.usage.output_tokens},
            rid=reading.rid, waits=True, expect={"reason": "length", "output_tokens": wanted.count},
        )  # fmt: skip

    # ------------------------------------------------------------ open sequences

    async def conversation(self) -> None:
        sequence, place = await self._spawn()
        try:
            for turn in range(TURNS):
                if turn:
                    place = await self._append(sequence, place)
                place = await self._turn(sequence, place)
        finally:
            await self._end_job(sequence)

    async def forked(self) -> None:
        sequence, place = await self._spawn()
        try:
            place = await self._turn(sequence, place)
            place = await self._append(sequence, place)
            count = self._chance.randint(1, 3)
            copies = await self._requests.ask(
                "fork", lambda: sequence.fork(count), lambda found: {"count": len(found), "rids": [s.rid for s in found]},
                rid=sequence.rid, expect={"count": count},
            )  # fmt: skip
            await _together(*(self._turn(each, place) for each in (sequence, *copies)))
        finally:
            await self._end_job(sequence)

    async def _spawn(self) -> tuple[AsyncSequence, Any]:
        prompt, place = self._material.begin(self._chance)
        key = self._new_key()
        sequence = await self._requests.ask(
            "spawn", lambda: self._client.spawn(prompt, client_request_id=key), lambda made: {"rid": made.rid}, key=key
        )
        return sequence, place

    async def _append(self, sequence: AsyncSequence, place: Any) -> Any:
        text, place, length = self._material.more(self._chance, place)
        before = (await self._requests.ask("stat", sequence.stat, _nothing, rid=sequence.rid)).num_tokens

        async def done_after_all() -> int | None:
            now = (await sequence.stat()).num_tokens
            return None if now == before else now

        await self._requests.ask(
            "append", lambda: sequence.append(text), lambda now: {"num_tokens": now}, look=done_after_all,
            rid=sequence.rid, expect=None if length is None else {"num_tokens": length},
        )  # fmt: skip
        return place

    async def _turn(self, sequence: AsyncSequence, place: Any) -> Any:
        """One output; returns the place after it."""
        wanted = self._material.output(self._chance, place)
        before = (await self._requests.ask("stat", sequence.stat, _nothing, rid=sequence.rid)).num_tokens

        def begin() -> Any:
            return sequence.generate(stream=True, **wanted.options)

        async def begin_or_go_on() -> Start:
            now = await sequence.stat()
            has_begun = now.num_tokens > before or now.row.state != SeqState.BLOCKED
            return sequence.attach if has_begun else begin

        reading = await self._requests.read(
            Reading(), "continue", begin, again=begin_or_go_on, rid=sequence.rid, answer=wanted.answer
        )
        assert reading.whole
        return wanted.place

    async def _end_job(self, sequence: AsyncSequence) -> None:
        """With all copies, also those that nobody was told of."""
        with contextlib.suppress(GaveUp):
            await self._requests.ask("kill", lambda: _killed(self._client, sequence.rid), _nothing, rid=sequence.rid)


def _nothing(answer: object) -> dict[str, Any]:
    """What is worth writing down of an answer that can not be checked."""
    return {}


async def _killed(client: AsyncClient, rid: int) -> tuple[int, ...]:
    try:
        return await client.kill(job=rid)
    except NotFound:
        return ()  # all of it ended before, and so long ago that it is forgotten


async def _together(*parts: Awaitable[T]) -> list[T]:
    """All to their end, then the first error."""
    results = await asyncio.gather(*parts, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return list(results)  # type: ignore[arg-type]
