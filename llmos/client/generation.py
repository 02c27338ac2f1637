"""One output as it arrives, without I/O, over as many connections as it takes.

    asked -> accepted (Accepted) -> ended (Finished, Error, a gap in the offsets)
      ^         |
      +- lost --+      the connection broke: whoever owns it asks for the rest, under the number of another connection

Text needs no bookkeeping of its own: what a reader has after the first n tokens is a function of these tokens alone (the gateway
sends text with the tokens that made it certain, and the rest with the end), so a reader that asks for the rest from token n on
gets the rest of the text, too.

Invariants: offsets have no gap and each token passes once; after the terminal item (Completion or LlmosError) the sink gets nothing
more, unless it is asked for again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llmos.client._core import Sink
from llmos.client.chat import split_calls
from llmos.client.types import Chunk, Completion, PromptToken
from llmos.codes import FinishReason
from llmos.errors import LlmosError, ProtocolError, SequenceFailed, Unavailable
from llmos.protocol.failures import typed
from llmos.protocol.messages import Accepted, Cancel, Error, Finished, Message, PromptLogprobs, TokenLogprobs, Tokens
from llmos.protocol.prompt_logprobs import unpack_records

_WHY = {  # the other names speak for themselves
    FinishReason.DEADLINE: "its deadline passed while it waited,",
    FinishReason.DEPENDENCY: "its dependency (`after`) ended badly,",
    FinishReason.JOURNAL_CORRUPT: "journal_corrupt (a part of it could not be read after a restart)",
    FinishReason.POISONED: "poisoned (the executor died of it again and again)",
}
_UNKNOWN = TokenLogprobs(math.nan)


class Generation:
    """Waits for an output from token `start` on; the sink gets Chunks, then one Completion or LlmosError.

    `rid`, `prompt_tokens`: None until it is accepted. `upto`: the offset of the token that comes next. `accepted`: since it was last
    asked for. `detaches`: whoever leaves it lets the sequence go on; else the output ends. `owned`: the sequence ends with its client.
    """

    def __init__(
        self,
        sink: Sink,
        start: int = 0,
        *,
        on_lost: Callable[[], None] = lambda: None,
        detaches: bool = False,
        owned: bool = False,
    ) -> None:
        self.req = 0
        self.times_asked = 0
        self.accepted = False
        self.ended = False
        self.rid: int | None = None
        self.prompt_tokens: int | None = None
        self.upto = start
        self.detaches = detaches
        self.owned = owned
        self.wants_logprobs = False
        self._start = start
        self._model = ""
        self._tool_family: str | None = None
        self._sink = sink
        self._on_lost = on_lost
        self._text: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt: list[PromptToken] = []

    def asked(self, req: int) -> Generation:
        """It is asked for, or for the rest of it, under this number."""
        self.req = req
        self.times_asked += 1
        self.ended = self.accepted = False
        return self

    @property
    def is_resumed(self) -> bool:
        return self.times_asked > 1

    def deliver(self, message: Message) -> Message | None:
        if isinstance(message, Tokens):
            return self._tokens(message)
        if isinstance(message, PromptLogprobs):
            return self._scored(message)
        if isinstance(message, Accepted):
            return self._accepted(message)
        if isinstance(message, Finished):
            self._finished(message)
        elif isinstance(message, Error):
            self.fail(typed(message))
        else:
            return self._broken(f"a {type(message).__name__} does not belong to a stream")
        return None

    def fail(self, error: LlmosError) -> None:
        self.ended = True
        self._sink(error)

    def lose(self) -> None:
        self._on_lost()

    def _accepted(self, message: Accepted) -> Message | None:
        if (self.rid or message.rid) != message.rid or self.prompt_tokens not in (None, message.prompt_tokens):
            text = f"sequence {message.rid} has another output by now; the rest of the one that was interrupted is gone"
            self.fail(Unavailable(text, rid=message.rid))
            return None  # it may be somebody else's: nothing is ended
        self.accepted = True
        self.rid, self.prompt_tokens, self._model = message.rid, message.prompt_tokens, message.model
        self._tool_family = (
            message.tool_family or self._tool_family
        )  # who asks for the rest did not say what the tools are
        return None

    def _tokens(self, message: Tokens) -> Message | None:
        end = message.offset + len(message.ids)
        if self.is_resumed and end <= self.upto and message.offset < self.upto:
            return None  # it has these already
        if message.offset != self.upto:
            return self._broken(f"gap in the stream: got offset {message.offset}, expected {self.upto}")
        logprobs = message.logprobs
        if logprobs is None and self.is_resumed and self.wants_logprobs:
            logprobs = (_UNKNOWN,) * len(message.ids)  # what was made while nobody read comes without
        if logprobs is not None:
            self._pad_logprobs()
            self._logprobs.extend(logprobs)
        self.upto = end
        self._ids.extend(message.ids)
        self._text.append(message.text)
        self._sink(Chunk(message.text, message.ids, message.offset, logprobs, self.rid or 0))
        return None

    def _scored(self, message: PromptLogprobs) -> Message | None:
        """Given tokens with their log-probabilities; after an interruption all of them come again."""
        if message.start > len(self._prompt):
            return self._broken(f"gap in the prompt: got token {message.start}, expected {len(self._prompt)}")
        try:
            found = [PromptToken(*record) for record in unpack_records(message.values, message.top)]
        except ProtocolError as error:
            return self._broken(error.message)
        self._prompt += found[len(self._prompt) - message.start :]
        return None

    def _pad_logprobs(self) -> None:
        """One for each token, known or not."""
        self._logprobs.extend([_UNKNOWN] * (self.upto - self._start - len(self._logprobs)))

    def _broken(self, why: str) -> Message | None:
        self.fail(ProtocolError(why, rid=self.rid))
        return None if self.detaches else Cancel(self.req)

    def _finished(self, message: Finished) -> None:
        try:
            reason = FinishReason(message.reason)
        except ValueError:
            self.fail(ProtocolError(f"unknown finish reason {message.reason}", field="reason", rid=message.rid))
            return
        if reason.is_failure:
            why = _WHY.get(reason, reason.name.lower())
            text = f"sequence {message.rid} ended: {why} after {len(self._ids)} tokens"
            self.fail(SequenceFailed(text, field="reason", rid=message.rid))
            return
        self.ended = True
        if message.text:
            self._text.append(message.text)
            self._sink(Chunk(message.text, (), self.upto, None, message.rid))
        if self._logprobs:
            self._pad_logprobs()
        text = "".join(self._text)
        said, calls = (None, ()) if self._tool_family is None else split_calls(self._tool_family, text, message.rid)
        self._sink(
            Completion(
                message.rid,
                self._model,
                text,
                tuple(self._ids),
                reason.name.lower(),
                message.stop_string,
                message.usage,
                tuple(self._logprobs) if self._logprobs else None,
                tuple(self._prompt) if self._prompt else None,
                calls,
                said,
            )
        )
