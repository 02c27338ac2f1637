"""One chaos run: llmosd under its stand-in for systemd, client processes, the nemesis, the judge; then what is left behind.

Order: serve - clients start - faults for the given time - everything recovers - clients finish what they have begun - nothing may be
left: no sequence, no page, then no process and no file. A first Ctrl-C ends the faults early, a second one cuts the clients off.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.answers import AnswerBook, FakeAnswers, RecordedAnswers
from chaos.history import HistoryReader
from chaos.home import Home
from chaos.judge import Judge
from chaos.nemesis import Nemesis
from chaos.points import PointNemesis, armed_by_files, targets
from chaos.processes import DeathWatch, with_path
from chaos.recording import record
from chaos.script import make_script
from chaos.standin import Standin, die_with_parent
from chaos.tally import Tally
from chaos.worker import Settings
from llmos import AsyncClient
from llmos.errors import LlmosError
from llmos.killpoints import VARIABLE

BENCH = Path(__file__).parents[1]
CLIENTS_PER_WORKER = 8
WARM_UP_S = 2.0
PUMP_S = 0.25
SETTLE_S = 60.0
EMPTY_S = 15.0
_GOING_DOWN = re.compile(r"\(pid (\d+)\)")


@dataclass(frozen=True)
class Options:
    """`minutes` of faults, one about every `mean_s` seconds; or, with `points` (names or their beginnings; none: all), one at each of
    these points of the code, and with `pairs` at some of them two."""

    minutes: float
    seed: int
    clients: int
    kinds: tuple[str, ...]
    faults: tuple[str, ...]
    mean_s: float
    model: str
    step_ms: float = 40.0
    hang_s: float = 3.0
    patience_s: float = 45.0
    keep: bool = False
    points: tuple[str, ...] | None = None
    pairs: bool = False


@dataclass
class Outcome:
    """`problems` make the run a failed one, `notes` are worth a look."""

    tally: Tally
    seconds: float = 0.0
    interrupted: bool = False
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kept: Path | None = None

    @property
    def is_good(self) -> bool:
        return not self.tally.harmed and not self.problems


class ChaosRun:
    """`run` once. `stop` from a signal handler."""

    def __init__(self, options: Options, progress: Callable[[ChaosRun], None]) -> None:
        self.options = options
        self.tally = Tally()
        self.outcome = Outcome(self.tally)
        self.started_at = 0.0
        self.phase = "starting"
        self._progress = progress
        self._home = Home(options.model, hang_s=options.hang_s, step_ms=options.step_ms)
        self._standin = Standin(self._home)
        if options.points is not None:
            self._home.environment[VARIABLE] = armed_by_files(self._home.points)
        make = Nemesis if options.points is None else PointNemesis
        self._nemesis = make(self._home, self._standin, self.tally, hang_s=options.hang_s)
        self._deaths = DeathWatch(self._standin)
        self._workers: list[asyncio.subprocess.Process] = []
        self._readers: list[HistoryReader] = []
        self._stop = asyncio.Event()
        self._cut = asyncio.Event()

    def stop(self) -> None:
        """Once: end early. Twice: at once."""
        if self._stop.is_set():
            self._cut.set()
        self.outcome.interrupted = True
        self._stop.set()

    @property
    def num_unrecovered(self) -> int:
        return self._nemesis.num_open

    async def run(self) -> Outcome:
        try:
            await self._standin.start()
            judge = Judge(await self._book(), self.tally.violation, self.tally.verdict)
            await self._start_workers()
            await self._under_faults(judge)
            await self._finish_clients(judge)
            await self._look_for_sequences()
        finally:
            for worker in self._workers:
                if worker.returncode is None:
                    worker.kill()
                    await worker.wait()
            code = await self._standin.stop()
            self._look_for_remains(code)
            if self.options.keep:
                self.outcome.kept = self._home.path
            else:
                self._home.remove()
        return self.outcome

    # ------------------------------------------------------------ phases

    async def _book(self) -> AnswerBook:
        if self.options.model == "fake":
            return FakeAnswers()
        self.phase = "recording"
        path = self._recording
        await record(self._home.run_dir, self._home.model_name, path, self.options.seed)
        return RecordedAnswers(path)

    @property
    def _recording(self) -> Path:
        return self._home.path / "answers.json"

    async def _start_workers(self) -> None:
        options, home = self.options, self._home
        count = -(-options.clients // CLIENTS_PER_WORKER)
        settings = Settings(
            run_dir=str(home.run_dir), histories=str(home.histories), model=home.model_name,
            recording=None if options.model == "fake" else str(self._recording), seed=options.seed,
            clients=options.clients, workers=count, patience_s=options.patience_s,
        )  # fmt: skip
        path_with_bench = os.pathsep.join(filter(None, (str(BENCH), home.environment.get("PYTHONPATH"))))
        path = home.path / "clients.json"
        settings.write(path)
        self._readers = [HistoryReader(home.histories, client, keep=options.keep) for client in range(options.clients)]
        with (home.path / "clients.log").open("ab") as log:
            for number in range(count):
                worker = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "chaos.worker", str(path), str(number), stdin=asyncio.subprocess.PIPE,
                    stdout=log, stderr=log, env=home.environment | {"PYTHONPATH": path_with_bench}, start_new_session=True,
                    preexec_fn=die_with_parent,
                )  # fmt: skip
                self._workers.append(worker)

    async def _under_faults(self, judge: Judge) -> None:
        self.started_at = time.monotonic()
        self.phase = "faults"
        script = make_script(self.options.seed, self.options.kinds, self.options.faults, self.options.mean_s)
        async with _beside(self._pump(judge), self._nemesis.watch(), self._deaths.run(), self._show()):
            await self._sleep(WARM_UP_S)
            if isinstance(self._nemesis, PointNemesis):
                wanted = targets(self.options.points or (), pairs=self.options.pairs, seed=self.options.seed)
                await self._nemesis.kill_all(wanted, self._stop)
            else:
                async with _beside(self._nemesis.run(script)):
                    await self._sleep(self.options.minutes * 60)
            self.outcome.seconds = time.monotonic() - self.started_at
            self.phase = "recovering"
            await self._nemesis.settle(SETTLE_S + self._home.start_s, self._cut)
        unrecovered = [
            f"{fault.service} after {fault.fault}" for fault in self.tally.faults if fault.recovered_at is None
        ]
        if unrecovered and not self._cut.is_set():
            self.outcome.problems.append(f"not running again: {', '.join(unrecovered[:5])}")
        if self._standin.failure is not None:
            self.outcome.problems.append(self._standin.failure)
        if isinstance(self._nemesis, PointNemesis) and self._nemesis.not_reached:
            self.outcome.problems.append(f"points that nobody reached: {', '.join(self._nemesis.not_reached)}")

    async def _finish_clients(self, judge: Judge) -> None:
        """They get the time that the patience of one request takes, and some more for what follows in the same scenario."""
        self.phase = "finishing"
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.close()
        async with _beside(self._cut.wait(), self._pump(judge), self._show()) as (cut, *_):
            ends = asyncio.ensure_future(asyncio.gather(*(worker.wait() for worker in self._workers)))
            either: set[asyncio.Future[Any]] = {ends, cut}
            await asyncio.wait(either, timeout=2 * self.options.patience_s, return_when=asyncio.FIRST_COMPLETED)
            late = [worker for worker in self._workers if worker.returncode is None]
            for worker in late:
                worker.kill()
            codes = await ends
        self._read_histories(judge)
        judge.finish(time.monotonic(), interrupted=self._cut.is_set())
        for reader in self._readers:
            reader.close()
        if late and not self._cut.is_set():
            self.outcome.problems.append(f"{len(late)} client processes did not finish")
        elif any(codes) and not late:
            self.outcome.problems.append(f"client processes failed: {self._tail('clients.log')}")

    async def _look_for_sequences(self) -> None:
        """When every client has ended what it began, llmosd holds no sequence and no page."""
        if self._standin.failure is not None or self._cut.is_set():
            return
        self.phase = "checking"
        deadline = time.monotonic() + EMPTY_S
        left = "llmosd does not answer"
        async with AsyncClient(self._home.run_dir) as client:
            while left and time.monotonic() < deadline:
                try:
                    async with asyncio.timeout(EMPTY_S / 3):
                        rows, status = await client.ps(), await client.status()
                except (LlmosError, TimeoutError) as error:
                    left = f"llmosd does not answer: {error}"
                else:
                    pages = sum(lane.pages_total - lane.pages_free - lane.pages_cached for lane in status.lanes)
                    left = f"{len(rows)} sequences and {pages} pages are left" if rows or pages else ""
                await asyncio.sleep(PUMP_S)
        if left:
            self.outcome.problems.append(left)

    def _look_for_remains(self, code: int | None) -> None:
        problems, notes = self.outcome.problems, self.outcome.notes
        if code not in (0, None) and not self._cut.is_set():
            problems.append(f"llmosd ended with {code} when it was asked to stop")
        if self._nemesis.orphans:
            problems.append(f"outlived their llmosd by 2 s: {', '.join(self._nemesis.orphans)}")
        if files := self._home.leftovers():
            problems.append(f"left in the run directory: {', '.join(files)}")
        if processes := with_path(self._home.path):
            problems.append(f"processes left: {'; '.join(processes)}")
        log = self._home.log.read_text(errors="replace") if self._home.log.exists() else ""
        for death in self._deaths.unexplained(self._nemesis.hit):
            said = [line for line in log.splitlines() if str(death.pid) in _GOING_DOWN.findall(line)]
            notes.append(f"{death.service} died without being hit: {said[-1] if said else 'nothing in the log'}")
        notes += [f"{count} x {error}" for error, count in _tracebacks(log).most_common(10)]
        if self._nemesis.missed:
            notes.append(f"{self._nemesis.missed} faults found no process to hit")

    # ------------------------------------------------------------ loops

    async def _pump(self, judge: Judge) -> None:
        while True:
            self._read_histories(judge)
            await asyncio.sleep(PUMP_S)

    def _read_histories(self, judge: Judge) -> None:
        for reader in self._readers:
            for event in reader.new_events():
                judge.feed(reader.client, event)

    async def _show(self) -> None:
        while True:
            self._progress(self)
            await asyncio.sleep(1.0)

    async def _sleep(self, seconds: float) -> None:
        """Or until there is no sense in going on."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and self._standin.failure is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), min(left, 0.5))
                return

    def _tail(self, name: str) -> str:
        path = self._home.path / name
        return path.read_text(errors="replace")[-1000:] if path.exists() else ""


@contextlib.asynccontextmanager
async def _beside(*loops: Coroutine[Any, Any, object]) -> AsyncIterator[list[asyncio.Task[object]]]:
    """Run them beside the block and end them with it; what breaks one of them breaks the block."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(loop) for loop in loops]
        yield tasks
        for task in tasks:
            task.cancel()


def _tracebacks(log: str) -> Counter[str]:
    """How often which exception ended something, by its last line."""
    found: Counter[str] = Counter()
    inside = False
    for line in log.splitlines():
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and line and not line[0].isspace():
            found[line[:200]] += 1
            inside = False
    return found
