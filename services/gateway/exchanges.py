"""Requests of one question and one answer: Tokenize, Spawn, Append. State table: requests.py.

Tokenize   Encode -> Encoded -> Tokenized
Spawn      (Encode -> Encoded) -> SeqSpawn -> SeqAccepted -> Spawned
Append     (Encode -> Encoded) -> SeqAppend -> SeqAppended -> Appended
"""

from __future__ import annotations

import msgspec

from llmos.protocol.messages import (
    Appended,
    Close,
    Encoded,
    Message,
    ModelInfo,
    SeqAccepted,
    SeqAppend,
    SeqAppended,
    SeqSpawn,
    Spawned,
    Tokenized,
)
from llmos.services.gateway.requests import Outbox, Request, RequestState
from llmos.services.gateway.validate import check_ids


class Exchange(Request):
    """`question` is what the microkernel will be asked, without its tokens; None for Tokenize."""

    def __init__(
        self, number: int, client: bytes, req: int, model: str, question: SeqSpawn | SeqAppend | None = None
    ) -> None:
        super().__init__(number, client, req, model)
        self.question = question
        self._num_tokens = 0

    def encoded(self, message: Encoded, info: ModelInfo, now: float, out: Outbox) -> None:
        question = self.question
        if question is None:
            self._reply(Tokenized(self.req, self.model, message.token_ids, message.pieces), out)
            self._move(RequestState.ENDED)
            return
        ids = check_ids(message.token_ids, info, may_be_empty=isinstance(question, SeqSpawn))
        self._num_tokens = len(ids)
        if isinstance(question, SeqSpawn):
            self._ask(msgspec.structs.replace(question, prompt=message.token_ids), out)
        else:
            self._ask(msgspec.structs.replace(question, tokens=message.token_ids), out)

    def answered(self, message: Message, out: Outbox) -> None:
        is_orphan = self.state is RequestState.ORPHANED
        if isinstance(message, SeqAccepted) and is_orphan:
            assert isinstance(self.question, SeqSpawn)
            if self.question.client_request_id is None:  # else it can be found again
                out.kernel.append(Close(self.number, message.rid))
        elif isinstance(message, SeqAccepted):
            self._reply(Spawned(self.req, message.rid, self.model, self._num_tokens), out)
        elif isinstance(message, SeqAppended) and not is_orphan:
            self._reply(Appended(self.req, message.rid, message.num_tokens), out)
        self._move(RequestState.ENDED)
