"""What the SDK sends, before a gateway makes something else of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from llmos.client.connection import Connection
from llmos.protocol.messages import Message


class Wiretap:
    """`tap = Wiretap(monkeypatch)`; every message that any client sends from then on is in `sent`.

    The ids that the SDK gives requests which bring none are chance: they are in `ids`, and out of `sent`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[Any] = []
        self.ids: list[str] = []
        send = Connection.send

        def tapped(connection: Connection, message: Message) -> None:
            self.sent.append(self._without_id(message))
            send(connection, message)

        monkeypatch.setattr(Connection, "send", tapped)

    def _without_id(self, message: Message) -> Message:
        request_id = getattr(message, "client_request_id", None)
        if request_id is None or not request_id.startswith("auto-"):
            return message
        self.ids.append(request_id)
        return msgspec.structs.replace(message, client_request_id=None)

    def of(self, *kinds: type[Any]) -> list[Any]:
        """The messages of these types, oldest first."""
        return [message for message in list(self.sent) if isinstance(message, kinds)]
