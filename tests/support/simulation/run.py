"""A life of the microkernel: from a seed, or from a list of events; then everything that lives comes to its end.

Raises what the first violation raised. Invariant: the same seed gives the same events, plans and answers in every process.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from zlib import crc32

from llmos.microkernel.sequence import NOBODY
from llmos.protocol.limits import UNLIMITED
from simulation import look_verbs, machine_verbs, owner_verbs, stream_verbs
from simulation.choose import Chooser
from simulation.events import Event
from simulation.oracles import check, remember
from simulation.setup import Setup, draw_setup
from simulation.verbs import VERBS
from simulation.world import World

_MOST_ROUNDS = 20_000  # tiny machines with a window of one token compute everything many times over
ENTERED = (look_verbs, machine_verbs, owner_verbs, stream_verbs)  # importing them enters their verbs


@dataclass
class Life:
    """What happened so far. `digest` sums up what the executors were told."""

    setup: Setup
    world: World
    events: list[Event] = field(default_factory=list)
    count: int = 0  # with those of the end
    steps: int = 0  # that executors finished
    digest: int = 0

    def apply(self, event: Event) -> None:
        """One event, and all that must hold behind it."""
        world = self.world
        before = remember(world)
        world.now += event.dt
        self.count += 1
        self.steps += event.kind == "step"
        VERBS[event.kind](world, before, event.number, **event.args)
        world.tick()
        check(world, before, event.number)
        world.replies.clear()
        for mirror in world.mirrors.values():
            self.digest = crc32(b"%d %d" % (mirror.last_step, mirror.executor.computed_tokens), self.digest)


def setup_of(seed: int) -> Setup:
    return draw_setup(random.Random(f"setup {seed}"))


def live(seed: int, num_events: int) -> Life:
    """A whole life from a seed. On a violation the exception has the life as `life`."""
    rng = random.Random(f"events {seed}")
    life = Life(setup_of(seed), World(setup_of(seed)))
    chooser = Chooser(rng, life.setup)
    try:
        for number in range(num_events):
            event = chooser.next(life.world, number)
            life.events.append(event)
            life.apply(event)
        wind_up(life)
    except BaseException as error:
        error.life = life
        raise
    return life


def replay(setup: Setup, events: list[Event]) -> Life:
    """The same life again, or what is left of it without some of its events."""
    life = Life(setup, World(setup), list(events))
    for event in events:
        life.apply(event)
    wind_up(life)
    return life


def wind_up(life: Life) -> None:
    """Faults and arrivals stop, all are resumed and read, limits are lifted: everything must come to its end, and nothing be left."""
    world, number = life.world, 1_000_000
    for kind, args in (("journal", {"works": True}), *(("ready", {"model": model}) for model in world.setup.models)):
        life.apply(Event(number, kind, 0.0, args))
        number += 1
    for name in world.ledger.limits:
        number += 1
        life.apply(
            Event(
                number,
                "tenant",
                0.0,
                {"gate": "g1", "name": name, "change": {"max_running": UNLIMITED, "tokens_per_s": 0.0}},
            )
        )
    for _ in range(_MOST_ROUNDS):
        if not world.ledger.live:
            break
        for event in _round(world, number):
            life.apply(event)
            number += 1
    assert not world.ledger.live, f"never ended: {[known.label for known in world.ledger.live.values()]}"
    while any(mirror.executor.inbox for mirror in world.mirrors.values()):
        for model in world.setup.models:
            life.apply(Event(number, "step", 0.0, {"model": model}))
    life.apply(Event(number, "time", world.setup.retention_s + 1.0))
    _check_empty(world)


def _round(world: World, number: int) -> list[Event]:
    """Everybody gets on by a bit."""
    events = []
    for known in list(world.ledger.live.values()):
        args = {"gate": "g1", "seq": known.label}
        reader = next((name for name, gate in world.gates.items() if gate.peer == known.reader), None)
        if known.suspended:
            events.append(("resume", args))
        if known.generating and reader is None:
            events.append(("attach", args))
        if known.generating and known.acked < known.seen - len(known.before):
            events.append(("ack", {"gate": reader or "g1", "seq": known.label, "upto": 10**6}))
        if known.is_open and not known.generating:
            events.append(("close", args))
    for model in world.setup.models:
        events += [("step", {"model": model})] * 2
    return [
        Event(number + index, kind, 0.01 if kind == "step" else 0.0, args) for index, (kind, args) in enumerate(events)
    ]


def _check_empty(world: World) -> None:
    """Nobody lives, so nothing is held, remembered or waited for."""
    state = world.kernel.state
    assert not state.sequences
    assert not state.ended
    assert not world.waits
    for model, lane in state.lanes.items():
        assert all(tenant.pages == tenant.running == tenant.waiting == 0 for tenant in lane.tenants.all)
        if lane.scheduler is not None:
            status = lane.status()
            assert status.pages_free + status.pages_cached == status.pages_total, f"{model}: pages leaked"
            assert status.host_pages_free == status.host_pages_total, f"{model}: host pages leaked"
            assert not lane.scheduler.in_flight
    assert world.storage.peer == 0 or state.storage != NOBODY
