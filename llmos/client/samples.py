"""Several answers to one prompt: one sequence is spawned, forked, and all of them generate at the same time.

Invariant: whatever happens (a refusal, a failure, a cancellation), every sequence that was made is closed before the caller goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from llmos.client._core import ConnectionLost
from llmos.client.asequence import AsyncSequence
from llmos.client.checked import checked_count, checked_timeout
from llmos.client.options import OutputOptions, Placement, PromptLike, SampleOptions
from llmos.client.requests import continue_request, spawn_request
from llmos.client.sampling import merge_params, refuse_unknown
from llmos.client.types import Completion
from llmos.errors import LlmosError

if TYPE_CHECKING:
    from llmos.client.aio import AsyncClient

log = logging.getLogger(__name__)
_SEEDS = 2**63
T = TypeVar("T")


async def draw_samples(client: AsyncClient, prompt: PromptLike, n: int, options: SampleOptions) -> list[Completion]:
    """See `AsyncClient.samples`. Everything is checked before anything is sent."""
    count = checked_count("n", n)
    refuse_unknown(options, SampleOptions.__optional_keys__)
    given = dict(options)
    place = cast(Placement, {name: given[name] for name in Placement.__optional_keys__ & given.keys()})
    output = cast(OutputOptions, {name: given[name] for name in OutputOptions.__optional_keys__ & given.keys()})
    spawn_request(prompt, client.model, place)
    continue_request(0, output)
    checked_timeout(output.get("timeout_s"))
    made: list[AsyncSequence] = []

    async def make() -> None:
        made.append(await client.spawn(prompt, **place))
        if count > 1:
            made.extend(await _fork(client, made[0], count - 1))

    making = asyncio.ensure_future(make())
    try:
        await asyncio.shield(making)
        return await _together([each.generate(**_seeded(output, i)) for i, each in enumerate(made)])
    finally:
        await asyncio.wait([making])  # a request that is on its way may still make something
        await _close(made)


async def _fork(client: AsyncClient, root: AsyncSequence, count: int) -> list[AsyncSequence]:
    """Children of a sequence that only we know: if nobody can tell whether it was forked, its children are looked for."""
    while True:
        try:
            return await root.fork(count)
        except ConnectionLost:
            job = (await root.stat()).job.job
            others = [client.sequence(row.rid) for row in await client.ps() if row.job == job and row.rid > root.rid]
            kids = [each for each in others if (await each.stat()).parent == root.rid]
            if kids:
                return kids


def _seeded(output: OutputOptions, place: int) -> OutputOptions:
    """The same seed would give the same answer each time."""
    seed = merge_params(output.get("params"), {"seed": output["seed"]} if "seed" in output else {}).seed
    return output if seed is None else cast(OutputOptions, {**output, "seed": (seed + place) % _SEEDS})


async def _together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first failure ends the others."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _close(made: Sequence[AsyncSequence]) -> None:
    """What has ended by itself, or can not be reached any more, is as good as closed."""
    for each, result in zip(made, await asyncio.gather(*(each.close() for each in made), return_exceptions=True)):
        if isinstance(result, LlmosError):
            log.info("closing sequence %d: %s", each.rid, result)
        elif isinstance(result, BaseException):
            raise result
