"""The kernel port: gateways and microkernel about sequences."""

from __future__ import annotations

from llmos.protocol.messages.base import Message, Part
from llmos.protocol.messages.client import TokenLogprobs, Usage
from llmos.protocol.params import SamplingParams


class SeqSubmit(Message, tag=60, frozen=True):
    """Gateway -> microkernel. `params` are complete (no None but seed, max_tokens, logprobs, prompt_logprobs); stop_token_ids include
    the model's own. `second_at`: -1 = it generates; else it is a text for an encoder, whose second part begins at that token, 0 = it has
    none."""

    req: int
    model: str
    prompt: bytes
    params: SamplingParams
    owner: str
    client_request_id: str | None = None
    nice: int = 0
    deadline_ms: float | None = None
    parent: int | None = None
    after: tuple[int, ...] = ()
    second_at: int = -1


class SeqAccepted(Message, tag=61, frozen=True):
    """The answer to `SeqSubmit` and `SeqSpawn`. `existing`: the same was asked before under the same `client_request_id`, this is the
    sequence that was made then; `SeqAttach` reads it."""

    req: int
    rid: int
    existing: bool = False


class TokenEntry(Part, frozen=True):
    rid: int
    offset: int
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


class ResultEntry(Part, frozen=True):
    """What was computed for a sequence beside tokens. Of a text that was encoded: its vector, float32[n], `start` 0. Of a prompt whose
    log-probabilities were asked for: their records from token `start` on (section 3.6)."""

    rid: int
    start: int
    values: bytes


class SeqEnd(Part, frozen=True):
    """The end of a sequence's output. A sequence that is not open has ended with it."""

    rid: int
    reason: int
    usage: Usage


class SeqTokens(Message, tag=62, frozen=True):
    """Microkernel -> gateway: everything that one step committed for this gateway's sequences, and the sequences that ended. Of one
    sequence `results` come before tokens, and tokens before the end.

    `columns`: int64[n,3] (rid, offset, token) for sequences that did not ask for log-probabilities; the others are in `entries`.
    """

    entries: tuple[TokenEntry, ...]
    ends: tuple[SeqEnd, ...]
    columns: bytes = b""
    results: tuple[ResultEntry, ...] = ()


class SeqCancel(Message, tag=63, frozen=True):
    """Gateway -> microkernel. Idempotent; the answer is the end in `SeqTokens`, of an open sequence's output, else of the sequence.
    `reason` is a FinishReason."""

    rid: int
    reason: int


class SeqFinish(Message, tag=64, frozen=True):
    """Gateway -> microkernel: a stop string ended the text; output tokens from `upto` on do not count, an open sequence drops them."""

    rid: int
    upto: int


class SeqAck(Message, tag=65, frozen=True):
    """Gateway -> microkernel: the client has read all output tokens below `upto`."""

    rid: int
    upto: int


class SeqSpawn(Message, tag=66, frozen=True):
    """Gateway -> microkernel: an open sequence; `prompt` may be empty. The answer is `SeqAccepted`."""

    req: int
    model: str
    prompt: bytes
    owner: str
    nice: int = 0
    parent: int | None = None
    after: tuple[int, ...] = ()
    client_request_id: str | None = None


class SeqAppend(Message, tag=67, frozen=True):
    """Gateway -> microkernel: `tokens` int32[n] for an open sequence of `model` that is not generating. `owner` as in `Kill`.

    `expect`: set if this was asked before of a microkernel that died: how long the sequence was then. If it has these tokens from there
    on, it was done, and is not done again.
    """

    req: int
    rid: int
    model: str
    tokens: bytes
    owner: str | None = None
    expect: int | None = None


class SeqAppended(Message, tag=68, frozen=True):
    req: int
    rid: int
    num_tokens: int


class SeqContinue(Message, tag=69, frozen=True):
    """Gateway -> microkernel: an open sequence of `model` generates and the sender reads. `params` as in `SeqSubmit`. The answer is
    `SeqAttached`. `expect`: as in `SeqAppend`; an output that began there is read, and no other is made."""

    req: int
    rid: int
    model: str
    params: SamplingParams
    deadline_ms: float | None = None
    owner: str | None = None
    expect: int | None = None


class SeqAttach(Message, tag=70, frozen=True):
    """Gateway -> microkernel: the sender becomes the reader of a sequence. The answer is `SeqAttached`, then `SeqTokens` as usual."""

    req: int
    rid: int
    owner: str | None = None


class SeqAttached(Message, tag=71, frozen=True):
    """`output`: int32[n], the output so far; what follows has offsets from n on. `params`: how it is made (None: it never generated).
    `end`: it has ended already, or an open sequence is at rest; nothing follows then. `result`: what was computed beside tokens so far, as
    in `ResultEntry` from 0 on."""

    req: int
    rid: int
    model: str
    prompt_tokens: int
    params: SamplingParams | None
    output: bytes
    end: SeqEnd | None = None
    result: bytes = b""


class SeqDetach(Message, tag=72, frozen=True):
    """Gateway -> microkernel: the reader left; the sequence goes on. Idempotent, no answer."""

    rid: int


class SeqReplaced(Message, tag=73, frozen=True):
    """Microkernel -> gateway: another reader took the sequence over; no more tokens come here."""

    rid: int
