"""A gateway's surroundings without a model: a tokenizer of bytes, a microkernel that echoes prompts, and a thread to run them in.

The echo: output token i of a sequence is prompt token i modulo the prompt's length, until max_tokens. So the right answer to
every request is known, and every stream's content is different.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from llmos.codes import FinishReason, SeqState
from llmos.errors import NotFound
from llmos.ports.aio import AsyncListener
from llmos.ports.core import Peer, error_message
from llmos.ports.endpoint import RunDir
from llmos.protocol import limits
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, pack_i32, unpack_i32
from llmos.protocol.params import SamplingParams
from llmos.services.gateway.service import Gateway

DEADLINE_S = 30.0  # far above what is needed: the machine may be busy


def model_info(name: str = "echo", **changes: Any) -> m.ModelInfo:
    fields: dict[str, Any] = {
        "model": name,
        "vocab_size": 256,
        "max_context": 512,
        "eos_token_ids": (0,),
        "has_chat_template": True,
        "defaults": SamplingParams(temperature=0.7, top_k=40),
    }
    return m.ModelInfo(**(fields | changes))


def usage(prompt: int = 1, output: int = 0) -> m.Usage:
    return m.Usage(prompt, 0, output, 0, 0.5, 2.0)


TENANT_LIMITS = ("weight", "max_pages", "guaranteed_pages", "max_running", "max_waiting", "tokens_per_s")


def tenant_row(name: str, **changes: Any) -> m.TenantRow:
    unlimited = limits.UNLIMITED
    row = m.TenantRow(name, "echo", 1.0, unlimited, 0, unlimited, unlimited, 0.0)
    return msgspec.structs.replace(row, **changes)


def explained(rid: int, req: int = 1, nice: int = 0) -> m.Explained:
    """Ten seconds of a life, a tenth of it decoding."""
    parts = {
        "queue": 2000.0,
        "prefill": 500.0,
        "decode": 1000.0,
        "preempted": 1500.0,
        "suspended": 4000.0,
        "client": 1000.0,
    }
    times = {f"{name}_ms": value for name, value in parts.items()}
    return m.Explained(
        req, rid, SeqState.RUNNING, age_ms=10_000.0, **times, preemptions=2, suspensions=1, cached_tokens=32, nice=nice
    )


def wait_until(condition: Callable[[], Any], what: str = "") -> None:
    """Wait on a condition with a deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what or condition}"
        time.sleep(0.005)


async def until(condition: Callable[[], Any], what: str = "") -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what or condition}"
        await asyncio.sleep(0.005)


