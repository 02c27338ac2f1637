"""The kernel port: gateways and microkernel about sequences."""

from __future__ import annotations

from llmos.protocol.messages.base import Message, Part
from llmos.protocol.messages.client import TokenLogprobs, Usage
from llmos.protocol.params import SamplingParams


class SeqSubmit(Message, tag=60, frozen=True):
    """Gateway -> microkernel. `params` are complete (no None but seed, max_tokens, logprobs); stop_token_ids include the model's own."""

    req: int
    model: str
    prompt: bytes
    params: SamplingParams
    owner: str
    client_request_id: str | None = None
    nice: int = 0
    deadline_ms: float | None = None


class SeqAccepted(Message, tag=61, frozen=True):
    req: int
    rid: int


class TokenEntry(Part, frozen=True):
    rid: int
    offset: int
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


class SeqEnd(Part, frozen=True):
    rid: int
    reason: int
    usage: Usage


class SeqTokens(Message, tag=62, frozen=True):
    """Microkernel -> gateway: everything that one step committed for this gateway's sequences, and the sequences that ended.

    `columns`: int64[n,3] (rid, offset, token) for sequences that did not ask for log-probabilities; the others are in `entries`.
    """

    entries: tuple[TokenEntry, ...]
    ends: tuple[SeqEnd, ...]
    columns: bytes = b""


class SeqCancel(Message, tag=63, frozen=True):
    """Gateway -> microkernel. Idempotent; the answer is the sequence's end in `SeqTokens`. `reason` is a FinishReason."""

    rid: int
    reason: int


class SeqFinish(Message, tag=64, frozen=True):
    """Gateway -> microkernel: a stop string ended the text; output tokens from `upto` on do not count."""

    rid: int
    upto: int


class SeqAck(Message, tag=65, frozen=True):
    """Gateway -> microkernel: the client has read all output tokens below `upto`."""

    rid: int
    upto: int
