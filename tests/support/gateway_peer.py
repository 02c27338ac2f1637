"""One client of a `GatewayWorld`, by messages: it has no opinion, unlike the SDK."""

from __future__ import annotations

from typing import Any

from gateway_world import DEADLINE_S, GatewayWorld

from llmos.ports.sync import Dialer
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema
from llmos.protocol.params import SamplingParams


class Peer:
    """One client connection, by messages."""

    def __init__(self, world: GatewayWorld, socket: str = "client") -> None:
        self.dialer: Dialer[Any] = Dialer(world.run_dir, socket, Schema(m.GatewayToClient))
        self.dialer.greet("client", "test", DEADLINE_S)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.dialer.close()

    def send(self, message: m.Message) -> None:
        self.dialer.send(message)

    def expect(self, kind: type[m.Message]) -> Any:
        while True:
            message = self.dialer.expect(DEADLINE_S)
            if not isinstance(message, m.Welcome):  # a probe
                assert isinstance(message, kind), message
                return message

    def ask(self, message: m.Message, kind: type[m.Message]) -> Any:
        self.send(message)
        return self.expect(kind)

    def read(self, count: int | None = None) -> tuple[str, list[int], Any]:
        """Text, ids and Finished of the stream that was just accepted; or what the first `count` tokens gave."""
        text, ids = "", list[int]()
        while True:
            message = self.expect(m.Message)
            if isinstance(message, m.Finished):
                return text + message.text, ids, message
            assert isinstance(message, m.Tokens), message
            text, ids = text + message.text, [*ids, *message.ids]
            if count is not None and len(ids) >= count:
                return text, ids, None


def generate(req: int, text: str, **params: Any) -> m.Generate:
    return m.Generate(req, None, text, None, None, SamplingParams(**params))


def go_on(req: int, rid: int, **params: Any) -> m.Continue:
    return m.Continue(req, rid, "echo", SamplingParams(**params))
