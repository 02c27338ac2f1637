"""The next event of a life, drawn from a seed and from how things are. What comes out is data (events.py)."""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Any

from kernel_world import token_at

from llmos.codes import FinishReason, PageFate
from simulation.events import Event
from simulation.ledger import Known
from simulation.look_verbs import NONSENSE
from simulation.setup import OWNERS, Setup, draw_limit
from simulation.world import GATES, World

_WEIGHTS = {
    "step": 60.0, "submit": 9.0, "spawn": 2.5, "append": 2.5, "continue": 4.5, "fork": 2.0, "attach": 2.5, "detach": 0.8,
    "ack": 5.0, "cancel": 1.2, "finish": 1.2, "kill": 0.8, "kill_many": 0.15, "close": 0.6, "suspend": 3.0, "resume": 3.5,
    "nice": 1.0, "deadline": 0.7, "after": 1.0, "wait": 0.8, "tenant": 1.2, "ready": 0.2, "down": 0.15, "lost": 0.15, "crash": 0.1,
    "journal": 0.1,
    "fail": 0.3, "time": 0.6, "storage_up": 0.2, "storage_down": 0.1, "models": 0.2, "nonsense": 1.5, "look": 2.0,
}  # fmt: skip
_FAULTS = ("lack", "lack all", "negative", "impossible", "position", "extra", "reversed", "old generation", "old step",
           "next step", "odd blob")  # fmt: skip


KINDS = tuple(_WEIGHTS)


