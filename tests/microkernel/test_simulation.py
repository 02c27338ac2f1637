"""Seeded simulation: arrivals, cancels, kills, suspensions, renices, quota changes, slow readers, executor restarts.

After every step all invariants are asserted (World.step), every stream must be the known answer, and at the end everything that was
accepted has exactly one end and no page is held. A failing seed reproduces by its number.
"""

from __future__ import annotations

import random

import pytest
from kernel_world import CONTROL, GATEWAY, World

from llmos.codes import ErrorCode, FinishReason, PageFate
from llmos.protocol import messages as m
from llmos.protocol.limits import UNLIMITED

OWNERS = ("alice", "bob", "carol")


def simulate(seed: int, events: int) -> World:
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4, 8])
    num_pages = rng.randint(64, 160) // page_size
    world = World(
        num_pages=num_pages, page_size=page_size, max_rows=rng.randint(1, 12), max_step_tokens=rng.randint(3, 40),
        steps_in_flight=rng.randint(1, 4), prefix_cache=rng.random() < 0.8, window=rng.choice([4, 10**6]),
    )  # fmt: skip
    world.start_executor()
    families = [[rng.randrange(1000) for _ in range(24)] for _ in range(3)]
    for _ in range(events):
        _one_event(world, rng, families, num_pages * page_size)
    _settle(world)
    return world


def _one_event(world: World, rng: random.Random, families: list[list[int]], capacity: int) -> None:
    kind = rng.random()
    live = list(world.kernel.state.sequences)
    if kind < 0.12 and len(live) < 40:
        prompt = rng.choice(families)[: rng.randint(1, 24)] + [rng.randrange(1000) for _ in range(rng.randint(0, 6))]
        stop = tuple(rng.randrange(1000) for _ in range(rng.choice([0, 0, 30])))
        world.submit(
            prompt[: capacity - 2],
            max_tokens=rng.choice([None, 1, 3, 12, 40]),
            seed=rng.randrange(50),
            stop_token_ids=stop,
        )
    elif kind < 0.15 and live:
        world.send(GATEWAY, m.SeqCancel(rng.choice(live), FinishReason.CANCELLED))
    elif kind < 0.16 and live:
        world.send(CONTROL, m.Kill(1, rng.choice(live)))
    elif kind < 0.17 and live:
        rid = rng.choice(live)
        world.send(GATEWAY, m.SeqFinish(rid, rng.randint(0, len(world.streams[rid].ids))))
    elif kind < 0.22 and live:
        rid = rng.choice(live)
        world.send(GATEWAY, m.SeqAck(rid, len(world.streams[rid].ids)))
    elif kind < 0.26 and live:
        world.send(CONTROL, m.Suspend(1, rng.choice(live), rng.choice(list(PageFate))))
    elif kind < 0.31 and live:
        world.send(CONTROL, m.Resume(1, rng.choice(live)))
    elif kind < 0.33 and live:
        world.send(CONTROL, m.Nice(1, rng.choice(live), rng.randint(-20, 19)))
    elif kind < 0.35:
        _change_tenant(world, rng)
    elif kind < 0.355:
        world.start_executor()  # registers anew: all pages void
    elif kind < 0.36 and live and world.executor is not None:
        world.executor.fail_rows[rng.choice(live)] = FinishReason.NUMERICAL_ERROR
    else:
        world.step()


def _try_submit(world: World, rng: random.Random, prompt: list[int], stop: tuple[int, ...], options: dict) -> None:
    """A refusal is fine if it is typed: quotas and deadlines may not allow the sequence."""
    owner = rng.choice(OWNERS)
    limit = rng.choice([None, 1, 3, 12, 40])
    try:
        world.submit(prompt, owner=owner, max_tokens=limit, seed=rng.randrange(50), stop_token_ids=stop, **options)
    except AssertionError:
        assert world.replies[-1].code in (ErrorCode.CONTEXT_TOO_LONG, ErrorCode.OVERLOADED, ErrorCode.INVALID_REQUEST)


def _change_tenant(world: World, rng: random.Random) -> None:
    pages = world.shape[0]
    change = rng.choice(
        [
            {"weight": rng.choice([0.5, 1.0, 3.0])},
            {"max_pages": rng.choice([pages // 2, pages, UNLIMITED])},
            {"guaranteed_pages": rng.choice([0, pages // 8, pages // 4])},
            {"max_running": rng.choice([1, 3, UNLIMITED])},
            {"tokens_per_s": rng.choice([0.0, 50.0, 1000.0])},
        ]
    )
    world.send(CONTROL, m.TenantSet(1, rng.choice(OWNERS), **change))


def _settle(world: World) -> None:
    while world.kernel.state.sequences:
        world.run()
        world.now += 1.0  # token rates refill
        for rid in list(world.kernel.state.sequences):
            world.send(CONTROL, m.Resume(1, rid))
        for rid in list(world.kernel.state.sequences):  # only unread streams may be left
            world.send(GATEWAY, m.SeqAck(rid, len(world.streams[rid].ids)))
    world.run()


@pytest.mark.parametrize("seed", range(60))
def test_random_life(seed: int):
    world = simulate(seed, events=600)
    for rid, stream in world.streams.items():
        assert stream.ids == stream.expected(len(stream.ids)), f"seed {seed}, rid {rid}"
        assert stream.end is not None, f"seed {seed}, rid {rid} never ended"
        if stream.end.reason == FinishReason.LENGTH and stream.params.max_tokens is not None:
            assert len(stream.ids) <= stream.params.max_tokens
    status = world.kernel.state.lanes["demo"].status()
    assert status.pages_free + status.pages_cached == status.pages_total, f"seed {seed}: pages leaked"


def test_the_same_seed_gives_the_same_plans():
    assert simulate(3, 300).plans == simulate(3, 300).plans
