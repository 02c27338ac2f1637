"""What the HTTP gateway costs: 256 streams of a fake model, over HTTP and over the ZeroMQ port, in turns.

    python bench/http_load.py                 # about a minute; --streams, --tokens, --step-ms, --workers

Delay of a token: from the moment in which the microkernel's word reaches a process that reads the kernel port itself (a sequence of its
own in the same batch, so its token comes with the same step) to the moment in which the client has the token's bytes. Steps last
`--step-ms`, so the two are told apart by the nearest step. Both clients are as lean as they can be: bytes are split, not understood. The
last part lets steps take as long as they take: tokens/s at saturation, with the processor time of each process beside it, which says what
the limit is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from bisect import bisect_left
from pathlib import Path
from typing import Any

import psutil
from common import machine, percentile, versions
from daemon import Daemon

from llmos.client.place import LocalPlace
from llmos.http_place import read_note
from llmos.keys.admin_key import read_admin_key
from llmos.ports.endpoint import RunDir
from llmos.ports.sync import Dialer
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, pack_i32
from llmos.protocol.params import SamplingParams

MODEL = Path(__file__).parents[1] / "llmos" / "assets" / "demo-model"
STEP_VARIABLE = "LLMOS_FAKE_STEP_MS"
WARM_TOKENS = 20  # of each stream, not counted: while some still begin, steps are not alike


def reference(run_dir: Path, tokens: int) -> None:
    """The other process: read one sequence from the kernel port, and print when each token came."""
    dialer: Dialer[Any] = Dialer(RunDir(run_dir), "kernel", Schema(m.FromKernel))
    dialer.greet("gateway", "bench", 10.0)
    params = SamplingParams(
        temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, max_tokens=tokens, ignore_eos=True
    )
    dialer.send(m.SeqSubmit(1, "bench", pack_i32([5, 6, 7]), params, "bench"))
    times: list[float] = []
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        message = dialer.expect(60.0)
        now = time.monotonic()
        if isinstance(message, m.SeqTokens):
            times += [now] * (len(message.columns) // 24 + sum(len(entry.ids) for entry in message.entries))
            if message.ends:
                break
            if len(times) % 256 == 0:
                dialer.send(m.SeqAck(message_rid(message), len(times)))
    sys.stdout.write(json.dumps(times) + "\n")


def message_rid(message: m.SeqTokens) -> int:
    return message.entries[0].rid if message.entries else int.from_bytes(message.columns[:8], "little")


async def over_http(url: str, key: str, streams: int, tokens: int) -> list[list[float]]:
    """When each token of each stream came."""
    host, port = url.removeprefix("http://").split(":")
    body = {
        "prompt": [11, 12, 13, 14],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "model": "bench",
    }
    text = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\n"
        f"content-length: {len(text)}\r\nconnection: close\r\n\r\n"
    )

    async def one() -> list[float]:
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
        writer.write(head.encode() + text)
        times: list[float] = []
        rest = b""
        while chunk := await reader.read(65_536):
            now = time.monotonic()
            whole = rest + chunk
            times += [now] * whole.count(b'data: {"id"')
            rest = whole[-10:] if not whole.endswith(b"\n\n") else b""
        writer.close()
        return times

    return list(await asyncio.gather(*(one() for _ in range(streams))))


def over_zmq(run_dir: Path, streams: int, tokens: int) -> list[list[float]]:
    dialer = LocalPlace(RunDir(run_dir)).dial("client", Schema(m.GatewayToClient))

    async def read() -> list[list[float]]:
        await dialer.greet("client", "bench", 10.0)
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        for req in range(1, streams + 1):
            dialer.send(m.Generate(req, "bench", None, pack_i32([11, 12, 13, 14]), None, params))
        times: list[list[float]] = [[] for _ in range(streams)]
        acked = [0] * streams
        left = streams
        while left:
            message = await dialer.receive()
            now = time.monotonic()
            if isinstance(message, m.Tokens):
                mine = times[message.req - 1]
                mine += [now] * len(message.ids)
                if len(mine) - acked[message.req - 1] >= 256:
                    acked[message.req - 1] = len(mine)
                    dialer.send(m.Ack(message.req, len(mine)))
            elif isinstance(message, m.Finished):
                left -= 1
            elif isinstance(message, m.Error):
                raise RuntimeError(message.message)
        dialer.close()
        return times

    return asyncio.run(read())


def delays(times: list[list[float]], steps: list[float]) -> list[float]:
    """Milliseconds behind the nearest step of the reference."""
    found = []
    last = steps[-1]
    for stream in times:
        for moment in stream[WARM_TOKENS:]:
            if moment > last:
                break
            at = bisect_left(steps, moment)
            near = min(
                (steps[place] for place in (at - 1, at) if 0 <= place < len(steps)), key=lambda s: abs(s - moment)
            )
            found.append((moment - near) * 1e3)
    return found


def measure(way: str, daemon: Daemon, streams: int, tokens: int, *, paced: bool) -> dict[str, Any]:
    note = read_note(daemon.run_dir)
    secret = read_admin_key(Path(note.state_dir))
    assert secret is not None
    follower = None
    if paced:
        command = [
            sys.executable,
            __file__,
            "--reference",
            str(daemon.run_dir),
            "--tokens",
            str(tokens + 2 * WARM_TOKENS),
        ]
        follower = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert follower.stdout is not None
        assert follower.stdout.readline() == "ready\n"
    before, began = _cpu(daemon), time.monotonic()
    if way == "http":
        times = asyncio.run(over_http(note.url, secret.text, streams, tokens))
    else:
        times = over_zmq(daemon.run_dir, streams, tokens)
    seconds = max(stream[-1] for stream in times) - began
    short = [len(stream) for stream in times if len(stream) < tokens * 0.5]
    if short:
        raise RuntimeError(f"{way}: streams ended after {short[:5]} tokens of {tokens}")
    used = {name: round((now - before.get(name, 0.0)) / seconds, 3) for name, now in _cpu(daemon).items()}
    result: dict[str, Any] = {"way": way, "tokens_per_s": round(streams * tokens / seconds), "cores": used}
    if follower is not None:
        assert follower.stdout is not None
        steps = json.loads(follower.stdout.readline())
        follower.wait()
        late = delays(times, steps)
        result |= {
            "delay_ms": {f"p{q}": round(percentile(late, q / 100), 3) for q in (50, 90, 99)},
            "counted": len(late),
        }
    return result


def _cpu(daemon: Daemon) -> dict[str, float]:
    """Seconds of processor time by process; `client` is this one."""
    found = {"client": sum(psutil.Process().cpu_times()[:2])}
    for process in daemon.processes():
        command = process.cmdline()
        name = command[command.index("--name") + 1] if "--name" in command else "llmosd"
        found[name] = sum(process.cpu_times()[:2])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=51.2, help="256 streams: 5,000 tokens/s (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reference is not None:
        reference(options.reference, options.tokens)
        return
    found: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "options": {name: getattr(options, name) for name in ("streams", "tokens", "step_ms", "workers")},
    }
    for name, step in (("paced", options.step_ms), ("saturated", 0.0)):
        os.environ[STEP_VARIABLE] = str(step)
        found[name] = []
        with Daemon(
            MODEL, threads=1, max_rows=options.streams + 8, backend="fake", http_workers=options.workers
        ) as daemon:
            for _ in range(options.rounds if step else 1):
                for way in ("zmq", "http"):
                    result = measure(way, daemon, options.streams, options.tokens, paced=bool(step))
                    found[name].append(result)
                    sys.stdout.write(f"{name}: {json.dumps(result)}\n")
                    sys.stdout.flush()
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
