"""A router between a microkernel and a tokenizer that may die at any moment, and clients that keep what they get; no sockets, no time.

Every message waits in a queue until the test lets it arrive. A service that dies takes its queues along, both ways. The microkernel keeps
its sequences (a real one has a journal), but not who reads them. The next token of a sequence is a function of all its tokens, so
whatever is lost, done twice or cut wrongly shows in all that follows.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from echo_sequence import usage
from gateway_world import model_info
from router_world import FakeListener

from llmos.codes import FinishReason
from llmos.errors import LlmosError, NotFound, WrongState
from llmos.ports.core import Peer
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32, unpack_i32
from llmos.protocol.failures import error_message
from llmos.services.gateway.clients import ClientTable
from llmos.services.gateway.router import Router
from llmos.services.tokenizer.incremental import DecodePlan
from llmos.services.tokenizer.stream import TextStream

WINDOW = 6  # tokens that a reader may be behind


@dataclass
class Life:
    """One sequence. `reads`: the gateway does, `has_read`: it did when the output ended."""

    rid: int
    tokens: list[int]
    is_open: bool
    params: Any = None
    prompt_len: int = 0
    generating: bool = False
    reads: bool = False
    has_read: bool = False
    acked: int = 0
    end: m.SeqEnd | None = None
    has_ended: bool = False

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    def begin(self, params: Any) -> None:
        self.params, self.prompt_len, self.end = params, len(self.tokens), None
        self.generating, self.reads, self.acked = True, True, 0

    def stop(self, reason: FinishReason) -> m.SeqEnd:
        self.end = m.SeqEnd(self.rid, reason, usage(self.prompt_len, len(self.output)))
        self.generating, self.has_read, self.reads = False, self.reads, False
        self.has_ended = not self.is_open
        return self.end


class Microkernel:
    """What it says is in `said`, oldest first. `alphabet`: the tokens there are."""

    def __init__(self, alphabet: list[int]) -> None:
        self.lives: dict[int, Life] = {}
        self.keys: dict[str, int] = {}
        self.said: deque[m.Message] = deque()
        self._alphabet = alphabet

    def die(self) -> None:
        self.said.clear()
        for life in self.lives.values():
            life.reads, life.has_read, life.acked = False, False, 0

    @property
    def can_step(self) -> list[int]:
        return [life.rid for life in self.lives.values() if life.generating and not self._is_held_back(life)]

    def _is_held_back(self, life: Life) -> bool:
        return life.reads and len(life.output) >= life.acked + WINDOW

    def step(self, rid: int) -> None:
        """One token more."""
        life = self.lives[rid]
        token = self._alphabet[crc32(pack_i32(life.tokens)) % len(self._alphabet)]
        life.tokens.append(token)
        columns, reads = array("q", [rid, len(life.output) - 1, token]).tobytes(), life.reads
        ends = (life.stop(FinishReason.LENGTH),) if len(life.output) >= life.params.max_tokens else ()
        if reads:
            self.said.append(m.SeqTokens((), ends, columns))

    def hear(self, message: Any) -> None:
        try:
            answer = getattr(self, f"_{type(message).__name__}")(message)
        except LlmosError as error:
            answer = error_message(error, message.req)
        if answer is not None:
            self.said.append(answer)

    def _make(self, message: Any, is_open: bool) -> m.Message:
        if (known := self.keys.get(message.client_request_id)) is not None:
            return m.SeqAccepted(message.req, known, existing=True)
        rid = 100 + len(self.lives)
        self.lives[rid] = life = Life(rid, list(unpack_i32(message.prompt)), is_open)
        self.keys[message.client_request_id] = rid
        if not is_open:
            life.begin(message.params)
        return m.SeqAccepted(message.req, rid)

    def _SeqSubmit(self, message: m.SeqSubmit) -> m.Message:
        return self._make(message, is_open=False)

    def _SeqSpawn(self, message: m.SeqSpawn) -> m.Message:
        return self._make(message, is_open=True)

    def _find(self, rid: int) -> Life:
        if rid not in self.lives:
            raise NotFound(f"no sequence {rid}", field="rid", rid=rid)
        return self.lives[rid]

    def _Stat(self, message: m.Stat) -> m.Message:
        row = m.SeqRow(message.rid, "root", "echo", 6, 0, 0, 0, 0, 0, 0, 0.0, 0.0)
        length = len(self._find(message.rid).tokens)
        return m.Stats(message.req, row, m.JobRow(1, 1, 1, 0, 0), length, None, (), 0, None, 0, usage())

    def _SeqAppend(self, message: m.SeqAppend) -> m.Message:
        life, tokens = self._find(message.rid), list(unpack_i32(message.tokens))
        if message.expect is not None and life.tokens[message.expect : message.expect + len(tokens)] == tokens:
            return m.SeqAppended(message.req, life.rid, message.expect + len(tokens))
        self._check_rest(life, message.expect)
        life.tokens += tokens
        life.end = None
        return m.SeqAppended(message.req, life.rid, len(life.tokens))

    def _SeqContinue(self, message: m.SeqContinue) -> m.Message:
        life = self._find(message.rid)
        has_begun = life.generating or (life.end is not None and bool(life.output))
        if message.expect is not None and has_begun and life.prompt_len == message.expect:
            return self._SeqAttach(m.SeqAttach(message.req, life.rid))
        self._check_rest(life, message.expect)
        life.begin(message.params)
        return m.SeqAttached(message.req, life.rid, "echo", life.prompt_len, life.params, b"")

    def _check_rest(self, life: Life, expect: int | None) -> None:
        if life.has_ended or life.generating or expect not in (None, len(life.tokens)):
            raise WrongState(f"sequence {life.rid} is not at rest", field="rid", rid=life.rid)

    def _SeqAttach(self, message: m.SeqAttach) -> m.Message:
        life = self._find(message.rid)
        if life.generating:
            life.reads = True
        elif life.end is None:
            raise WrongState(f"sequence {life.rid} has no output yet", field="rid", rid=life.rid)
        else:
            life.has_read = True
        end = None if life.generating else life.end
        output = pack_i32(life.output)
        return m.SeqAttached(message.req, life.rid, "echo", life.prompt_len, life.params, output, end)

    def _SeqAck(self, message: m.SeqAck) -> None:
        life = self.lives[message.rid]
        if life.reads:
            life.acked = max(life.acked, message.upto)

    def _SeqFinish(self, message: m.SeqFinish) -> None:
        life = self.lives[message.rid]
        if not (life.reads if life.generating else life.has_read and life.is_open and life.end is not None):
            return
        assert message.upto <= len(life.output)
        del life.tokens[life.prompt_len + message.upto :]
        was_generating = life.generating
        life.generating, life.reads = False, life.reads or life.has_read
        end = life.stop(FinishReason.STOP)
        if was_generating:
            self.said.append(m.SeqTokens((), (end,)))

    def _SeqCancel(self, message: m.SeqCancel) -> None:
        life = self.lives[message.rid]
        if life.generating and life.reads:
            self.said.append(m.SeqTokens((), (life.stop(FinishReason(message.reason)),)))

    def _SeqDetach(self, message: m.SeqDetach) -> None:
        self.lives[message.rid].reads = False

    def _Close(self, message: m.Close) -> m.Message:
        life = self.lives[message.rid]
        assert not life.generating
        life.has_ended = True
        return m.Done(message.req, message.rid)


class Tokenizer:
    """The real one's decoder and stop-string finder. A prompt's characters are its tokens."""

    def __init__(self, plan: DecodePlan) -> None:
        self.said: deque[m.Message] = deque()
        self._plan = plan
        self._streams: dict[int, TextStream] = {}
        self._ended: set[int] = set()

    def die(self) -> None:
        self.said.clear()
        self._streams.clear()
        self._ended.clear()

    def hear(self, message: Any) -> None:
        if isinstance(message, m.Encode):
            self.said.append(m.Encoded(message.req, pack_i32([ord(char) for char in message.text or ""])))
        elif isinstance(message, m.DecodeOpen):
            assert message.stream not in self._streams
            self._streams[message.stream] = TextStream(self._plan, message.stop)
        elif isinstance(message, m.DecodeClose):
            self._streams.pop(message.stream, None)
        else:
            assert isinstance(message, m.DecodeStep)
            self.said.append(m.Decoded(tuple(map(self._decode, message.items))))

    def _decode(self, item: m.DecodeItem) -> m.DecodedItem:
        if item.stream in self._ended:
            return m.DecodedItem(item.stream, "", 0, None, item.final)
        found = self._streams[item.stream].step(item.ids, item.final)
        if item.final or found.stop is not None:
            del self._streams[item.stream]
            self._ended.add(item.stream)
        return m.DecodedItem(item.stream, found.text, found.used, found.stop, item.final)


@dataclass
class Link:
    """A service and the way there. `asked`: what has not arrived yet."""

    service: Any
    is_up: bool = True
    asked: deque[m.Message] = field(default_factory=deque)

    def send(self, message: m.Message) -> bool:
        if self.is_up:
            self.asked.append(message)
        return self.is_up


class FaultyWorld:
    """`got`: all that each client got, by its name."""

    def __init__(self, plan: DecodePlan, alphabet: list[int]) -> None:
        self.kernel, self.text = Link(Microkernel(alphabet)), Link(Tokenizer(plan))
        self.listener = FakeListener()
        self.router = Router(self.text.send, self.kernel.send, 64, "auto-gw-")
        self.router.models = {"echo": model_info(vocab_size=2**16, max_context=4096)}
        self.table: ClientTable[int] = ClientTable(
            self.listener,  # type: ignore[arg-type]
            lambda client: self.router.on_client_gone(client, 0.0),
        )
        self.router.clients = self.table
        self.router.on_text_up(0.0)
        self.router.on_kernel_up(0.0)

    @property
    def microkernel(self) -> Microkernel:
        found: Microkernel = self.kernel.service
        return found

    def client(self, name: bytes, message: m.Message) -> None:
        peer = self.listener.core.peers.setdefault(name, Peer(name, 1, "client", name.decode(), 42, 0))
        self.router.on_client(self.table.of(peer), message, 0.0)

    def leave(self, name: bytes) -> None:
        self.listener.gone.add(name)
        self.table.probe()

    def got(self, name: bytes) -> list[m.Message]:
        return [message for message in self.listener.sent.get(name, []) if not isinstance(message, m.Welcome)]

    # ------------------------------------------------------------ what may happen

    def moves(self) -> list[tuple[str, Any]]:
        """What can happen without anything going wrong."""
        found: list[tuple[str, Any]] = []
        for link in (self.kernel, self.text):
            if link.is_up:
                found += [("arrive", link)] * bool(link.asked) + [("answer", link)] * bool(link.service.said)
        if self.kernel.is_up:
            found += [("step", rid) for rid in self.microkernel.can_step]
        return found

    def move(self, kind: str, what: Any) -> None:
        if kind == "arrive":
            what.service.hear(what.asked.popleft())
        elif kind == "step":
            self.microkernel.step(what)
        elif what is self.kernel:
            self.router.on_kernel(what.service.said.popleft(), 0.0)
        else:
            self.router.on_text(what.service.said.popleft(), 0.0)

    def lose(self, link: Link) -> None:
        link.is_up = False
        link.asked.clear()
        link.service.die()
        (self.router.on_kernel_down if link is self.kernel else self.router.on_text_down)(0.0)

    def bring(self, link: Link) -> None:
        link.is_up = True
        (self.router.on_kernel_up if link is self.kernel else self.router.on_text_up)(0.0)

    def drop(self) -> bool:
        """The microkernel's oldest message can not be sent, if it is one of tokens."""
        said = self.microkernel.said
        if said and isinstance(said[0], m.SeqTokens) and not said[0].ends:
            said.popleft()
            return True
        return False
