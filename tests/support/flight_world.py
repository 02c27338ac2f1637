"""A random life of a kernel for the tests of snapshots and of the flight recorder: every verb, executor deaths, quota changes.

`live` drives a `World`; whatever it refuses with a typed error is part of life. `Twins` is two kernels that must do the same, `Recorded`
one behind a flight recorder.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from zlib import crc32

import msgspec
from kernel_world import CONTROL, GATEWAY, World

from llmos.codes import FinishReason, PageFate
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.recorder import FRAME, MAGIC, Delivery, Recorder
from llmos.microkernel.sender import Sender
from llmos.protocol import messages as m
from llmos.protocol.limits import UNLIMITED

OWNERS = ("alice", "bob", "carol")


def make_world(seed: int, **changes: object) -> World:
    rng = random.Random(seed)
    shape = {
        "num_pages": rng.choice([24, 40, 60]), "page_size": rng.choice([2, 4]), "max_rows": rng.randint(2, 10),
        "max_step_tokens": rng.randint(6, 40), "steps_in_flight": rng.randint(1, 3), "host_pages": rng.choice([0, 20]),
        "policy": rng.choice(["fair", "fair", "fcfs"]), "window": rng.choice([8, 10**6]), "retention_s": 1.0,
        "idle_timeout_s": 20.0,
    }  # fmt: skip
    world = World(**shape | changes)
    world.start_executor()
    return world


def live(world: World, rng: random.Random, events: int) -> None:
    for _ in range(events):
        if rng.random() < 0.45:
            if not world.step():
                world.now += 0.02  # token rates refill, deadlines pass
            continue
        act = rng.choice(_ACTS) if world.streams else _submit
        try:
            act(world, rng)
        except AssertionError as refused:
            if "Error(" not in str(refused):
                raise


def _prompt(rng: random.Random) -> list[int]:
    family = rng.randrange(3)
    return [(family * 7 + i) % 1000 for i in range(rng.randint(1, 20))] + [rng.randrange(1000)]


def _rid(world: World, rng: random.Random) -> int:
    """Mostly one that lives, now and then one that does not."""
    return rng.choice(list(world.streams)[-12:])


def _submit(world: World, rng: random.Random) -> None:
    world.submit(
        _prompt(rng), owner=rng.choice(OWNERS), nice=rng.choice([0, 0, 5, -3]), deadline_ms=rng.choice([None, None, 60.0]),
        max_tokens=rng.choice([1, 4, 20]), seed=rng.choice([None, 5, 6]) or rng.randrange(100),
        stop_token_ids=tuple(rng.randrange(1000) for _ in range(rng.choice([0, 3, 30]))),
    )  # fmt: skip


def _spawn(world: World, rng: random.Random) -> None:
    world.spawn(_prompt(rng), owner=rng.choice(OWNERS))


def _verb(build: Callable[[World, random.Random], m.Message], sender: object = CONTROL) -> Callable[..., None]:
    def act(world: World, rng: random.Random) -> None:
        world.send(sender, build(world, rng))

    return act


def _change_tenant(world: World, rng: random.Random) -> m.Message:
    pages = world.shape[0]
    change = rng.choice(
        [
            {"weight": rng.choice([0.5, 1.0, 3.0])},
            {"max_pages": rng.choice([pages // 2, UNLIMITED])},
            {"guaranteed_pages": rng.choice([0, pages // 8])},
            {"tokens_per_s": rng.choice([0.0, 300.0])},
        ]
    )
    return m.TenantSet(1, rng.choice(OWNERS), **change)


def _die(world: World, rng: random.Random) -> None:
    if rng.random() < 0.1:
        world.start_executor()


_ACTS: list[Callable[[World, random.Random], None]] = [
    _submit,
    _submit,
    _submit,
    _spawn,
    _die,
    lambda world, rng: world.append(_rid(world, rng), _prompt(rng)[:5]),
    lambda world, rng: world.continue_(_rid(world, rng), max_tokens=rng.choice([2, 6]), seed=rng.randrange(50)),
    _verb(lambda world, rng: m.Fork(1, _rid(world, rng), rng.randint(1, 2))),
    _verb(lambda world, rng: m.SeqCancel(_rid(world, rng), FinishReason.CANCELLED), GATEWAY),
    _verb(lambda world, rng: m.SeqAck(_rid(world, rng), rng.randint(0, 20)), GATEWAY),
    _verb(lambda world, rng: m.Kill(1, _rid(world, rng))),
    _verb(lambda world, rng: m.Suspend(1, _rid(world, rng), rng.choice(list(PageFate)))),
    _verb(lambda world, rng: m.Resume(1, _rid(world, rng))),
    _verb(lambda world, rng: m.Nice(1, _rid(world, rng), rng.randint(-20, 19))),
    _verb(lambda world, rng: m.Deadline(1, _rid(world, rng), rng.choice([None, 100.0]))),
    _verb(lambda world, rng: m.Wait(rng.randint(2, 99), _rid(world, rng))),
    _verb(lambda world, rng: m.Explain(1, _rid(world, rng))),
    _verb(lambda world, rng: m.Stat(1, _rid(world, rng))),
    _verb(lambda world, rng: m.PsGet(1)),
    _verb(lambda world, rng: m.StatusGet(1)),
    _verb(_change_tenant),
]


class Twins:
    """Stands in for `world.kernel`: a second kernel gets every call too, and must answer the same."""

    def __init__(self, first: Kernel, second: Kernel) -> None:
        self.first, self.second = first, second
        self.calls = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.first, name)

    def handle(self, *args: object) -> list:
        return self._both("handle", *args)

    def tick(self, *args: object) -> list:
        return self._both("tick", *args)

    def check(self) -> None:
        self.first.check()
        self.second.check()

    def _both(self, name: str, *args: object) -> list:
        effects = getattr(self.first, name)(*args)
        assert getattr(self.second, name)(*args) == effects
        self.calls += 1
        return effects


class Recorded:
    """Stands in for `world.kernel`: every call goes through a flight recorder, which may begin a new segment after each."""

    def __init__(self, kernel: Kernel, budget: int) -> None:
        self.kernel = kernel
        self.recorder = Recorder(kernel, budget)
        self.recorder.roll(0.0, idle=True)
        self.now = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self.kernel, name)

    def handle(self, sender: Sender, message: m.Message, now: float) -> list:
        return self._sends(self.recorder.handle(sender, message, now), now)

    def tick(self, now: float) -> list:
        return self._sends(self.recorder.tick(now), now)

    def check(self) -> None:
        self.recorder.check(self.now)

    def file(self, reason: str = "test") -> bytes:
        return b"".join(self.recorder.file(reason, 1_700_000_000.0, self.now))

    def _sends(self, deliveries: list[Delivery], now: float) -> list:
        self.now = now
        self.recorder.roll(now, idle=False)
        return [delivery.effect for delivery in deliveries]


def recorded_world(seed: int, events: int, budget: int = 1 << 24) -> World:
    """A world in the middle of its life, recorded from its start; `world.kernel` is `Recorded`."""
    world = make_world(seed)
    world.kernel = Recorded(world.kernel, budget)
    live(world, random.Random(seed), events)
    return world


def records(data: bytes) -> list[list]:
    """The records of a flight file, each as its fields and the message behind it."""
    found, place = [], len(MAGIC)
    while place < len(data):
        length, behind, _ = FRAME.unpack_from(data, place)
        begin = place + FRAME.size
        place = begin + length + behind
        found.append([msgspec.msgpack.decode(data[begin : begin + length]), data[begin + length : place]])
    return found


def flight_file(found: list[list]) -> bytes:
    """The inverse of `records`, with fresh checksums: what was changed in between is planted, not damage."""
    pieces = [MAGIC]
    for fields, message in found:
        packed = msgspec.msgpack.encode(fields)
        pieces += [FRAME.pack(len(packed), len(message), crc32(message, crc32(packed))), packed, message]
    return b"".join(pieces)
