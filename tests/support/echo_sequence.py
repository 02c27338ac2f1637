"""Answers of a microkernel that are the same in every test, and the sequences of the one that echoes (echo_kernel.py)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import msgspec

from llmos.codes import SeqState
from llmos.ports.core import Peer
from llmos.protocol import limits
from llmos.protocol import messages as m
from llmos.protocol.params import SamplingParams

MAX_CONTEXT = 512


def usage(prompt: int = 1, output: int = 0) -> m.Usage:
    return m.Usage(prompt, 0, output, 0, 0.5, 2.0)


def tenant_row(name: str, **changes: Any) -> m.TenantRow:
    unlimited = limits.UNLIMITED
    row = m.TenantRow(name, "echo", 1.0, unlimited, 0, unlimited, unlimited, 0.0)
    return msgspec.structs.replace(row, **changes)


def explained(rid: int, req: int = 1, nice: int = 0) -> m.Explained:
    """Ten seconds of a life, a tenth of it decoding."""
    parts = {
        "queue": 2000.0,
        "prefill": 500.0,
        "decode": 1000.0,
        "preempted": 1500.0,
        "suspended": 4000.0,
        "client": 1000.0,
    }
    times = {f"{name}_ms": value for name, value in parts.items()}
    return m.Explained(
        req, rid, SeqState.RUNNING, age_ms=10_000.0, **times, preemptions=2, suspensions=1, cached_tokens=32, nice=nice
    )


@dataclass
class EchoSequence:
    """`tokens`: all of them; the newest output begins at `prompt_len`."""

    rid: int
    owner: str
    model: str
    tokens: list[int]
    is_open: bool
    job: int
    params: SamplingParams | None = None  # None = never generated
    reader: Peer | None = None
    last_reader: Peer | None = None  # of the output that is over
    parent: int | None = None
    after: tuple[int, ...] = ()
    nice: int = 0
    deadline_ms: float | None = None
    prompt_len: int = 0
    generating: bool = False
    suspended: bool = False
    pages: int = 0  # how it was suspended
    acked: int = 0
    end: m.SeqEnd | None = None  # of the newest output
    reason: int = 0  # of the sequence
    children: list[int] = field(default_factory=list)
    second_at: int = -1

    @property
    def result(self) -> bytes:
        """Of a text: its length, where its second part begins and its first token as numbers; of the model "judge" a share of its length.
        Of a prompt: records in which each token is half as likely as the one before it."""
        if self.second_at >= 0:
            numbers = (len(self.tokens), self.second_at, self.tokens[0])
            return struct.pack("<f", len(self.tokens) / 100) if self.model == "judge" else struct.pack("<3f", *numbers)
        top = None if self.params is None else self.params.prompt_logprobs
        if top is None:
            return b""
        prompt = self.tokens[: self.prompt_len]
        best = [float(-1 - index) for index in range(top)]
        return b"".join(
            struct.pack(f"<if{top}i{top}f", token, -0.5 * place, *[token] * top, *best)
            for place, token in enumerate(prompt)
        )

    @property
    def sent(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def limit(self) -> int:
        """Most output tokens."""
        room = MAX_CONTEXT - self.prompt_len
        most = None if self.params is None else self.params.max_tokens
        return room if most is None else min(most, room)

    @property
    def state(self) -> SeqState:
        if self.reason:
            return SeqState.FINISHED
        if self.suspended:
            return SeqState.SUSPENDED
        return SeqState.RUNNING if self.generating else SeqState.BLOCKED

    def begin(self, params: SamplingParams, reader: Peer) -> None:
        self.params, self.reader, self.end = params, reader, None
        self.prompt_len, self.generating, self.acked = len(self.tokens), True, 0

    def echo(self, count: int) -> tuple[int, ...]:
        first = self.sent
        prompt = self.tokens[: self.prompt_len] or [65]
        ids = tuple(prompt[i % len(prompt)] for i in range(first, first + count))
        self.tokens += ids
        return ids


def row_of(seq: EchoSequence) -> m.SeqRow:
    return m.SeqRow(
        seq.rid,
        seq.owner,
        seq.model,
        seq.state,
        seq.prompt_len,
        seq.sent,
        seq.limit if seq.params else 0,
        pages=3,
        cached_tokens=0,
        preemptions=0,
        age_ms=1500.0,
        tokens_per_s=12.5,
        nice=seq.nice,
        job=seq.job,
        is_open=seq.is_open,
    )
