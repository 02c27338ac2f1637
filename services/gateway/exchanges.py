"""Requests of one question and one answer: Tokenize, Detokenize, Spawn, Append. State table: requests.py.

Tokenize     Encode -> Encoded -> Tokenized
Detokenize   Render -> Rendered -> Detokenized
Spawn        (Encode -> Encoded) -> SeqSpawn -> SeqAccepted -> Spawned
Append       (Encode -> Encoded) -> Stat -> Stats -> SeqAppend -> SeqAppended -> Appended
"""

from __future__ import annotations

from llmos.protocol.messages import (
    Appended,
    Close,
    Detokenized,
    Encoded,
    ModelInfo,
    Rendered,
    SeqAccepted,
    SeqAppend,
    SeqAppended,
    SeqSpawn,
    Spawned,
    Tokenized,
)
from llmos.services.gateway.questions import Question
from llmos.services.gateway.requests import Granted, Outbox, Request, RequestState
from llmos.services.gateway.validate import check_ids


class Exchange(Request):
    """`wanted`: of the microkernel, still without its tokens; None for Tokenize and Detokenize. `is_durable`: the client gave a Spawn an
    id of its own.
    """

    def __init__(
        self,
        number: int,
        client: bytes,
        req: int,
        model: str,
        wanted: SeqSpawn | SeqAppend | None = None,
        *,
        is_durable: bool = False,
    ) -> None:
        super().__init__(number, client, req, model, None if wanted is None else Question(wanted))
        self._is_durable = is_durable
        self._num_tokens = 0

    def encoded(self, message: Encoded, info: ModelInfo, now: float, out: Outbox) -> None:
        question = self._question
        if question is None:
            self._reply(Tokenized(self.req, self.model, message.token_ids, message.pieces), out)
            self._move(RequestState.ENDED)
            return
        is_spawn = isinstance(question.wanted, SeqSpawn)
        ids = check_ids(message.token_ids, info, may_be_empty=is_spawn)
        self._num_tokens = len(ids)
        question.complete(**{"prompt" if is_spawn else "tokens": message.token_ids})
        self._submit(len(message.token_ids), now, out)

    def rendered(self, message: Rendered) -> Detokenized:
        """Its tokens as text: the answer."""
        self._move(RequestState.ENDED)
        return Detokenized(self.req, self.model, message.text, message.pieces)

    def _granted(self, message: Granted, now: float, out: Outbox) -> None:
        is_orphan = self.state is RequestState.ORPHANED
        if isinstance(message, SeqAccepted) and is_orphan:
            if not self._is_durable:  # else it can be found again
                out.kernel.append(Close(self.number, message.rid))
        elif isinstance(message, SeqAccepted):
            self._reply(Spawned(self.req, message.rid, self.model, self._num_tokens), out)
        elif isinstance(message, SeqAppended) and not is_orphan:
            self._reply(Appended(self.req, message.rid, message.num_tokens), out)
        self._move(RequestState.ENDED)
