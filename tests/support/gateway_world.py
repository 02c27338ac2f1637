"""A gateway's surroundings without a model: a tokenizer of bytes, a microkernel that echoes (echo_kernel.py), and a thread to run
them in.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

from echo_kernel import EchoKernel
from echo_sequence import explained, tenant_row, usage
from loop_thread import DEADLINE_S, LoopThread, until, wait_until

from llmos import Client
from llmos.keys.keyfile import KeyFile
from llmos.keys.ring import KeyRing
from llmos.keys.roles import Role
from llmos.keys.secret import Secret
from llmos.keys.server_key import make_server_key
from llmos.ports.aio import AsyncListener
from llmos.ports.endpoint import RunDir
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, pack_i32, unpack_i32
from llmos.protocol.params import SamplingParams
from llmos.services.gateway.audit import AuditLog
from llmos.services.gateway.door import TcpDoor
from llmos.services.gateway.service import Gateway
from llmos.tcp_address import TcpAddress

__all__ = [
    "DEADLINE_S",
    "GatewayWorld",
    "LoopThread",
    "explained",
    "model_info",
    "tenant_row",
    "until",
    "usage",
    "wait_until",
]


def model_info(name: str = "echo", **changes: Any) -> m.ModelInfo:
    fields: dict[str, Any] = {
        "model": name,
        "vocab_size": 256,
        "max_context": 512,
        "eos_token_ids": (0,),
        "has_chat_template": True,
        "defaults": SamplingParams(temperature=0.7, top_k=40),
        "tools": m.ToolFormat("hermes"),
        "has_grammar": True,
    }
    return m.ModelInfo(**(fields | changes))


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
    """Token = byte. A chat becomes `role:content` lines. `mute`: take requests and never answer. `poison`: this text is not answered."""

    def __init__(self, run_dir: RunDir, models: tuple[m.ModelInfo, ...], poison: str) -> None:
        self.models = models
        self.poison = poison
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
            if isinstance(message, m.Encode) and message.text == self.poison:
                continue
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
            raw, second = text.encode(), (message.second or "").encode()
            pieces = tuple(chr(b) for b in raw) if message.pieces else ()
            return m.Encoded(
                message.req, pack_i32(list(raw + second)), pieces, len(raw) if second else 0, message.grammar
            )
        if isinstance(message, m.Render):
            raw = bytes(list(unpack_i32(message.token_ids)))
            return m.Rendered(message.req, raw.decode(errors="replace"), tuple(bytes([byte]) for byte in raw))
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


def free_ports() -> int:
    """A port that nobody uses, and the one after it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError), socket.create_server(("127.0.0.1", port + 1)):
                return port


class GatewayWorld:
    """A real gateway between fakes, in a thread. `with GatewayWorld() as world: Client(world.path)`. `poison`: see FakeTokenizer.
    `tcp`: it also listens on the network; make keys with `add_key` before it starts, the first one is an administrator's.
    """

    def __init__(
        self, *models: m.ModelInfo, max_in_flight: int = 64, max_clients: int = 16, poison: str = "", tcp: bool = False
    ) -> None:
        self.poison = poison
        self.tcp = TcpAddress("127.0.0.1", free_ports()) if tcp else None
        self.path = Path(tempfile.mkdtemp(prefix="llmos-gw-"))
        self.run_dir = RunDir(self.path)
        self.audit = AuditLog(self.state)
        self.models = models or (model_info(),)
        self.limits = {"max_in_flight": max_in_flight, "max_clients": max_clients}
        self.thread = LoopThread()

    def __enter__(self) -> GatewayWorld:
        self.run_dir.create()
        if self.tcp is not None:
            self.server_key = make_server_key(self.state).public
            self.admin = self.add_key("operator", Role.ADMIN)
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
        self.audit.close()
        shutil.rmtree(self.path)

    def _make(self) -> None:
        door = TcpDoor(self.tcp, self.state, KeyRing(self.state)) if self.tcp is not None else None
        self.gateway = Gateway(self.run_dir, "gateway", **self.limits, door=door, audit=self.audit)

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def url(self) -> str:
        assert self.tcp is not None
        return f"tcp://{self.tcp.host}:{self.tcp.port}"

    def add_key(self, tenant: str, role: Role = Role.SUBMIT) -> Secret:
        return KeyFile(self.state).add("test", tenant, role)[1]

    def revoke(self, secret: Secret) -> None:
        KeyFile(self.state).revoke(secret.id)

    def client(self, secret: Secret, **options: Any) -> Client:
        """Over the network."""
        return Client(self.url, key=secret.text, server_key=self.server_key, **options)

    def start_tokenizer(self) -> None:
        self.tokenizer = self.thread.do(FakeTokenizer, self.run_dir, self.models, self.poison)
        self._tokenizer_tasks = [self.thread.spawn(self.tokenizer.run())]

    def start_kernel(self, died: EchoKernel | None = None) -> None:
        """`died`: its sequences go on."""
        self.kernel = self.thread.do(EchoKernel, self.run_dir, died)
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