class _Stream:
    """Bytes to text, holding back half characters and possible starts of stop strings."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.raw = b""
        self.shown = 0

    def step(self, item: m.DecodeItem) -> m.DecodedItem:
        for used, token in enumerate(item.ids, 1):
            self.raw += bytes([token])
            text = self.raw.decode(errors="ignore")
            for stop in self.stops:
                if stop in text:
                    shown, self.shown = self.shown, text.index(stop)
                    return m.DecodedItem(item.stream, text[shown : self.shown], used, stop)
        text = self.raw.decode(errors="replace" if item.final else "ignore")
        held = 0 if item.final else max(map(len, self.stops), default=1) - 1
        end = max(self.shown, len(text) - held)
        shown, self.shown = self.shown, end
        return m.DecodedItem(item.stream, text[shown:end], len(item.ids), None, item.final)


class FakeTokenizer:
    """Token = byte. A chat becomes `role:content` lines. `mute`: take requests and never answer."""

    def __init__(self, run_dir: RunDir, models: tuple[m.ModelInfo, ...]) -> None:
        self.models = models
        self.mute = False
        self.seen: list[Any] = []
        self.streams: dict[int, _Stream] = {}
        self.listener: AsyncListener[Any] = AsyncListener(
            run_dir, "text", Schema(m.GatewayToTokenizer), frozenset({"gateway"})
        )

    async def run(self) -> None:
        while True:
            peer, message = await self.listener.receive()
            self.seen.append(message)
            answer = self.handle(message)
            if answer is not None and not (self.mute and not isinstance(message, m.ModelInfoGet)):
                self.listener.send(peer, answer)

    def handle(self, message: Any) -> m.Message | None:
        if isinstance(message, m.ModelInfoGet):
            return m.ModelInfoList(message.req, self.models)
        if isinstance(message, m.Encode):
            text = message.text
            if text is None:
                text = "".join(f"{part.role}:{part.content}\n" for part in message.messages or ())
            raw = text.encode()
            return m.Encoded(message.req, pack_i32(list(raw)), tuple(chr(b) for b in raw) if message.pieces else ())
        if isinstance(message, m.DecodeOpen):
            self.streams[message.stream] = _Stream(message.stop)
        elif isinstance(message, m.DecodeClose):
            self.streams.pop(message.stream, None)
        elif isinstance(message, m.DecodeStep):
            return m.Decoded(tuple(filter(None, map(self._decode, message.items))))
        return None

    def _decode(self, item: m.DecodeItem) -> m.DecodedItem | None:
        stream = self.streams.get(item.stream)
        if stream is None:
            return None
        decoded = stream.step(item)
        if decoded.final or decoded.stop is not None:
            del self.streams[item.stream]
        return decoded


class _Sequence:
    def __init__(self, peer: Peer, submit: m.SeqSubmit) -> None:
        self.peer = peer
        self.submit = submit
        self.prompt = list(unpack_i32(submit.prompt))
        self.sent = 0
        self.ending: FinishReason | None = None
        self.nice = submit.nice
        self.suspended = False


class FakeKernel:
    """Echoes. `paused`: accepts and then waits. `silent`: does not even accept. `tokens_per_step` for each sequence."""

    def __init__(self, run_dir: RunDir) -> None:
        self.paused = False
        self.silent = False
        self.tokens_per_step = 3
        self.window = 4096
        self.seen: list[Any] = []
        self.sequences: dict[int, _Sequence] = {}
        self.controls: list[Any] = []
        self.tenants = {"alice": tenant_row("alice"), "bob": tenant_row("bob")}
        self.acked: dict[int, int] = {}
        self._next_rid = 100
        roles = frozenset({"gateway"})
        self.listener: AsyncListener[Any] = AsyncListener(run_dir, "kernel", Schema(m.ToKernel), roles)
        self.control: AsyncListener[Any] = AsyncListener(run_dir, "kernel-control", Schema(m.ToKernel), roles)

    async def run(self) -> None:
        while True:
            peer, message = await self.listener.receive()
            self.seen.append(message)
            if isinstance(message, m.SeqSubmit):
                self._submit(peer, message)
            elif isinstance(message, m.SeqCancel) and message.rid in self.sequences:
                self._end(message.rid, FinishReason(message.reason))
            elif isinstance(message, m.SeqFinish) and message.rid in self.sequences:
                self.sequences[message.rid].sent = message.upto
                self._end(message.rid, FinishReason.STOP)
            elif isinstance(message, m.SeqAck):
                self.acked[message.rid] = message.upto

    async def run_control(self) -> None:
        while True:
            peer, message = await self.control.receive()
            self.controls.append(message)
            self.control.send(peer, self._answer(message))

    async def run_steps(self) -> None:
        while True:
            await asyncio.sleep(0.001)
            if not self.paused:
                self.step()

    def step(self) -> None:
        """One token batch for all running sequences."""
        batches: dict[Peer, tuple[list[m.TokenEntry], list[m.SeqEnd]]] = {}
        for rid, sequence in list(self.sequences.items()):
            if sequence.suspended:
                continue
            limit = min(sequence.submit.params.max_tokens or 0, self.acked.get(rid, 0) + self.window)
            first, last = sequence.sent, min(limit, sequence.sent + self.tokens_per_step)
            entries, ends = batches.setdefault(sequence.peer, ([], []))
            if last > first:
                sequence.sent = last
                ids = tuple(sequence.prompt[i % len(sequence.prompt)] for i in range(first, last))
                entries.append(m.TokenEntry(rid, first, ids))
            if last == sequence.submit.params.max_tokens:
                ends.append(m.SeqEnd(rid, FinishReason.LENGTH, usage(len(sequence.prompt), last)))
                del self.sequences[rid]
        for peer, (entries, ends) in batches.items():
            if entries or ends:
                self.listener.send(peer, m.SeqTokens(tuple(entries), tuple(ends)))

    def _submit(self, peer: Peer, message: m.SeqSubmit) -> None:
        if self.silent:
            return
        self._next_rid += 1
        self.sequences[self._next_rid] = _Sequence(peer, message)
        self.listener.send(peer, m.SeqAccepted(message.req, self._next_rid))

    def _end(self, rid: int, reason: FinishReason) -> None:
        sequence = self.sequences.pop(rid)
        end = m.SeqEnd(rid, reason, usage(len(sequence.prompt), sequence.sent))
        self.listener.send(sequence.peer, m.SeqTokens((), (end,)))

    def _answer(self, message: Any) -> m.Message:
        if isinstance(message, m.PsGet):
            mine = (rid for rid, seq in self.sequences.items() if message.owner in (None, seq.submit.owner))
            return m.PsReply(message.req, tuple(map(self._row, mine)))
        if isinstance(message, m.Kill | m.Nice | m.Suspend | m.Resume | m.Explain):
            return self._act(message)
        if isinstance(message, m.TenantSet):
            given = {name: getattr(message, name) for name in TENANT_LIMITS if getattr(message, name) is not None}
            row = self.tenants.get(message.tenant, tenant_row(message.tenant))
            self.tenants[message.tenant] = msgspec.structs.replace(row, **given)
            return m.TenantsReply(message.req, (self.tenants[message.tenant],))
        if isinstance(message, m.TenantsGet):
            rows = tuple(row for name, row in self.tenants.items() if message.owner in (None, name))
            return m.TenantsReply(message.req, rows)
        if isinstance(message, m.StatusGet):
            lane = m.LaneStatus("echo", 1, True, 16, 64, 60, 2, 1, 3, 9, 27, 0, 8, 16, 0, "float32", "cpu", 512)
            service = m.ServiceStatus("microkernel", 3, 4321, 0, 61_000.0, "fine")
            return m.StatusReply(message.req, "0.1.0", 61_000.0, (lane,), (service,))
        assert isinstance(message, m.ModelsGet), message
        row = m.ModelRow("echo", "/models/echo", "ab" * 32, "EchoForCausalLM", "serving", 1_234_567)
        return m.ModelsReply(message.req, (row,))

    def _act(self, message: Any) -> m.Message:
        """A verb on one sequence; a foreign one answers like an unknown one."""
        sequence = self.sequences.get(message.rid)
        if sequence is None or message.owner not in (None, sequence.submit.owner):
            error = NotFound(f"no sequence {message.rid}", field="rid", rid=message.rid)
            return error_message(error, message.req)
        if isinstance(message, m.Kill):
            self._end(message.rid, FinishReason.KILLED)
            return m.Killed(message.req, message.rid)
        if isinstance(message, m.Explain):
            return explained(message.rid, message.req, nice=sequence.nice)
        if isinstance(message, m.Nice):
            sequence.nice = message.nice
        else:
            sequence.suspended = isinstance(message, m.Suspend)
        return m.Done(message.req, message.rid)

    def _row(self, rid: int) -> m.SeqRow:
        sequence = self.sequences[rid]
        limit = sequence.submit.params.max_tokens or 0
        return m.SeqRow(
            rid,
            sequence.submit.owner,
            "echo",
            SeqState.SUSPENDED if sequence.suspended else SeqState.RUNNING,
            len(sequence.prompt),
            sequence.sent,
            limit,
            3,
            0,
            0,
            1500.0,
            12.5,
            sequence.nice,
        )


class LoopThread:
    """An event loop in a thread, for tests of blocking code."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._tasks: list[asyncio.Task[Any]] = []
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(DEADLINE_S)

    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        async def run() -> Any:
            return function(*arguments)

        return self.call(run())

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = self.do(lambda: self.loop.create_task(coroutine))
        self._tasks.append(task)
        return task

    def stop(self) -> None:
        async def end() -> None:
            for task in self._tasks:
                task.cancel()
            for result in await asyncio.gather(*self._tasks, return_exceptions=True):
                if not isinstance(result, asyncio.CancelledError | None):
                    raise result  # a fake that died makes its test fail

        self.call(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(DEADLINE_S)
        self.loop.close()


class GatewayWorld:
    """A real gateway between fakes, in a thread. `with GatewayWorld() as world: Client(world.path)`."""

    def __init__(self, *models: m.ModelInfo, max_in_flight: int = 64, max_clients: int = 16) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="llmos-gw-"))
        self.run_dir = RunDir(self.path)
        self.models = models or (model_info(),)
        self.limits = {"max_in_flight": max_in_flight, "max_clients": max_clients}
        self.thread = LoopThread()

    def __enter__(self) -> GatewayWorld:
        self.run_dir.create()
        self.thread.do(self._make)
        self.start_tokenizer()
        self.start_kernel()
        self.thread.call(self.gateway.start())
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.call(self.gateway.close())
        self.stop_tokenizer()
        self.stop_kernel()
        self.thread.stop()
        shutil.rmtree(self.path)

    def _make(self) -> None:
        self.gateway = Gateway(self.run_dir, "gateway", **self.limits)

    def start_tokenizer(self) -> None:
        self.tokenizer = self.thread.do(FakeTokenizer, self.run_dir, self.models)
        self._tokenizer_tasks = [self.thread.spawn(self.tokenizer.run())]

    def start_kernel(self) -> None:
        self.kernel = self.thread.do(FakeKernel, self.run_dir)
        runs = (self.kernel.run(), self.kernel.run_control(), self.kernel.run_steps())
        self._kernel_tasks = [self.thread.spawn(run) for run in runs]

    def stop_tokenizer(self) -> None:
        self._end(self._tokenizer_tasks, self.tokenizer.listener)

    def stop_kernel(self) -> None:
        self._end(self._kernel_tasks, self.kernel.listener, self.kernel.control)

    def _end(self, tasks: list[asyncio.Task[Any]], *listeners: AsyncListener[Any]) -> None:
        async def end() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for listener in listeners:
                listener.close()

        self.thread.call(end())
