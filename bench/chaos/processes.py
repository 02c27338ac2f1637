"""The processes of one run, found by parent and command line; never anything that this run did not start."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from chaos.standin import Standin

POLL_S = 0.2
SLOW_STOP_S = 15.0  # llmosd may take this long from stopping its children to its own end


def children(supervisor: int) -> dict[str, psutil.Process]:
    """Service name -> process, of a llmosd; empty if it is gone."""
    found = {}
    try:
        for child in psutil.Process(supervisor).children():
            name = service_name(child)
            if name is not None:
                found[name] = child
    except psutil.Error:
        return {}
    return found


def service_name(process: psutil.Process) -> str | None:
    try:
        command = process.cmdline()
    except psutil.Error:
        return None
    return command[command.index("--name") + 1] if "--name" in command[:-1] else None


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def is_running(process: psutil.Process) -> bool:
    """Neither dead nor stopped."""
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def with_path(path: Path) -> list[str]:
    """All processes whose command line names this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if any(str(path) in argument for argument in command):
            found.append(f"{process.pid} {' '.join(command[:6])}")
    return found


@dataclass(frozen=True)
class Death:
    service: str
    pid: int
    supervisor: int
    at: float


class DeathWatch:
    """Notices children of llmosd that vanish, so that deaths which nobody injected can be told at the end."""

    def __init__(self, standin: Standin) -> None:
        self._standin = standin
        self._alive: dict[int, tuple[str, int]] = {}
        self._deaths: list[Death] = []

    async def run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(POLL_S)

    def look(self) -> None:
        supervisor = self._standin.pid
        now = time.monotonic()
        seen = {child.pid: (name, supervisor) for name, child in children(supervisor).items()}
        for pid, (name, parent) in self._alive.items():
            if pid not in seen:
                self._deaths.append(Death(name, pid, parent, now))
        self._alive = seen

    def unexplained(self, hit: set[int]) -> list[Death]:
        """Deaths of processes that were not hit, under a llmosd that lived on."""
        ends = {life.pid: life.ended_at for life in self._standin.lives}
        return [
            death
            for death in self._deaths
            if death.pid not in hit
            and death.supervisor not in hit
            and ((end := ends.get(death.supervisor)) is None or end - death.at > SLOW_STOP_S)
        ]
