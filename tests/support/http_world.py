"""An HTTP worker between fakes, in a thread: real HTTP on a loopback port, a tokenizer of bytes, a microkernel that echoes."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from echo_kernel import EchoKernel
from gateway_world import FakeTokenizer, model_info
from loop_thread import LoopThread

from llmos.config import HttpConfig
from llmos.keys.keyfile import KeyFile
from llmos.keys.ring import KeyRing
from llmos.keys.roles import Role
from llmos.keys.secret import Secret
from llmos.ports.endpoint import RunDir
from llmos.protocol import messages as m
from llmos.services.gateway.http.access import Access
from llmos.services.gateway.http.app import App
from llmos.services.gateway.http.context import Site
from llmos.services.gateway.http.service import make_server
from llmos.services.gateway.http.sessions import HttpCore


class HttpWorld:
    """`with HttpWorld() as world: world.http().get("/v1/models")`. The first key, `admin`, is an administrator's of tenant `root`."""

    def __init__(self, *models: m.ModelInfo, max_in_flight: int = 64, max_body: int = 1 << 20) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="llmos-h-"))
        self.run_dir = RunDir(self.path)
        self.state = self.path / "state"
        self.max_in_flight = max_in_flight
        self.max_body = max_body
        self.models = models or (model_info(),)
        self.thread = LoopThread()

    def __enter__(self) -> HttpWorld:
        self.run_dir.create()
        self.admin = self.add_key("root", Role.ADMIN)
        self.tokenizer = self.thread.do(FakeTokenizer, self.run_dir, self.models, "")
        self._tasks = [self.thread.spawn(self.tokenizer.run())]
        self.kernel = self.thread.do(EchoKernel, self.run_dir, None)
        runs = (self.kernel.run(), self.kernel.run_control(), self.kernel.run_steps())
        self._tasks += [self.thread.spawn(run) for run in runs]
        self.start_worker()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_worker()
        self.thread.call(_end(self._tasks))
        self.thread.do(lambda: [port.close() for port in (self.tokenizer.listener, self.kernel.listener)])
        self.thread.do(self.kernel.control.close)
        self.thread.stop()
        shutil.rmtree(self.path)

    def start_worker(self) -> None:
        self.core: HttpCore = self.thread.do(self._make)
        self.thread.call(self.core.start())
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        site = Site(self.core, Access(self.core, self.path, self.state), self.max_body, 1)
        self.server = make_server(App(site), HttpConfig())
        self._serving = asyncio.run_coroutine_threadsafe(self.server.serve([self.listener]), self.thread.loop)
        with self.http() as client:
            client.get("/livez")

    def stop_worker(self) -> None:
        """As a worker stops: it lets go of nothing."""
        self.thread.do(self.core.stop)
        self.server.should_exit = True
        self._serving.result(30)
        self.thread.call(self.core.close())
        self.listener.close()

    def _make(self) -> HttpCore:
        keys = KeyRing(self.state)
        keys.refresh(0.0, at_once=True)
        return HttpCore(self.run_dir, "http", max_in_flight=self.max_in_flight, keys=keys)

    def add_key(self, tenant: str, role: Role = Role.SUBMIT) -> Secret:
        return KeyFile(self.state).add("test", tenant, role)[1]

    def revoke(self, secret: Secret) -> None:
        KeyFile(self.state).revoke(secret.id)

    def http(self, secret: Secret | None = None, **options: Any) -> httpx.Client:
        """A client with the administrator's key, or another one."""
        headers = {"authorization": f"Bearer {(secret or self.admin).text}"} | options.pop("headers", {})
        return httpx.Client(base_url=self.url, headers=headers, timeout=30.0, verify=False, **options)

    def stranger(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30.0, verify=False, **options)


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def events(text: str) -> list[tuple[str, str]]:
    """(id, data) of each event of a stream."""
    found = []
    last = ""
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        last = fields.get("id", last)
        if "data" in fields:
            found.append((last, fields["data"]))
    return found


@dataclass
class Folded:
    """What a client has of a stream of chunks, however they were cut."""

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, list[str]] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    is_done: bool = False


def fold(found: list[tuple[str, str]]) -> Folded:
    whole = Folded()
    for _, data in found:
        if data == "[DONE]":
            whole.is_done = True
            continue
        chunk = json.loads(data)
        whole.usage = chunk.get("usage") or whole.usage
        for choice in chunk["choices"]:
            index = choice["index"]
            whole.texts[index] = whole.texts.get(index, "") + (choice["delta"].get("content") or "")
            if choice["finish_reason"]:
                whole.reasons.setdefault(index, []).append(choice["finish_reason"])
    return whole
