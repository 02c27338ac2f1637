"""Kills processes at named points of their code (llmos/killpoints.py), one point after the other, or two processes at once.

Every process of the run knows all points, each armed by a file of its own; the file is made when it is the point's turn, and whoever gets
there renames it to carry its pid, and dies. Points that nothing leads to while all runs well are led to: what is passed at a start by
killing the process before, what is done about a death by killing somebody else, what a verb does by asking for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from chaos.home import Home
from chaos.nemesis import HIT_EVERY_S, SUPERVISOR, Nemesis
from chaos.processes import children
from chaos.standin import Standin
from chaos.tally import Fault, Tally
from llmos import AsyncClient
from llmos.errors import LlmosError
from llmos.killpoints import POINTS

ARM_WAIT_S = 20.0
LOOK_S = 0.0005
PAUSE_S = 2.0  # so that the stalls of one point are not those of the next
NUDGE_S = 1.0
LEADS = {  # what leads to a point: the kind of process to kill, or "tenant" for a change of a tenant's limits
    "microkernel.start": "microkernel",
    "microkernel.carry": "microkernel",
    "microkernel.greeted": "gateway",
    "microkernel.death": "storage",
    "executor.start": "executor",
    "executor.again": "microkernel",
    "tokenizer.start": "tokenizer",
    "gateway.start": "gateway",
    "storage.start": "storage",
    "storage.received": "tenant",
    "storage.tenant": "tenant",
    "supervisor.start.": "supervisor",
    "supervisor.death": "storage",
    "supervisor.started": "storage",
}
PAIRS = (  # a point, and who dies with whoever gets there
    ("microkernel.journal.after", "gateway"),
    ("microkernel.sent.one", "gateway"),
    ("microkernel.journal.before", "executor"),
    ("microkernel.sent.all", "executor"),
    ("microkernel.handled", "tokenizer"),
    ("microkernel.carry.all", "executor"),
    ("microkernel.start.restored", "gateway"),
    ("executor.result.sent", "microkernel"),
    ("executor.step.computed", "gateway"),
    ("executor.plan.received", "tokenizer"),
    ("tokenizer.decoded", "gateway"),
    ("tokenizer.received", "microkernel"),
    ("gateway.client.handled", "microkernel"),
    ("gateway.kernel.received", "executor"),
    ("gateway.text.received", "supervisor"),
    ("storage.received", "microkernel"),
    ("supervisor.death.reaped", "microkernel"),
)


@dataclass(frozen=True)
class Target:
    """A point to kill at. `with_kind`: a process of that kind is killed as soon as somebody died there."""

    name: str
    with_kind: str | None = None

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def lead(self) -> str | None:
        return next((lead for prefix, lead in LEADS.items() if self.name.startswith(prefix)), None)

    @property
    def kinds(self) -> set[str]:
        """Of all that die."""
        lead = {self.lead} if self.lead not in (None, "tenant") else set()
        return {self.kind, *lead, *({self.with_kind} if self.with_kind else ())}  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.name if self.with_kind is None else f"{self.name} + {self.with_kind}"


def targets(names: Iterable[str], *, pairs: bool, seed: int) -> list[Target]:
    """In an order by chance: points of these names or beginnings, then the pairs."""
    chance = random.Random(seed)
    wanted = tuple(names)
    found = [Target(name) for name in POINTS if not wanted or name.startswith(wanted)]
    chance.shuffle(found)
    both = [Target(*pair) for pair in PAIRS if not wanted or pair[0].startswith(wanted)] if pairs else []
    return found + both


def armed_by_files(folder: Path) -> str:
    """The value of LLMOS_KILL_AT."""
    return ",".join(f"{name}@{folder / name}" for name in POINTS)


class PointNemesis(Nemesis):
    """`kill_all` instead of `run`."""

    def __init__(self, home: Home, standin: Standin, tally: Tally, *, hang_s: float) -> None:
        super().__init__(home, standin, tally, hang_s=hang_s)
        self._folder = home.points
        self.not_reached: list[str] = []

    async def kill_all(self, wanted: list[Target], stop: asyncio.Event) -> None:
        async with AsyncClient(self._home.run_dir) as client:
            for target in wanted:
                delay = max(self._limit.delay_s(kind, time.monotonic()) for kind in target.kinds)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), PAUSE_S + delay)
                if stop.is_set() or self._standin.failure is not None:
                    return
                await self._all_well()
                await self._kill_at(target, client)

    async def _all_well(self) -> None:
        """Before the next one everything has recovered, so that the point is reached in full work."""
        deadline = time.monotonic() + HIT_EVERY_S
        while self.num_open and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    async def _kill_at(self, target: Target, client: AsyncClient) -> None:
        trap = self._folder / target.name
        trap.touch()
        deadline, nudge_at = time.monotonic() + ARM_WAIT_S, time.monotonic()
        while (pid := self._victim(trap)) is None:
            if (now := time.monotonic()) > deadline:
                trap.unlink(missing_ok=True)
                self.not_reached.append(str(target))
                return
            if target.lead is not None and now >= nudge_at:
                nudge_at = now + (NUDGE_S if target.lead == "tenant" else ARM_WAIT_S / 2)
                await self._lead(target, client)
            await asyncio.sleep(LOOK_S)
        at = time.monotonic()
        also = self._kill(target.with_kind) if target.with_kind is not None else None
        service = SUPERVISOR if target.kind == "supervisor" else self._service(target.kind)
        self._note_death(target.kind, Fault(target.kind, str(target)[len(target.kind) + 1 :], service, pid, at))
        if also is not None and target.with_kind is not None:
            self._note_death(target.with_kind, Fault(target.with_kind, f"with {target.name}", *also, at))

    def _victim(self, trap: Path) -> int | None:
        found = next(self._folder.glob(f"{trap.name}.[0-9]*"), None)
        if found is None:
            return None
        found.unlink()
        return int(found.suffix[1:])

    def _service(self, kind: str) -> str:
        return f"executor.{self._home.model_name}" if kind == "executor" else kind

    async def _lead(self, target: Target, client: AsyncClient) -> None:
        if target.lead == "tenant":
            with contextlib.suppress(LlmosError, TimeoutError):
                async with asyncio.timeout(NUDGE_S):
                    await client.set_tenant("nobody", weight=1.0 + self._tally.num_violations)
            return
        assert target.lead is not None
        killed = self._kill(target.lead)
        if killed is not None and target.lead == target.kind:
            self._limit.hit(target.kind, time.monotonic())
        elif killed is not None:
            fault = Fault(target.lead, f"leads to {target.name}", *killed, time.monotonic())
            self._note_death(target.lead, fault)

    def _kill(self, kind: str) -> tuple[str, int] | None:
        """Service and pid of the one that was killed."""
        for name, process in self._candidates(kind):
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
                self.hit.add(process.pid)
                return name, process.pid
        return None

    def _note_death(self, kind: str, fault: Fault) -> None:
        self.hit.add(fault.pid)
        self.hit.update(child.pid for child in children(fault.pid).values())
        self._limit.hit(kind, fault.at)
        self._open.append(fault)
        self._tally.fault(fault)
