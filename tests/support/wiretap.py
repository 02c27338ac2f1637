"""What the SDK sends, before a gateway makes something else of it."""

from __future__ import annotations

from typing import Any

import pytest

from llmos.client.connection import Connection
from llmos.protocol.messages import Message


class Wiretap:
    """`tap = Wiretap(monkeypatch)`; every message that any client sends from then on is in `sent`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[Any] = []
        send = Connection.send

        def tapped(connection: Connection, message: Message) -> None:
            self.sent.append(message)
            send(connection, message)

        monkeypatch.setattr(Connection, "send", tapped)

    def of(self, *kinds: type[Any]) -> list[Any]:
        """The messages of these types, oldest first."""
        return [message for message in list(self.sent) if isinstance(message, kinds)]
