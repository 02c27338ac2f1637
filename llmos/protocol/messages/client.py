"""The client port: clients and gateway."""

from __future__ import annotations

from llmos.protocol.messages.base import Message, Part
from llmos.protocol.params import SamplingParams


class ChatMessage(Part, frozen=True):
    role: str
    content: str


class Usage(Part, frozen=True):
    """What a sequence consumed. Times in milliseconds, by the microkernel's monotonic clock."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    queue_ms: float
    total_ms: float


class TokenLogprobs(Part, frozen=True):
    """Log-probabilities (natural) at one output position: the chosen token's, then the best ones, most likely first."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Generate(Message, tag=10, frozen=True):
    """Client -> gateway. Exactly one of `text`, `token_ids`, `messages` is set. `req` is chosen by the client.

    `nice`: -20 (most urgent) to 19; below 0 is for administrators. `deadline_ms`: from now; a sequence still waiting then is ended,
    one that can not be done by then is refused.
    """

    req: int
    model: str | None
    text: str | None
    token_ids: bytes | None
    messages: tuple[ChatMessage, ...] | None
    params: SamplingParams
    client_request_id: str | None = None
    nice: int = 0
    deadline_ms: float | None = None


class Accepted(Message, tag=11, frozen=True):
    req: int
    rid: int
    model: str
    prompt_tokens: int


class Tokens(Message, tag=12, frozen=True):
    """Gateway -> client: output tokens from `offset` on. `text` may lag behind `ids` (UTF-8, stop strings)."""

    req: int
    offset: int
    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None = None


class Finished(Message, tag=13, frozen=True):
    """The one terminal record of an accepted request. `text` is what was still held back."""

    req: int
    rid: int
    reason: int
    text: str
    usage: Usage
    stop_string: str | None = None


class Ack(Message, tag=14, frozen=True):
    """Client -> gateway: all output tokens below `upto` have been read."""

    req: int
    upto: int


class Cancel(Message, tag=15, frozen=True):
    """Client -> gateway: end request `req`. Idempotent; the answer is its `Finished`."""

    req: int


class Tokenize(Message, tag=16, frozen=True):
    """Client -> gateway. Exactly one of `text`, `messages`."""

    req: int
    model: str | None
    text: str | None
    messages: tuple[ChatMessage, ...] | None


class Tokenized(Message, tag=17, frozen=True):
    req: int
    model: str
    token_ids: bytes
    pieces: tuple[str, ...]
