"""Requests whose answer is a vector: Embed. State table: requests.py.

    Embed   (Encode -> Encoded) -> SeqSubmit -> SeqAccepted -> Embedded, or Error

To the microkernel it is a stream like that of a Generate, which gives no tokens but one result: it goes on with a SeqAttach when the
microkernel is back, and is found again under its `client_request_id`. To the client it is one question and one answer.
"""

from __future__ import annotations

from llmos.codes import FinishReason
from llmos.errors import SequenceFailed
from llmos.protocol.messages import Embedded, Encoded, ModelInfo, SeqEnd, SeqSubmit
from llmos.services.gateway.requests import Outbox
from llmos.services.gateway.streams import Stream
from llmos.services.gateway.validate import check_ids


class Encoding(Stream):
    """`labels`: names of the numbers, if they have some."""

    def __init__(
        self,
        number: int,
        client: bytes,
        req: int,
        model: str,
        wanted: SeqSubmit,
        *,
        labels: tuple[str, ...],
        received: float,
        is_durable: bool,
    ) -> None:
        super().__init__(number, client, req, model, wanted, received=received, is_durable=is_durable)
        self._labels = labels
        self._values = b""

    @property
    def _reads(self) -> bool:
        """There is no text to make."""
        return False

    def encoded(self, message: Encoded, info: ModelInfo, now: float, out: Outbox) -> None:
        self._prompt_tokens = len(check_ids(message.token_ids, info, needs_room=False))
        self._question.complete(prompt=message.token_ids, second_at=message.second_at)
        self._submit(len(message.token_ids), now, out)

    def _accept(self, out: Outbox) -> None:
        """The client only waits for the answer."""

    def _take_result(self, start: int, values: bytes, out: Outbox) -> None:
        self._values = values or self._values

    @property
    def _lacks_scores(self) -> bool:
        return not self._values and not self._asked_for_scores

    def _reply_end(self, end: SeqEnd, text: str, out: Outbox) -> None:
        if self._values and end.reason == FinishReason.STOP:
            self._reply(Embedded(self.req, end.rid, self.model, self._values, self._labels, end.usage), out)
            return
        reason = FinishReason(end.reason).name.lower()
        error = SequenceFailed(f"sequence {end.rid} ended: {reason}, without a result", field="reason", rid=end.rid)
        self._reply_error(error, out)
