"""Streams of the gateway, and the events that happen to them."""

from __future__ import annotations

from gateway_world import model_info, usage

from llmos.codes import FinishReason
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.protocol.params import SamplingParams
from llmos.services.gateway.requests import Outbox
from llmos.services.gateway.streams import Stream

INFO = model_info()
PARAMS = SamplingParams(max_tokens=8, stop=("END",))
SUBMIT = m.SeqSubmit(9, "echo", b"", PARAMS, "alice", "once", 7, 500.0, 5, (3, 4))
CONTINUE = m.SeqContinue(9, 70, "echo", PARAMS, 250.0, "alice")
ATTACH = m.SeqAttach(9, 70, "alice")


def generation() -> Stream:
    """A Generate that is streaming."""
    stream = Stream(9, b"client", 4, "echo", SUBMIT, received=10.0)
    submitted(stream, 10.0)
    stream.answered(m.SeqAccepted(9, 70), 10.0, Outbox())
    stream.take_turn(Outbox())
    return stream


def submitted(stream: Stream, now: float = 0.0) -> Outbox:
    """The microkernel has been asked, a Continue with the answer of its Stat."""
    out = Outbox()
    if stream.rid == 0:
        stream.encoded(m.Encoded(9, pack_i32([1, 2, 3])), INFO, now, out)
    else:
        stream.submit(now, out)
    stream.sent(out.kernel[-1])
    if isinstance(out.kernel[-1], m.Stat):
        out = Outbox()
        stream.answered(stats(70, 3), now, out)
        stream.sent(out.kernel[-1])
    return out


def stats(rid: int, num_tokens: int, req: int = 9) -> m.Stats:
    row = m.SeqRow(rid, "alice", "echo", 6, 0, 0, 0, 0, 0, 0, 0.0, 0.0)
    return m.Stats(req, row, m.JobRow(rid, 1, 1, 0, 0), num_tokens, None, (), 0, None, 0, usage())


def attached(
    *output: int, offset: int = 0, end: m.SeqEnd | None = None, params: SamplingParams | None = PARAMS
) -> tuple[Stream, Outbox]:
    """An Attach that was answered, and what came of it."""
    stream, out = Stream(9, b"client", 4, "", ATTACH, offset=offset), Outbox()
    submitted(stream)
    stream.answered(m.SeqAttached(9, 70, "other", 5, params, pack_i32(output), end), 0.0, out)
    stream.take_turn(out)
    return stream, out


def to_client(out: Outbox) -> list[m.Message]:
    assert all(routing_id == b"client" for routing_id, _ in out.client)
    return [message for _, message in out.client]


def feed(stream: Stream, offset: int, *ids: int) -> Outbox:
    out = Outbox()
    stream.tokens(m.TokenEntry(70, offset, ids), out)
    return out


def decode(stream: Stream, text: str, used: int, stop: str | None = None, *, final: bool = False) -> Outbox:
    out = Outbox()
    stream.decoded(m.DecodedItem(9, text, used, stop, final), out)
    return out


def ending(reason: FinishReason = FinishReason.LENGTH, output: int = 2) -> m.SeqEnd:
    return m.SeqEnd(70, reason, usage(3, output))


def end(stream: Stream, reason: FinishReason = FinishReason.LENGTH, output: int = 2) -> Outbox:
    out = Outbox()
    stream.end(ending(reason, output), out)
    return out