class Chooser:
    """Draws events. Each seed has its own taste: how frequent each kind is."""

    def __init__(self, rng: random.Random, setup: Setup) -> None:
        self.rng = rng
        self.setup = setup
        self.kinds = list(_WEIGHTS)
        often = rng.choice((1, 1, 1, 1, 1, 1, 20))  # in some lives something kills executors
        weights = _WEIGHTS | {"down": _WEIGHTS["down"] * often}
        self.cum_weights = list(accumulate(weight * rng.lognormvariate(0.0, 0.8) for weight in weights.values()))
        self.faulty = rng.choice((0.0, 0.01, 0.05))
        self.owners = OWNERS[: rng.randint(1, len(OWNERS))]
        self.patience = rng.choice((0.0, 0.0, 0.001, 0.02))  # seconds between events
        self.limits = rng.choice((0, 0, 3, 6))  # set before anything else

    def next(self, world: World, number: int) -> Event:
        rng = self.rng
        if number < self.limits:
            return Event(number, "tenant", 0.0, self._tenant(world))
        down = [model for model in self.setup.models if model not in world.mirrors]
        if down and rng.random() < 0.2:
            return Event(number, "ready", 0.0, {"model": rng.choice(down)})
        if world.ledger.refusal and rng.random() < 0.1:
            return Event(number, "journal", 0.0, {"works": True})
        while True:
            [kind] = rng.choices(self.kinds, cum_weights=self.cum_weights)
            args = getattr(self, f"_{kind}", self._plain)(world)
            if args is not None:
                break
        dt = rng.choice((0.0, self.patience))
        if kind == "step":
            dt = rng.choice((0.002, 0.01))
        elif kind == "time":
            dt = rng.choice((0.03, 0.3, 1.0, 15.0, 1000.0))
        return Event(number, kind, dt, args)

    # ------------------------------------------------------------ helpers

    def _plain(self, world: World) -> dict[str, Any]:
        return {}

    def _gate(self) -> str:
        return self.rng.choice(GATES)

    def _pick(self, world: World, wanted: Any = None) -> Known | None:
        """Mostly one that lives and is `wanted`, now and then any."""
        rng = self.rng
        if rng.random() < 0.05 and world.ledger.all:
            return rng.choice(world.ledger.all[-30:])
        found = [known for known in world.ledger.live.values() if wanted is None or wanted(known)]
        return rng.choice(found) if found else None

    def _asker(self, known: Known) -> str | None:
        """Who asks: its owner, an administrator, or now and then somebody else."""
        return self.rng.choices((known.owner, None, self.rng.choice(OWNERS)), (50, 45, 5))[0]

    def _about(self, world: World, wanted: Any = None) -> dict[str, Any] | None:
        known = self._pick(world, wanted)
        return None if known is None else {"gate": self._gate(), "seq": known.label, "owner": self._asker(known)}

    def _reader(self, world: World, known: Known) -> str:
        """Mostly the gateway that reads it."""
        found = [name for name, gate in world.gates.items() if gate.peer == known.reader]
        return found[0] if found and self.rng.random() < 0.95 else self._gate()

    def _read(self, world: World) -> tuple[Known, dict[str, Any]] | None:
        known = self._pick(world, lambda known: known.generating and known.reader)
        return None if known is None else (known, {"gate": self._reader(world, known), "seq": known.label})

    def _prompt(self) -> list[int]:
        rng = self.rng
        most = min(self.setup.max_context, self.setup.num_pages * self.setup.page_size)
        length = rng.choice((0, rng.randint(0, min(12, most)), rng.randint(0, 2 * most // 3), rng.randint(0, 40)))
        return [rng.randrange(3), length, rng.randrange(5), rng.randint(length == 0, 6)]

    def _sampling(self, length: int) -> dict[str, Any]:
        rng = self.rng
        seed = rng.choice((None, rng.randrange(50), rng.randrange(50)))
        sampling: dict[str, Any] = {"max_tokens": rng.choice((None, 1, 2, 5, 12, 40)), "seed": seed}
        if seed is not None and rng.random() < 0.4:
            hits = [token_at(seed, length + rng.randrange(12)) for _ in range(rng.randint(1, 2))]
            sampling["stop_token_ids"] = hits + [rng.randrange(1000) for _ in range(rng.choice((0, 1, 5)))]
            sampling["min_tokens"] = rng.choice((0, 0, 3))
            if sampling["max_tokens"] is not None:
                sampling["min_tokens"] = min(sampling["min_tokens"], sampling["max_tokens"])
        if rng.random() < 0.15:
            sampling["logprobs"] = 0
        return sampling

    def _deadline_ms(self) -> float | None:
        return self.rng.choices((None, 40.0, 400.0, 60_000.0, -1.0), (70, 8, 12, 9, 1))[0]

    def _entry(self, world: World) -> dict[str, Any] | None:
        rng = self.rng
        if len(world.ledger.live) >= self.setup.max_live:
            return None
        others = [known.label for known in world.ledger.all[-12:]]
        again = rng.choice(world.ledger.all[-12:]) if others and rng.random() < 0.15 else None
        return {
            "again": None if again is None else [again.label, rng.randint(1, again.seen + 1)],
            "gate": self._gate(),
            "model": rng.choice(self.setup.models),
            "owner": rng.choice(self.owners),
            "prompt": self._prompt(),
            "nice": rng.choices((0, rng.randint(-20, 19), 20), (60, 38, 2))[0],
            "parent": rng.choice(others) if others and rng.random() < 0.15 else None,
            "after": rng.sample(others, min(len(others), rng.randint(1, 3))) if rng.random() < 0.12 else [],
            "request_id": rng.choice(("r1", "r2", "r3")) if rng.random() < 0.1 else None,
        }

    # ------------------------------------------------------------ one function per kind that has arguments

    def _step(self, world: World) -> dict[str, Any] | None:
        rng = self.rng
        busy = [model for model, mirror in world.mirrors.items() if mirror.executor.inbox]
        if not busy:
            return None
        args: dict[str, Any] = {"model": rng.choice(busy), "busy_us": rng.choice((10, 100, 900, 5000))}
        if rng.random() < self.faulty:
            args |= {"fault": rng.choice(_FAULTS), "place": rng.randrange(8)}
        return args

    def _submit(self, world: World) -> dict[str, Any] | None:
        args = self._entry(world)
        if args is not None and args["request_id"] == "r1":  # asked again and again
            return args | {
                "again": None,
                "prompt": [0, 5, 0, 1],
                "nice": 0,
                "parent": None,
                "after": [],
                "sampling": {"max_tokens": 5, "seed": 1},
            }
        if args is not None:
            copied = args["again"][1] if args["again"] else 0
            args["sampling"] = self._sampling(copied + args["prompt"][1] + args["prompt"][3])
            args["deadline_ms"] = self._deadline_ms()
        return args

    def _spawn(self, world: World) -> dict[str, Any] | None:
        args = self._entry(world)
        if args is not None and self.rng.random() < 0.2:
            args["prompt"] = [0, 0, 0, 0]
        return args

    def _append(self, world: World) -> dict[str, Any] | None:
        args = self._about(world, lambda known: known.is_open and not known.generating)
        rng = self.rng
        if args is None:
            return None
        known = world.ledger.by_label[args["seq"]]
        if known.appended is not None and rng.random() < 0.1:  # the same again, as if the answer had been lost
            return args | {"prompt": known.appended[1], "expect": known.appended[0]}
        args["expect"] = rng.choices((None, known.seen, known.seen + 1, 0), (70, 24, 3, 3))[0]
        return args | {"prompt": [rng.randrange(3), rng.randint(0, 8), rng.randrange(5), rng.randint(0, 3)]}

    def _continue(self, world: World) -> dict[str, Any] | None:
        args = self._about(world, lambda known: known.is_open and not known.generating)
        if args is None:
            return None
        known = world.ledger.by_label[args["seq"]]
        length = len(known.before) + len(known.output)
        expects = (None, known.seen, len(known.before), known.seen + 1)
        args["expect"] = self.rng.choices(expects, (65, 20, 12, 3))[0]
        return args | {"sampling": self._sampling(length), "deadline_ms": self._deadline_ms()}

    def _fork(self, world: World) -> dict[str, Any] | None:
        if len(world.ledger.live) >= self.setup.max_live:
            return None
        args = self._about(world)
        return args and args | {"count": self.rng.choices((1, 2, 5, 0, 257), (50, 30, 16, 2, 2))[0]}

    def _attach(self, world: World) -> dict[str, Any] | None:
        return self._about(world, self.rng.choice((None, lambda known: known.generating)))

    def _detach(self, world: World) -> dict[str, Any] | None:
        found = self._read(world)
        return found and found[1]

    def _ack(self, world: World) -> dict[str, Any] | None:
        found = self._read(world)
        if found is None:
            return None
        known, args = found
        count = known.seen - len(known.before)
        return args | {"upto": self.rng.choice((count, count, self.rng.randint(0, count), count + 3, -1))}

    def _cancel(self, world: World) -> dict[str, Any] | None:
        found = self._read(world)
        reasons = (FinishReason.CANCELLED, FinishReason.TOKENIZER_FAILED, FinishReason.STOP)
        return found and found[1] | {"reason": int(self.rng.choices(reasons, (60, 35, 5))[0])}

    def _finish(self, world: World) -> dict[str, Any] | None:
        found = self._read(world)
        if found is None or self.rng.random() < 0.2:  # its last reader may say so late
            known = self._pick(world, lambda known: known.last_end is not None and known.last_reader)
            gates = [name for name, gate in world.gates.items() if known is not None and gate.peer == known.last_reader]
            if known is None or not gates:
                return None
            found = known, {"gate": gates[0], "seq": known.label}
        known, args = found
        count = known.seen - len(known.before)
        return args | {"upto": self.rng.choices((self.rng.randint(0, count), count + 1, -1), (92, 4, 4))[0]}

    def _kill(self, world: World) -> dict[str, Any] | None:
        return self._about(world)

    def _kill_many(self, world: World) -> dict[str, Any] | None:
        rng = self.rng
        args: dict[str, Any] = {"gate": self._gate(), "owner": rng.choice((None, rng.choice(self.owners)))}
        known = self._pick(world)
        what = rng.choice(("tenant", "job", "job", "model", "none"))
        if what == "job" and known is not None:
            args["job"] = known.label
        elif what == "tenant":
            args["tenant"] = rng.choice(OWNERS)
        elif what == "model":
            args |= {"model": rng.choice(self.setup.models), "tenant": rng.choice(OWNERS)}
        return args

    def _close(self, world: World) -> dict[str, Any] | None:
        return self._about(world, lambda known: known.is_open)

    def _suspend(self, world: World) -> dict[str, Any] | None:
        args = self._about(world)
        return args and args | {"pages": self.rng.choices((*map(int, PageFate), 3), (32, 32, 32, 4))[0]}

    def _resume(self, world: World) -> dict[str, Any] | None:
        return self._about(world, lambda known: known.suspended)

    def _nice(self, world: World) -> dict[str, Any] | None:
        args = self._about(world)
        return args and args | {"nice": self.rng.choice((self.rng.randint(-20, 19), self.rng.randint(-21, 20)))}

    def _deadline(self, world: World) -> dict[str, Any] | None:
        args = self._about(world, lambda known: known.generating)
        return args and args | {"deadline_ms": self._deadline_ms()}

    def _after(self, world: World) -> dict[str, Any] | None:
        args = self._about(world, lambda known: not known.started)
        if args is None:
            return None
        others = list(world.ledger.live.values())[-12:]
        labels = [known.label for known in (*others, *world.ledger.all[-2:])]
        return args | {"after": self.rng.sample(labels, min(len(labels), self.rng.randint(0, 3)))}

    def _wait(self, world: World) -> dict[str, Any] | None:
        return self._about(world)

    def _tenant(self, world: World) -> dict[str, Any]:
        change = draw_limit(self.rng, world.shapes[self.setup.models[0]][0])
        return {"gate": self._gate(), "name": self.rng.choice(OWNERS), "change": change}

    def _ready(self, world: World) -> dict[str, Any]:
        args: dict[str, Any] = {"model": self.rng.choice(self.setup.models)}
        if self.rng.random() < 0.2:  # it found less memory free, or more
            args["num_pages"] = self.rng.randint(1, 2 * self.setup.num_pages)
            args["host_pages"] = self.rng.choice((0, self.setup.host_pages, 3 * self.setup.host_pages))
        return args

    def _down(self, world: World) -> dict[str, Any]:
        model, rng = self.rng.choice(self.setup.models), self.rng
        return {"model": model, "replaced": rng.random() < 0.6, "asked": rng.random() < 0.2}

    def _journal(self, world: World) -> dict[str, Any]:
        return {"works": False}

    def _lost(self, world: World) -> dict[str, Any]:
        return {"gate": self._gate()}

    _models = _lost

    def _fail(self, world: World) -> dict[str, Any] | None:
        known = self._pick(world, lambda known: known.generating)
        reason = self.rng.choice((int(FinishReason.NUMERICAL_ERROR),) * 3 + (int(FinishReason.STOP), 99))
        times = self.rng.choice((1, 1, 2))
        return None if known is None else {"seq": known.label, "reason": reason, "times": times}

    def _storage_up(self, world: World) -> dict[str, Any]:
        return {"synced": self.rng.random() < 0.9}

    def _nonsense(self, world: World) -> dict[str, Any]:
        return {"what": self.rng.choice(NONSENSE)}

    def _look(self, world: World) -> dict[str, Any] | None:
        what = self.rng.choice(("ps", "status", "tenants", "stat", "stat", "explain"))
        args = self._about(world)
        return args and args | {"what": what}
