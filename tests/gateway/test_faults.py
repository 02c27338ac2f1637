"""Whatever dies whenever, clients get exactly what they get when nothing dies, and nothing is left behind.

Random schedules of gateway_faults.py: messages, steps, clients that read, and deaths of the microkernel and of the tokenizer, of both, and
again before everything was repaired. The tokenizer decodes bytes and stop strings as the real one does, so that characters and stop
strings are cut anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any
from unittest import mock

import pytest
import tiny_tokenizers as tiny
from gateway_faults import FaultyWorld

from llmos.codes import FinishReason
from llmos.protocol import messages as m
from llmos.protocol.params import SamplingParams
from llmos.services.gateway import feed as feed_module
from llmos.services.gateway import router as router_module
from llmos.services.tokenizer.incremental import DecodePlan

PLAN = DecodePlan(tiny.byte_level())
ALPHABET = sorted({token for char in "abEé" for token in tiny.byte_level().encode(char).ids})
STOPS: tuple[tuple[str, ...], ...] = ((), ("ab",), ("bEb", "aaaa"), ("é",), ("Ea", "E"))
MOST_MOVES = 20_000
Ask = Callable[[int, int], m.Message]  # (req, rid) -> what to ask


@dataclass
class Outcome:
    """What came of one request."""

    ids: tuple[int, ...] = ()
    text: str = ""
    last: tuple[Any, ...] = ()


@dataclass
class Caller:
    """A client that asks one thing after the other, and acknowledges what it has read. `stays`: it leaves after so many moves."""

    name: bytes
    asks: list[Ask]
    stays: int = MOST_MOVES
    rid: int = 0
    num_read: int = 0
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.outcomes) == len(self.asks) and bool(self.outcomes[-1].last)

    def go(self, world: FaultyWorld) -> bool:
        """Read the next message, or ask the next question; False if there is nothing to do."""
        if self.stays <= 0:
            if self.stays == 0:
                world.leave(self.name)
            self.stays -= 1
            return self.stays == -1
        self.stays -= 1
        got = world.got(self.name)
        if self.num_read < len(got):
            self.num_read += 1
            self._read(world, got[self.num_read - 1])
            return True
        if len(self.outcomes) < len(self.asks) and (not self.outcomes or self.outcomes[-1].last):
            self.outcomes.append(Outcome())
            world.client(self.name, self.asks[len(self.outcomes) - 1](len(self.outcomes), self.rid))
            return True
        return False

    def _read(self, world: FaultyWorld, message: Any) -> None:
        outcome = self.outcomes[-1]
        assert message.req == len(self.outcomes), f"{message} after the end"
        assert not outcome.last, f"{message} after the end"
        if isinstance(message, m.Tokens):
            start = getattr(self.asks[len(self.outcomes) - 1](1, 1), "offset", 0)
            assert message.offset == start + len(outcome.ids)
            outcome.ids += message.ids
            outcome.text += message.text
            world.client(self.name, m.Ack(message.req, message.offset + len(message.ids)))
        elif isinstance(message, m.Accepted | m.Spawned):
            self.rid = message.rid
        if isinstance(message, m.Spawned | m.Appended):
            outcome.last = (type(message), message.num_tokens)
        elif isinstance(message, m.Finished):
            outcome.text += message.text
            outcome.last = (message.reason, message.stop_string, message.usage.output_tokens)
        elif isinstance(message, m.Error):
            outcome.last = (message.code, message.message)


def generate(text: str, params: SamplingParams, key: str | None) -> Ask:
    return lambda req, _: m.Generate(req, None, text, None, None, params, key)


def attach(offset: int) -> Ask:
    return lambda req, rid: m.Attach(req, rid, offset)


def spawn(text: str) -> Ask:
    return lambda req, _: m.Spawn(req, None, text=text)


def append(text: str) -> Ask:
    return lambda req, rid: m.Append(req, rid, "echo", text, None)


def go_on(params: SamplingParams) -> Ask:
    return lambda req, rid: m.Continue(req, rid, "echo", params)


def callers(random: Random) -> list[Caller]:
    """Generates of which some are read again, and conversations."""

    def params() -> SamplingParams:
        return SamplingParams(max_tokens=random.randint(1, 20), stop=random.choice(STOPS))

    def prompt() -> str:
        return "".join(random.choices("xyz", k=random.randint(1, 4)))

    found = []
    for number in range(random.randint(1, 4)):
        key = random.choice([None, f"own-{number}", f"auto-{number}"])
        asks = [generate(prompt(), params(), key), attach(random.randint(0, 12))]
        found.append(Caller(b"generates %d" % number, asks[: random.randint(1, 2)]))
    for number in range(random.randint(0, 3)):
        asks = [spawn(prompt())]
        for _ in range(random.randint(1, 2)):
            asks += [append(prompt()), go_on(params())]
        found.append(Caller(b"talks %d" % number, asks))
    return found


def run(world: FaultyWorld, everybody: list[Caller], random: Random, faults: float) -> int:
    """Until all is done; returns how many services died. `faults`: how likely each step is one."""
    deaths = 0
    most = random.choice([0, 3, 10]) if faults else 0
    for _ in range(MOST_MOVES):
        down = [link for link in (world.kernel, world.text) if not link.is_up]
        up = [link for link in (world.kernel, world.text) if link.is_up]
        chance = random.random()
        if up and chance < faults and deaths < most:
            world.lose(random.choice(up))
            deaths += 1
        elif chance < 1.5 * faults and world.drop():
            pass
        elif down and random.random() < 0.1:
            world.bring(random.choice(down))
        else:
            choices = [*world.moves(), *(("go", caller) for caller in everybody)]
            random.shuffle(choices)
            if not any(_do(world, *choice) for choice in choices) and not down:
                return deaths
    raise AssertionError("it never ends")


def _do(world: FaultyWorld, kind: str, what: Any) -> bool:
    """False if a client has nothing to do."""
    if kind == "go":
        return bool(what.go(world))
    world.move(kind, what)
    return True


def contents(world: FaultyWorld, everybody: list[Caller]) -> list[list[int]]:
    """The tokens of the open sequences."""
    return [world.microkernel.lives[caller.rid].tokens for caller in everybody if caller.name.startswith(b"talks")]


def check_end(world: FaultyWorld) -> None:
    assert len(world.router) == 0
    assert world.router.waiting_bytes == 0
    assert not any(life.generating for life in world.microkernel.lives.values())


@pytest.mark.parametrize("block", range(8))
def test_clients_get_what_they_get_when_nothing_dies(block: int) -> None:
    deaths = 0
    for seed in range(block * 40, block * 40 + 40):
        results = []
        for faults in (0.0, 0.02):
            random = Random(seed)
            everybody, world = callers(random), FaultyWorld(PLAN, ALPHABET)
            with (
                mock.patch.object(feed_module, "AT_ONCE", random.choice([1, 3, 1024])),
                mock.patch.object(router_module, "MAX_STRIKES", 1_000_000),
            ):
                deaths += run(world, everybody, random, faults)
            assert all(caller.is_done for caller in everybody), f"seed {seed}"
            check_end(world)
            results.append(([caller.outcomes for caller in everybody], contents(world, everybody)))
            num_open = sum(caller.name.startswith(b"talks") for caller in everybody)
            assert len(world.microkernel.lives) == len(everybody), f"seed {seed}: something was made twice"
            assert sum(life.is_open for life in world.microkernel.lives.values()) == num_open
        assert results[0] == results[1], f"seed {seed}"
    assert deaths > 50


@pytest.mark.parametrize("block", range(4))
def test_whoever_leaves_leaves_nothing_behind(block: int) -> None:
    """What was made for a client that left is ended, unless it was meant to be found again; what goes on is read by nobody."""
    for seed in range(block * 40, block * 40 + 40):
        random = Random(seed)
        everybody, world = callers(random), FaultyWorld(PLAN, ALPHABET)
        leaver = random.choice(everybody)
        leaver.stays = random.randint(1, 60)
        with mock.patch.object(router_module, "MAX_STRIKES", 1_000_000):
            run(world, everybody, random, 0.02)
        assert all(caller.is_done for caller in everybody if caller is not leaver), f"seed {seed}"
        check_end(world)
        for life in world.microkernel.lives.values():
            assert not life.reads
            if life.end is not None and life.end.reason == FinishReason.CANCELLED:
                assert not life.is_open, f"seed {seed}: an open sequence goes on without its client"
