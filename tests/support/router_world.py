"""A router without sockets: clients that leave, clients that do not read, services that fail."""

from __future__ import annotations

from typing import Any

from gateway_world import model_info
from stream_events import stats

from llmos.ports.core import ListenerCore, Peer
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, pack_i32
from llmos.protocol.params import SamplingParams
from llmos.services.gateway.clients import ClientTable
from llmos.services.gateway.router import Router


class FakeListener:
    """A ROUTER whose clients may be gone or not reading."""

    def __init__(self) -> None:
        self.core: ListenerCore[Any] = ListenerCore("client", Schema(m.ClientToGateway), frozenset({"client"}), 1, 8)
        self.sent: dict[bytes, list[m.Message]] = {}
        self.gone: set[bytes] = set()
        self.full: set[bytes] = set()

    def send(self, peer: Peer, message: m.Message) -> bool:
        if peer.routing_id in self.gone:
            self.core.counters.unroutable += 1
            return False
        if peer.routing_id in self.full:
            self.core.counters.high_water += 1
            return False
        self.sent.setdefault(peer.routing_id, []).append(message)
        return True


class World:
    def __init__(self, max_in_flight: int = 8) -> None:
        self.text: list[m.Message] = []
        self.kernel: list[m.Message] = []
        self.text_up = self.kernel_up = True
        self.now = 0.0
        self.listener = FakeListener()
        self.router = Router(self._send_text, self._send_kernel, max_in_flight, "gw-")
        self.router.models = {"echo": model_info()}
        self.table: ClientTable[int] = ClientTable(
            self.listener,  # type: ignore[arg-type]
            lambda client: self.router.on_client_gone(client, self.now),
        )
        self.router.clients = self.table
        self.router.on_text_up(0.0)
        self.router.on_kernel_up(0.0)

    def _send_text(self, message: m.Message) -> bool:
        if self.text_up:
            self.text.append(message)
        return self.text_up

    def _send_kernel(self, message: m.Message) -> bool:
        if self.kernel_up:
            self.kernel.append(message)
        return self.kernel_up

    def client(self, name: bytes, message: Any, now: float = 0.0, uid: int = 0) -> None:
        peer = self.listener.core.peers.setdefault(name, Peer(name, 1, "client", name.decode(), 42, uid))
        self.router.on_client(self.table.of(peer), message, now)

    def from_kernel(self, message: Any) -> None:
        self.router.on_kernel(message, self.now)

    def from_text(self, message: Any) -> None:
        self.router.on_text(message, self.now)

    def lose_kernel(self) -> None:
        self.kernel_up = False
        self.router.on_kernel_down(self.now)

    def bring_kernel(self) -> list[m.Message]:
        """Another one; returns what it is asked at once."""
        self.kernel_up = True
        before = len(self.kernel)
        self.router.on_kernel_up(self.now)
        return self.kernel[before:]

    def lose_text(self) -> None:
        self.text_up = False
        self.router.on_text_down(self.now)

    def bring_text(self) -> list[m.Message]:
        """Another one; returns what it is told at once."""
        self.text_up = True
        before = len(self.text)
        self.router.on_text_up(self.now)
        return self.text[before:]

    def generate(self, name: bytes = b"a", req: int = 1, **changes: Any) -> None:
        fields: dict[str, Any] = {"text": None, "token_ids": pack_i32([65, 66]), "messages": None, "model": None}
        fields["params"] = SamplingParams(max_tokens=50)
        self.client(name, m.Generate(req=req, **(fields | changes)), self.now)

    def stream(self, name: bytes = b"a", req: int = 1, rid: int = 500) -> None:
        """A request that has come as far as streaming."""
        self.generate(name, req)
        submit = self.kernel[-1]
        assert isinstance(submit, m.SeqSubmit)
        self.from_kernel(m.SeqAccepted(submit.req, rid))

    def attach(self, name: bytes = b"a", req: int = 1, rid: int = 500, offset: int = 0, uid: int = 0) -> int:
        """An Attach as far as the microkernel; returns its number there."""
        self.client(name, m.Attach(req, rid, offset), self.now, uid)
        question = self.kernel[-1]
        assert isinstance(question, m.SeqAttach)
        return question.req

    def attached(self, number: int, *output: int, rid: int = 500, end: m.SeqEnd | None = None) -> None:
        self.from_kernel(m.SeqAttached(number, rid, "echo", 2, SamplingParams(), pack_i32(output), end))

    def measured(self, number: int, rid: int = 500, length: int = 2) -> None:
        """The answer to the Stat before an Append or Continue."""
        assert self.kernel[-1] == m.Stat(number, rid, getattr(self.kernel[-1], "owner", None))
        self.from_kernel(stats(rid, length, number))

    def leave(self, name: bytes) -> None:
        self.listener.gone.add(name)
        self.table.probe()

    def step(self, *entries: tuple[int, int, tuple[int, ...]], ends: tuple[m.SeqEnd, ...] = ()) -> None:
        self.from_kernel(m.SeqTokens(tuple(m.TokenEntry(*entry) for entry in entries), ends))

    def errors(self, name: bytes = b"a") -> list[tuple[int, int]]:
        return [(e.req, e.code) for e in self.listener.sent.get(name, []) if isinstance(e, m.Error)]
