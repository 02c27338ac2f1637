"""How long a microkernel that is killed is missed: with thousands of sequences in its queue, on the fake executor; and how fast it reads.

    python bench/recovery.py                            # 10,000 waiting and 64 running, killed 3 times; about two minutes
    python bench/recovery.py --waiting 1000 --kills 1   # shorter
    python bench/recovery.py --only replay              # only the journal's reading speed, in this process

Real processes. Clients stream all of it; the answers are known. Reported: the longest time without a token for those that ran when the
microkernel was killed, from the kill to its end. Everything must come to its right end, else the exit code is 1. `replay` reads a journal
of 1.28 million tokens as records of steps of 256, and one of 10,000 live sequences of 1,000 tokens each.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import shlex
import signal
import sys
import tempfile
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from chaos.answers import VOCAB, FakeAnswers
from chaos.home import Home
from chaos.processes import children
from chaos.standin import Standin
from common import machine, versions

from llmos import AsyncClient
from llmos.microkernel import frames, records
from llmos.microkernel.journal import Journal
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.limits import KernelLimits, SchedulerLimits
from llmos.microkernel.recovery import restore
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import ExecutorReady
from llmos.protocol.params import SamplingParams

CONNECTIONS = 48
PROMPT, OUTPUT = 32, 20
LIMIT_S = 2.0
IN_FLIGHT_S = 0.1  # so long after the kill tokens may still come that had left before
LONGEST_S = 600.0
_CONFIG = "\n[gateway]\nmax_in_flight_per_client = 4096\n"
_PARAMS = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=1)


@dataclass
class Watch:
    """When tokens came, by stream."""

    last: dict[int, float] = field(default_factory=dict)  # of those that have begun and not ended
    done: int = 0
    wrong: list[str] = field(default_factory=list)
    gaps: list[tuple[int, float, float]] = field(
        default_factory=list
    )  # (stream, from, to) of more than a quarter of a second

    def token(self, stream: int, now: float) -> None:
        before = self.last.get(stream)
        if before is not None and now - before > 0.25:
            self.gaps.append((stream, before, now))
        self.last[stream] = now


async def read(client: AsyncClient, number: int, watch: Watch) -> None:
    """One stream to its end."""
    prompt = [(number * 31 + at) % VOCAB for at in range(PROMPT)]
    answer = {"seed": number, "position": PROMPT, "count": OUTPUT, "stop": None}
    stream = client.generate(prompt, stream=True, seed=number, max_tokens=OUTPUT, ignore_eos=True)
    ids: list[int] = []
    try:
        async for chunk in stream:
            ids += chunk.token_ids
            watch.token(number, time.monotonic())
    except Exception as error:  # noqa: BLE001  (whatever it was, the result names it)
        watch.wrong.append(f"{number}: {type(error).__name__}: {error}")
    else:
        if tuple(ids) != tuple(FakeAnswers().find(answer).ids):
            watch.wrong.append(f"{number}: other tokens than asked for")
    watch.last.pop(number, None)
    watch.done += 1


async def serve_and_kill(waiting: int, kills: int, step_ms: float) -> dict[str, Any]:
    home = Home("fake", hang_s=10.0, step_ms=step_ms)
    home.config.write_text(
        home.config.read_text().replace("max_rows = 64", f"max_rows = 64\nmax_waiting = {2 * waiting}") + _CONFIG
    )
    standin = Standin(home)
    watch = Watch()
    try:
        await standin.start()
        clients = [AsyncClient(home.run_dir, home.model_name) for _ in range(CONNECTIONS)]
        total = waiting + 64
        started = time.monotonic()
        reading = asyncio.gather(*(read(clients[number % CONNECTIONS], number, watch) for number in range(total)))
        await queued(clients[0], watch, total)
        loaded_s = time.monotonic() - started
        deaths = []
        for _ in range(kills):
            await asyncio.sleep(8.0)
            deaths.append(await kill(standin, clients[0]))
        await reading
        for client in clients:
            await client.close()
        finished_s = time.monotonic() - started
    finally:
        await standin.stop()
        log = home.log.read_text(errors="replace")
        home.remove()
    return {
        "waiting": waiting, "running": 64, "step_ms": step_ms, "kills": [stalls(watch, *death) for death in deaths], "finished": watch.done,
        "wrong": watch.wrong[:20], "loaded_s": round(loaded_s, 2), "finished_s": round(finished_s, 2),
        "log": [line for line in log.splitlines() if "ERROR" in line][:20],
    }  # fmt: skip


async def queued(client: AsyncClient, watch: Watch, total: int) -> None:
    """Wait until all are accepted."""
    while sum(lane.waiting + lane.running for lane in (await client.status()).lanes) + watch.done < total:
        await asyncio.sleep(0.2)


async def kill(standin: Standin, client: AsyncClient) -> tuple[float, int]:
    """When it was killed, and how many waited then."""
    waits = sum(lane.waiting for lane in (await client.status()).lanes)
    victim = children(standin.pid)["microkernel"]
    victim.send_signal(signal.SIGKILL)
    return time.monotonic(), waits


def stalls(watch: Watch, at: float, waits: int) -> dict[str, Any]:
    """Of all streams that had begun and not ended: from the kill to the next token."""
    found = sorted(end - at for _, begin, end in watch.gaps if begin <= at + IN_FLIGHT_S and end > at + IN_FLIGHT_S)
    if not found:
        return {"waiting": waits, "streams": 0, "stall_p50_s": None, "stall_max_s": None}
    middle = found[len(found) // 2]
    return {
        "waiting": waits,
        "streams": len(found),
        "stall_p50_s": round(middle, 3),
        "stall_max_s": round(found[-1], 3),
    }


# ------------------------------------------------------------ reading speed


def replay() -> dict[str, Any]:
    return {
        "steps of 256": _measure(_steps(256, 5000)),
        "10,000 live sequences of 1,000 tokens": _measure(_whole(10_000, 1000)),
    }


def _measure(content: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="llmos-") as folder:
        (Path(folder) / "00000001.journal").write_bytes(content)
        gc.collect()
        gc.disable()  # as the microkernel does while it starts
        started = time.perf_counter()
        recovered = Journal(Path(folder), "always", 0.05).recover()
        read_s = time.perf_counter() - started
        limits = KernelLimits(max_waiting=100_000)
        kernel = Kernel(limits, SchedulerLimits(max_rows=64), ("demo",), 2, 0.0)
        restore(kernel.state, recovered.fold, 0.0, 0.0)
        ready_s = time.perf_counter() - started
        gc.enable()
    tokens = sum(len(seq.tokens) for seq in kernel.state.sequences.values())
    assert recovered.dropped == 0
    return {
        "bytes": len(content), "tokens": tokens, "read_s": round(read_s, 3), "ready_s": round(ready_s, 3),
        "tokens_per_s": round(tokens / ready_s),
    }  # fmt: skip


def _steps(rows: int, steps: int) -> bytes:
    frame = frames.pack([_meta(), _executor(), *(_sequence(rid, 10) for rid in range(1, rows + 1))])
    columns = np.zeros((rows, 3), "<i8")
    columns[:, 0] = np.arange(1, rows + 1)
    for step in range(steps):
        columns[:, 1], columns[:, 2] = step, step % VOCAB
        frame += frames.pack([records.TokensRecord(columns.tobytes())])
    return bytes(frame)


def _whole(count: int, length: int) -> bytes:
    return bytes(frames.pack([_meta(), _executor(), *(_sequence(rid, length) for rid in range(1, count + 1))]))


def _meta() -> records.MetaRecord:
    return records.MetaRecord(records.VERSION, 0, 0, bytes(16), 0.0, 0.0, "")


def _executor() -> records.ExecutorRecord:
    return records.ExecutorRecord(ExecutorReady("demo", 65_536, 16, 64, 4096, 16_384, VOCAB, "none", "fake"))


def _sequence(rid: int, length: int) -> records.SequenceRecord:
    tokens = pack_i32(array("i", (at % VOCAB for at in range(length))))
    return records.SequenceRecord(
        rid, "bench", "demo", tokens, length, length + 10_000, _PARAMS, 0.0, rid, None, False, None, 0, None, True, False, False,
        (), 0, 0.0, None, 0, None, None, b"", True,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--waiting", type=int, default=10_000, help="sequences in the queue (default %(default)s)")
    add("--kills", type=int, default=3, help="how often the microkernel is killed (default %(default)s)")
    add("--step-ms", type=float, default=20.0, help="length of a step of the fake model (default %(default)s)")
    add("--only", choices=("kill", "replay"), help="one of the two measurements")
    add("--out", type=Path, metavar="FILE", help="write the result as JSON")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "command": shlex.join(["python", *sys.argv]),
    }
    if arguments.only != "kill":
        result["replay"] = replay()
        for name, found in result["replay"].items():
            print(f"{name}: {found['tokens']:,} tokens, {found['bytes']:,} bytes: read in {found['read_s']} s, ready in "
                  f"{found['ready_s']} s, {found['tokens_per_s']:,} tokens/s")  # fmt: skip
    good = True
    if arguments.only != "replay":
        run = serve_and_kill(arguments.waiting, arguments.kills, arguments.step_ms)
        found = result["kill"] = asyncio.run(asyncio.wait_for(run, LONGEST_S))
        for each in found["kills"]:
            print(f"killed with {each['waiting']} waiting, {each['streams']} streams stalled: p50 {each['stall_p50_s']} s, max "
                  f"{each['stall_max_s']} s (goal {LIMIT_S} s)")  # fmt: skip
        print(
            f"{found['finished']} of {arguments.waiting + 64} finished in {found['finished_s']} s, {len(found['wrong'])} wrong"
        )
        for line in found["wrong"]:
            print(f"  {line}")
        good = not found["wrong"] and found["finished"] == arguments.waiting + 64
    result["load_1min"] = psutil.getloadavg()[0]
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {arguments.out}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
