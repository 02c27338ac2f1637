"""Carries out the script of faults and watches the recovery from each.

A fault is injected when its process is there: one that is just being started again is waited for, or hit while it starts. Only
children of the llmosd that this run started, and that llmosd itself, are ever hit.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import psutil

from chaos.home import Home
from chaos.processes import children, is_alive, is_running
from chaos.script import CrashLoopLimit, Planned
from chaos.standin import Standin
from chaos.tally import Fault, Tally
from llmos import AsyncClient
from llmos.codes import ServiceState
from llmos.errors import LlmosError

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
SUPERVISOR = "llmosd"
BURST, HIT_EVERY_S = 3, 15.0
TARGET_WAIT_S = 15.0
ORPHAN_S = 2.0
UNWATCHED_S = 5.0  # beyond the watchdog's own time, the stand-in does not notice a stopped llmosd
LOOK_S = 0.1
ANSWER_S = 2.0


class Nemesis:
    """`run` injects until it is cancelled, `watch` notes recoveries until it is cancelled."""

    def __init__(self, home: Home, standin: Standin, tally: Tally, *, hang_s: float) -> None:
        self.hit: set[int] = set()
        self.orphans: list[str] = []
        self.missed = 0
        self._home = home
        self._standin = standin
        self._tally = tally
        self._hang_s = hang_s
        self._limit = CrashLoopLimit(BURST, HIT_EVERY_S)
        self._open: list[Fault] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, script: Iterator[Planned]) -> None:
        async with AsyncClient(self._home.run_dir) as client:
            for planned in script:
                await asyncio.sleep(planned.pause_s + self._limit.delay_s(planned.kind, time.monotonic()))
                target = await self._target(planned, client)
                if target is None:
                    self.missed += 1
                else:
                    self._inject(planned, *target)

    async def settle(self, timeout_s: float, cut: asyncio.Event) -> None:
        """Wait until everything has recovered, the time is over, or nobody wants to wait any more."""
        deadline = time.monotonic() + timeout_s
        while self._open and time.monotonic() < deadline and self._standin.failure is None and not cut.is_set():
            await asyncio.sleep(LOOK_S)
        for task in self._tasks:
            task.cancel()

    @property
    def num_open(self) -> int:
        return len(self._open)

    async def _target(self, planned: Planned, client: AsyncClient) -> tuple[str, psutil.Process] | None:
        """The process to hit, as soon as there is one. Only what runs is stopped: the deadline of what starts is long, on purpose."""
        deadline = time.monotonic() + TARGET_WAIT_S
        while time.monotonic() < deadline:
            found = self._candidates(planned.kind)
            if planned.fault == "stop":
                running = set((await self._running(client)).values())
                running |= {self._standin.pid} if self._standin.serving.is_set() else set()
                found = [(name, process) for name, process in found if process.pid in running and is_running(process)]
            if found:
                return found[int(planned.pick * len(found))]
            await asyncio.sleep(0.02)
        return None

    def _candidates(self, kind: str) -> list[tuple[str, psutil.Process]]:
        supervisor = self._standin.pid
        if kind != "supervisor":
            found = sorted(children(supervisor).items(), key=lambda item: item[0])
            return [(name, process) for name, process in found if name.partition(".")[0] == kind]
        with contextlib.suppress(psutil.Error):
            if supervisor:
                return [(SUPERVISOR, psutil.Process(supervisor))]
        return []

    def _inject(self, planned: Planned, service: str, process: psutil.Process) -> None:
        subjects = children(process.pid) if planned.kind == "supervisor" else {}
        fault = Fault(planned.kind, planned.fault, service, process.pid, time.monotonic())
        try:
            process.send_signal(SIGNALS[planned.fault])
        except psutil.Error:  # it ended by itself in this instant
            self.missed += 1
            return
        self._limit.hit(planned.kind, fault.at)
        self.hit.add(process.pid)
        self._open.append(fault)
        self._tally.fault(fault)
        if planned.fault == "stop":
            self._start(self._continue_if_unnoticed(fault, process))
        elif subjects:
            self._start(self._look_for_orphans(list(subjects.values())))

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _continue_if_unnoticed(self, fault: Fault, process: psutil.Process) -> None:
        """A stopped process should be replaced. If nobody does that, let it go on: the run has to go on, too."""
        deadline = (
            time.monotonic() + self._hang_s + (UNWATCHED_S if fault.service == SUPERVISOR else self._home.start_s)
        )
        try:
            while is_alive(process):
                if time.monotonic() > deadline:
                    fault.noticed = False
                    return
                await asyncio.sleep(LOOK_S)
        finally:
            with contextlib.suppress(psutil.Error):
                if is_alive(process):
                    process.send_signal(signal.SIGCONT)

    async def _look_for_orphans(self, subjects: list[psutil.Process]) -> None:
        await asyncio.sleep(ORPHAN_S)
        self.orphans += [f"{process.pid}" for process in subjects if is_alive(process)]

    # ------------------------------------------------------------ recovery

    async def watch(self) -> None:
        async with AsyncClient(self._home.run_dir) as client:
            while True:
                if self._open and self._standin.serving.is_set():
                    self._note(await self._running(client))
                await asyncio.sleep(LOOK_S)

    async def _running(self, client: AsyncClient) -> dict[str, int]:
        """Service -> pid of all that run, by llmosd's own status. Empty while it does not answer."""
        try:
            async with asyncio.timeout(ANSWER_S):
                status = await client.status()
        except (LlmosError, TimeoutError):
            return {}
        return {found.name: found.pid for found in status.services if found.state == ServiceState.RUNNING}

    def _note(self, running: dict[str, int]) -> None:
        now = time.monotonic()
        for fault in list(self._open):
            if fault.service == SUPERVISOR:
                good = self._has_new_tree(fault, running)
            else:
                pid = running.get(fault.service, 0)
                good = pid > 0 and (pid != fault.pid or not fault.noticed)
            if good:
                fault.recovered_at = now
                self._open.remove(fault)

    def _has_new_tree(self, fault: Fault, running: dict[str, int]) -> bool:
        if self._standin.pid == fault.pid and fault.noticed:
            return False
        now = {name: process.pid for name, process in children(self._standin.pid).items()}
        return bool(now) and now == running
