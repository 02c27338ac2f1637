"""What the journal remembers of sequences: one record per change, from which every sequence can be made again. Pure.

A sequence is a fold over its records: `SequenceRecord` (whole) or `ForkRecord` begins it, the others change it. A record about a
sequence that is not there is left over from one that was forgotten, and means nothing. What records mean where others before them are
missing is decided in recovery.py. What is not recorded is lost with the process
and made anew: rows, pages, queues, who reads, fair-share counters, where time went before.

Wire form: msgpack arrays `[tag, fields...]`, as on the ports; the same rules of evolution.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from llmos.protocol.messages import ExecutorReady, SeqEnd
from llmos.protocol.params import SamplingParams

VERSION = 2
OLDEST_VERSION = 1  # that can be read


class Origin(IntEnum):
    """What a segment follows."""

    SEGMENT = 0  # the one before it, without a gap
    PROCESS = 1  # an earlier process: what could be read of its segments is what is true now
    GAP = 2  # a time in which nothing could be written: what is older and not whole in here is out of date


class _Record(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Base of all records."""


class MetaRecord(_Record, tag=1, frozen=True):
    """First record of every segment. `rids`, `seeds`: how many were given out. Clocks: what they said when it was written, in seconds;
    `boot` tells whether the monotonic one still counts from the same moment. `previous_bytes`: the length of the segment that it goes on
    from."""

    version: int
    rids: int
    seeds: int
    seed_root: bytes
    monotonic_s: float
    wall_s: float
    boot: str
    origin: int = Origin.SEGMENT
    previous_bytes: int = 0


class SequenceRecord(_Record, tag=2, frozen=True):
    """A whole sequence as it is now. `reason`: why it ended, 0 = it has not. Times by the monotonic clock. `result`: of one that ended."""

    rid: int
    owner: str
    model: str
    tokens: bytes
    prompt_len: int
    max_len: int
    params: SamplingParams
    accepted_at: float
    job: int
    parent: int | None
    is_open: bool
    client_request_id: str | None
    nice: int
    deadline: float | None
    generating: bool
    wants_prefill: bool
    suspended: bool
    after: tuple[int, ...]
    forks: int
    turn_at: float
    started_at: float | None
    reason: int
    ended_at: float | None
    end: SeqEnd | None
    request_digest: bytes
    attended: bool
    second_at: int = -1
    result: bytes = b""


class ForkRecord(_Record, tag=3, frozen=True):
    """A child begins with what its parent has now."""

    rid: int
    parent: int
    params: SamplingParams
    accepted_at: float


class TokensRecord(_Record, tag=4, frozen=True):
    """What a step committed: int64[n,3] (rid, offset in the output of its turn, token)."""

    columns: bytes


class AppendRecord(_Record, tag=5, frozen=True):
    """More input, int32[n]."""

    rid: int
    tokens: bytes


class TurnRecord(_Record, tag=6, frozen=True):
    rid: int
    params: SamplingParams
    max_len: int
    deadline: float | None
    turn_at: float


class EndRecord(_Record, tag=7, frozen=True):
    """A turn is over, its first `num_output` tokens count; `reason` is 0 if the sequence goes on without it. `result`: what was computed
    beside tokens, which is not written down before: until then it is computed again."""

    rid: int
    num_output: int
    end: SeqEnd | None
    reason: int
    at: float
    result: bytes = b""


class ChangeRecord(_Record, tag=8, frozen=True):
    """What its owner changed; all values as they are now."""

    rid: int
    nice: int
    deadline: float | None
    suspended: bool
    after: tuple[int, ...]


class ExecutorRecord(_Record, tag=9, frozen=True):
    """What a model's executor can do; holds until the next one."""

    ready: ExecutorReady


Record = (
    MetaRecord
    | SequenceRecord
    | ForkRecord
    | TokensRecord
    | AppendRecord
    | TurnRecord
    | EndRecord
    | ChangeRecord
    | ExecutorRecord
)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


def encode(record: Record) -> bytes:
    return _encoder.encode(record)


def decode(payload: bytes | memoryview) -> Record:
    """Raises `msgspec.DecodeError`."""
    record: Record = _decoder.decode(payload)
    return record
