"""Attaching as a property: however the output is divided between SeqAttached and what follows, whatever the client has already and
however late the tokenizer answers, the client gets exactly the rest of the ids and of the text.

The tokenizer is the real one's incremental decoder and stop-string finder, on tokens of bytes, so that characters and stop strings
are cut anywhere.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from unittest import mock

import tiny_tokenizers as tiny
from gateway_world import usage
from hypothesis import event, given, settings
from hypothesis import strategies as st
from stream_events import submitted

from llmos.codes import FinishReason
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.protocol.params import SamplingParams
from llmos.services.gateway import feed as feed_module
from llmos.services.gateway.requests import Outbox, RequestState
from llmos.services.gateway.streams import Stream
from llmos.services.tokenizer.incremental import DecodePlan
from llmos.services.tokenizer.stream import TextStream

PLAN = DecodePlan(tiny.byte_level())
ALPHABET = [tiny.byte_level().encode(char).ids for char in "abE"] + [tiny.byte_level().encode("é").ids]
BYTES = sorted({token for ids in ALPHABET for token in ids} | {tiny.byte_level().token_to_id("</s>")})
STOPS = ("ab", "bEb", "aaaa", "é")


@dataclass
class Whole:
    """What one who reads from the beginning gets: text after each number of tokens, then at the end."""

    ids: tuple[int, ...]
    texts: list[str]  # after 0, 1, 2 ... tokens
    last: str  # with the end of the text
    stop: str | None


def whole(ids: tuple[int, ...], stops: tuple[str, ...]) -> Whole:
    stream, texts = TextStream(PLAN, stops), [""]
    for used, token in enumerate(ids, 1):
        found = stream.step((token,), False)
        texts.append(texts[-1] + found.text)
        if found.stop is not None:
            return Whole(ids[:used], texts, texts[-1], found.stop)
    found = stream.step((), True)
    return Whole(ids, texts, texts[-1] + found.text, found.stop)


@dataclass
class World:
    """A stream between a tokenizer that answers when it likes and a client that keeps what it gets."""

    stream: Stream
    text: TextStream | None = None
    queue: deque[m.DecodeItem] = field(default_factory=deque)
    client: list[m.Message] = field(default_factory=list)
    kernel: list[m.Message] = field(default_factory=list)

    def take(self, out: Outbox) -> None:
        assert not out.leave
        for message in out.text:
            assert isinstance(message, m.DecodeOpen)
            self.text = TextStream(PLAN, message.stop)
        self.queue += out.decode
        self.kernel += out.kernel
        self.client += [message for _, message in out.client]

    def answer(self) -> None:
        """The tokenizer works off its oldest item; what comes after a stop string has no text."""
        item, out = self.queue.popleft(), Outbox()
        assert self.text is not None
        found = self.text.step(item.ids, item.final)
        if found.stop is not None:
            self.queue.clear()
        self.stream.decoded(m.DecodedItem(9, found.text, found.used, found.stop, item.final), out)
        self.take(out)


@st.composite
def splits(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """Ranges that cover 0..length in order; each may begin a little before where the one before it ended."""
    cuts = sorted(draw(st.sets(st.integers(0, length), max_size=5)) | {0, length})
    return [(max(0, low - draw(st.integers(0, 2))), high) for low, high in pairwise(cuts)]


@settings(max_examples=400, deadline=None)
@given(
    data=st.data(),
    ids=st.integers(0, 24).flatmap(lambda n: st.lists(st.sampled_from(BYTES), min_size=n, max_size=n)).map(tuple),
    stops=st.sampled_from([(), *((stop,) for stop in STOPS), STOPS]),
    at_once=st.integers(1, 6),
    has_ended=st.booleans(),
)
def test_the_client_gets_exactly_what_it_lacks(
    data: st.DataObject, ids: tuple[int, ...], stops: tuple[str, ...], at_once: int, has_ended: bool
) -> None:
    expected = whole(ids, stops)
    if expected.stop is not None and data.draw(st.booleans(), label="ended by SeqFinish"):
        ids = expected.ids  # the microkernel dropped the rest
    replayed = len(ids) if has_ended else data.draw(st.integers(0, len(ids)), label="tokens in SeqAttached")
    offset = data.draw(st.integers(0, len(ids) + 4), label="offset of the client")
    parts = [part for part in data.draw(splits(len(ids)), label="parts") if part[1] > replayed]
    event(f"stop: {expected.stop is not None}, ended: {has_ended}, all hidden: {offset >= len(expected.ids)}")

    end = m.SeqEnd(70, FinishReason.LENGTH, usage(3, len(ids)))
    stream = Stream(9, b"client", 4, "", m.SeqAttach(9, 70), offset=offset)
    submitted(stream)
    world = World(stream)
    with mock.patch.object(feed_module, "AT_ONCE", at_once):
        out = Outbox()
        output, params = pack_i32(ids[:replayed]), SamplingParams(stop=stops)
        stream.answered(m.SeqAttached(9, 70, "echo", 3, params, output, end if has_ended else None), 0.0, out)
        stream.take_turn(out)
        world.take(out)
        for low, high in [] if has_ended else parts:
            for _ in range(data.draw(st.integers(0, 3), label="answers")):
                if world.queue:
                    world.answer()
            out = Outbox()
            stream.tokens(m.TokenEntry(70, low, ids[low:high]), out)
            world.take(out)
        while world.queue:
            world.answer()
        if not has_ended:
            out = Outbox()
            stream.end(end, out)
            world.take(out)
        while world.queue:
            world.answer()
        if stream.state is RequestState.RESUMING:  # the microkernel cuts the output
            cut = m.SeqEnd(70, FinishReason.STOP, usage(3, len(expected.ids)))
            out = Outbox()
            stream.answered(m.SeqAttached(9, 70, "echo", 3, params, pack_i32(expected.ids), cut), 0.0, out)
            world.take(out)

    accepted, *tokens, finished = world.client
    assert accepted == m.Accepted(4, 70, "echo", 3)
    assert isinstance(finished, m.Finished)
    assert stream.state is RequestState.ENDED
    at = offset
    for message in tokens:
        assert isinstance(message, m.Tokens)
        assert message.offset == at
        at += len(message.ids)
    has = min(offset, len(expected.ids))
    assert tuple(token for message in tokens for token in message.ids) == expected.ids[has:]
    assert "".join(message.text for message in tokens) + finished.text == expected.last[len(expected.texts[has]) :]
    assert finished.stop_string == expected.stop
    assert finished.reason == (FinishReason.LENGTH if expected.stop is None else FinishReason.STOP)
    assert finished.usage.output_tokens == len(expected.ids)
    check_kernel(world.kernel, expected, offset, len(ids), has_ended)


def check_kernel(kernel: list[m.Message], expected: Whole, offset: int, length: int, has_ended: bool) -> None:
    """Hidden tokens are acknowledged as they pass; a stop string is told, and again if the end shows that it came too late."""
    acks = [message.upto for message in kernel if isinstance(message, m.SeqAck)]
    finishes = [message for message in kernel if isinstance(message, m.SeqFinish)]
    attaches = [message for message in kernel if isinstance(message, m.SeqAttach)]  # to be sure that it was cut
    assert len(acks) + len(finishes) + len(attaches) == len(kernel)
    assert acks == sorted(acks)
    if not has_ended:
        assert max(acks, default=0) == min(offset, len(expected.ids))
    is_found, is_late = expected.stop is not None, expected.stop is not None and len(expected.ids) < length
    assert finishes == [m.SeqFinish(70, len(expected.ids))] * ((is_found and not has_ended) + is_late)
    assert attaches == [m.SeqAttach(9, 70)] * is_late
