"""A process with some of the clients. Plays scenarios until its stdin ends, finishes those that run, and leaves.

    python -m chaos.worker SETTINGS NUMBER       (settings: a JSON file, see `Settings`)

Each client has a connection of its own and makes a new one now and then. Whatever an exception says that no client should see is
written into the client's history as an error: the judge calls it a failed request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from chaos.answers import RecordedAnswers
from chaos.history import HistoryWriter
from chaos.material import FakeMaterial, Material, RecordedMaterial
from chaos.requests import Requests
from chaos.scenarios import Scenarios
from llmos import AsyncClient

FLUSH_S = 0.1
NEW_CONNECTION = 0.1  # how likely after a scenario
START_SPREAD_S = 1.0
FAILURE_PAUSE_S = 0.2  # so that a client which fails at once does not fill the disk


@dataclass(frozen=True)
class Settings:
    """`recording`: the answers of a real model, None for the fake one."""

    run_dir: str
    histories: str
    model: str
    recording: str | None
    seed: int
    clients: int
    workers: int
    patience_s: float

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> Settings:
        return Settings(**json.loads(path.read_text()))


class Worker:
    """The clients `number`, `number + workers`, ..."""

    def __init__(self, settings: Settings, number: int) -> None:
        self._settings = settings
        self._numbers = range(number, settings.clients, settings.workers)
        self._histories = [HistoryWriter(Path(settings.histories), client) for client in self._numbers]
        recording = settings.recording
        self._material: Material = (
            FakeMaterial() if recording is None else RecordedMaterial(RecordedAnswers(Path(recording)))
        )
        self._visitor = self._connect()  # does what somebody else does: attaches, waits
        self._stopping = asyncio.Event()

    def _connect(self) -> AsyncClient:
        return AsyncClient(self._settings.run_dir, self._settings.model)

    async def run(self) -> None:
        flushing = asyncio.create_task(self._flush())
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._on_stdin)
        try:
            await asyncio.gather(*map(self._play, self._numbers, self._histories))
        finally:
            flushing.cancel()
            for history in self._histories:
                history.close()
            await self._visitor.close()

    def _on_stdin(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self._stopping.set()

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            for history in self._histories:
                history.flush()

    async def _play(self, number: int, history: HistoryWriter) -> None:
        chance = random.Random(f"{self._settings.seed}/{number}")
        requests = Requests(history, self._settings.patience_s)
        scenarios = Scenarios(self._visitor, requests, self._material, chance)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), chance.random() * START_SPREAD_S)
        while not self._stopping.is_set():
            async with self._connect() as client:
                while not self._stopping.is_set():
                    if not await self._one(scenarios, client, history):
                        await asyncio.sleep(FAILURE_PAUSE_S)
                    if chance.random() < NEW_CONNECTION:
                        break

    async def _one(self, scenarios: Scenarios, client: AsyncClient, history: HistoryWriter) -> bool:
        try:
            return await scenarios.play_one(client)
        except Exception as error:  # noqa: BLE001  (whatever the SDK raised: it is told, and the others go on)
            req = history.new_request()
            history.write(req, "ask", verb="client")
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{error} ({Path(last.filename).name}:{last.lineno} {last.name})"
            history.write(req, "error", error=type(error).__name__, message=where)
            return False


if __name__ == "__main__":
    asyncio.run(Worker(Settings.read(Path(sys.argv[1])), int(sys.argv[2])).run())
