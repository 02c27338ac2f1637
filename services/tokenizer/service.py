"""The tokenizer service: answers gateways on the `text` port.

Decoding is done at once, on the event loop: it is what streams wait for. Encoding of anything long runs in a few
threads, outside the interpreter lock, so that a 4 MiB prompt does not hold up a step; answers carry `req` and may
overtake each other. A thread can not be stopped: one that takes longer than its text may (`time_limit`) ends the process, and the gateway
finds out which text it was. One that needs more memory than there is is refused.

Streams belong to one greeting of one gateway (`Peer.serial`): when a gateway of the same name greets anew, its old
streams are dropped. A stream that can not be opened or is unknown is answered by an `Error` whose `req` is the stream
(a gateway numbers requests and streams with one counter), and the other items of a step as usual. A stream that a stop
string closed stays known as ended, so that tokens which were already on their way get an empty `DecodedItem` with
`used` 0 instead of an error.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmos.config import Config, model_path
from llmos.encoders import GENERATE
from llmos.errors import ContextTooLong, InvalidRequest, LlmosError, NotFound
from llmos.killpoints import ARMED, reach
from llmos.ports.aio import AsyncListener
from llmos.ports.core import Peer
from llmos.protocol import limits
from llmos.protocol.codec import Schema, pack_i32, unpack_i32
from llmos.protocol.failures import error_message
from llmos.protocol.messages import (
    ChatMessage,
    DecodeClose,
    Decoded,
    DecodedItem,
    DecodeItem,
    DecodeOpen,
    DecodeStep,
    Encode,
    Encoded,
    GatewayToTokenizer,
    Message,
    ModelInfoGet,
    ModelInfoList,
    Render,
    Rendered,
)
from llmos.protocol.params import SamplingParams
from llmos.services.base import ServiceContext
from llmos.services.tokenizer.models import ModelTable, ServedModel, load_model
from llmos.services.tokenizer.stream import TextStream

if TYPE_CHECKING:
    from llmos.ports.async_lifeline import AsyncLifeline

log = logging.getLogger(__name__)

ROLES = frozenset({"gateway"})
_ENCODE_THREADS = 2
_INLINE_BYTES = 2048  # encoding this much takes about a millisecond; a thread would cost more
_MAX_ENDED = 4096  # closed streams remembered per gateway
_LEAST_TIME_S, _TIME_PER_MIB_S = 2.0, 7.0  # several times what a slow box needs
EXIT_TOO_LATE = 70
TROUBLE_VARIABLE = "LLMOS_FAKE_TEXT_TROUBLE"


@dataclass(slots=True)
class _Session:
    """What one greeting of one gateway owns. `ended`: streams that a stop string closed, oldest first."""

    peer: Peer
    streams: dict[int, TextStream] = field(default_factory=dict)
    ended: dict[int, None] = field(default_factory=dict)

    def end(self, stream: int) -> None:
        del self.streams[stream]
        self.ended[stream] = None
        if len(self.ended) > _MAX_ENDED:
            del self.ended[next(iter(self.ended))]


class TextService:
    """The port's work without the port: `send` gives a message to a peer, False if it is gone."""

    def __init__(
        self, models: ModelTable, send: Callable[[Peer, Message], bool], forget: Callable[[Peer], None]
    ) -> None:
        self._models = models
        self._send = send
        self._forget = forget
        self._sessions: dict[str, _Session] = {}
        self._threads = ThreadPoolExecutor(_ENCODE_THREADS, thread_name_prefix="encode")
        self._tasks: set[asyncio.Task[None]] = set()
        self.served = 0
        self.is_broken = asyncio.Event()  # by a bug that nobody could be told of
        self.bug: BaseException | None = None

    def handle(self, peer: Peer, message: Any) -> None:
        """Serve one message of a gateway; must run on the event loop."""
        self.served += 1
        if ARMED:
            reach("tokenizer.received")
        session = self._session(peer)
        if isinstance(message, DecodeStep):
            self._step(session, message)
        elif isinstance(message, DecodeOpen):
            self._open(session, message)
        elif isinstance(message, DecodeClose):
            session.streams.pop(message.stream, None)
            session.ended.pop(message.stream, None)
        elif isinstance(message, (Encode, Render)):
            self._encode(peer, message)
        elif isinstance(message, ModelInfoGet):
            self._send(peer, ModelInfoList(message.req, self._models.infos()))
        else:
            raise AssertionError(f"{type(message).__name__} is not of this port")

    async def close(self) -> None:
        """Wait for encodings that run; forget those that wait."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def greeted(self, peer: Peer) -> None:
        """A gateway said hello; what its predecessor of the same name left is dropped."""
        self._session(peer)

    def _session(self, peer: Peer) -> _Session:
        session = self._sessions.get(peer.name)
        if session is None or session.peer.serial < peer.serial:
            if session is not None:
                log.info("gateway %s greeted anew: %d streams dropped", peer.name, len(session.streams))
                if session.peer.routing_id != peer.routing_id:
                    self._forget(session.peer)
            session = self._sessions[peer.name] = _Session(peer)
        return session

    # ---------------------------------------------------------------- decoding

    def _open(self, session: _Session, message: DecodeOpen) -> None:
        try:
            if message.stream in session.streams:
                raise InvalidRequest(f"stream {message.stream} is open already", field="stream")
            check_stops(message.stop)
            session.streams[message.stream] = self._models.get(message.model).open_stream(message.stop)
        except LlmosError as error:
            self._refuse_stream(session.peer, message.stream, error)

    def _step(self, session: _Session, message: DecodeStep) -> None:
        answers = []
        for item in message.items:
            if item.stream in session.streams:
                answers.append(self._decode(session, item))
            elif item.stream in session.ended:
                answers.append(DecodedItem(item.stream, "", 0, None, item.final))
            else:
                error = NotFound(f"no decode stream {item.stream}", field="stream")
                self._refuse_stream(session.peer, item.stream, error)
        if answers:
            if ARMED:
                reach("tokenizer.decoded")
            self._send(session.peer, Decoded(tuple(answers)))
            if ARMED:
                reach("tokenizer.sent")

    def _decode(self, session: _Session, item: DecodeItem) -> DecodedItem:
        found = session.streams[item.stream].step(item.ids, item.final)
        if item.final:
            del session.streams[item.stream]
        elif found.stop is not None:
            session.end(item.stream)
        return DecodedItem(item.stream, found.text, found.used, found.stop, item.final)

    def _refuse_stream(self, peer: Peer, stream: int, error: LlmosError) -> None:
        self._send(peer, error_message(error, stream))

    # ---------------------------------------------------------------- encoding

    def _encode(self, peer: Peer, message: Encode | Render) -> None:
        try:
            size = check_render(message) if isinstance(message, Render) else check_encode(message)
            model = self._models.get(message.model)
            if size <= _INLINE_BYTES and not _has_grammar(message):
                self._send(peer, answer(model, message))
                return
        except LlmosError as error:
            self._send(peer, error_message(error, message.req))
            return
        task = asyncio.get_running_loop().create_task(self._encode_long(peer, model, message, size))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            self.bug = bug
            self.is_broken.set()

    async def _encode_long(self, peer: Peer, model: ServedModel, message: Encode | Render, size: int) -> None:
        loop = asyncio.get_running_loop()
        alarm = asyncio.Event()  # the thread has begun: from now on its time counts

        def work() -> Encoded | Rendered:
            if _has_grammar(message):
                model.vocabulary()  # the first time a second for a large one, which is not this grammar's fault
            loop.call_soon_threadsafe(alarm.set)
            return answer(model, message)

        watch = loop.create_task(_watch(alarm, size))
        found: Message
        try:
            found = await loop.run_in_executor(self._threads, work)
        except LlmosError as error:
            found = error_message(error, message.req)
        except MemoryError:
            text = f"no memory to encode {size} bytes (tokenizer.memory_mib)"
            found = error_message(InvalidRequest(text, field="text"), message.req)
        finally:
            watch.cancel()
        self._send(peer, found)


def _has_grammar(message: Encode | Render) -> bool:
    return isinstance(message, Encode) and message.grammar is not None


def time_limit(size: int) -> float:
    """Seconds that the encoding of so many bytes may take."""
    return _LEAST_TIME_S + size / 2**20 * _TIME_PER_MIB_S


async def _watch(alarm: asyncio.Event, size: int) -> None:
    """End the process if an encoding does not come to its end."""
    await alarm.wait()
    await asyncio.sleep(time_limit(size))
    log.error("encoding %d bytes takes longer than %.1f s: giving up", size, time_limit(size))
    logging.shutdown()
    os._exit(EXIT_TOO_LATE)


def check_encode(message: Encode) -> int:
    """Size of the text in bytes; raises `InvalidRequest` for what must not be encoded."""
    if message.grammar is not None:
        message.grammar.check()
    if message.grammar is not None and message.text is None and message.messages is None:
        return len(message.grammar.text)
    if (message.text is None) == (message.messages is None):
        raise InvalidRequest("exactly one of text and messages is needed", field="text")
    if message.text is not None:
        size = len(message.text.encode()) + len((message.second or "").encode())
        if size > limits.MAX_PROMPT_BYTES:
            raise InvalidRequest(f"text: {size} bytes, the limit is {limits.MAX_PROMPT_BYTES}", field="text")
        return size
    chat: tuple[ChatMessage, ...] = message.messages or ()
    if len(chat) > limits.MAX_CHAT_MESSAGES:
        raise InvalidRequest(f"messages: {len(chat)}, the limit is {limits.MAX_CHAT_MESSAGES}", field="messages")
    size = sum(len(part.content.encode()) + len(part.role.encode()) for part in chat)
    if size > limits.MAX_PROMPT_BYTES:
        raise InvalidRequest(f"messages: {size} bytes, the limit is {limits.MAX_PROMPT_BYTES}", field="messages")
    return size


def check_render(message: Render) -> int:
    """Size of the ids in bytes; raises `InvalidRequest` if they are too many."""
    size = len(message.token_ids)
    if size > 4 * limits.MAX_PROMPT_TOKENS:
        text = f"token_ids: {size // 4}, the limit is {limits.MAX_PROMPT_TOKENS}"
        raise InvalidRequest(text, field="token_ids")
    return size


def check_stops(stops: tuple[str, ...]) -> None:
    """The limits of `SamplingParams.stop`, again: this process trusts no peer to have checked."""
    SamplingParams(stop=stops).check()


def answer(model: ServedModel, message: Encode | Render) -> Encoded | Rendered:
    """The answer to a request that passed its check. Thread-safe."""
    return render(model, message) if isinstance(message, Render) else encode(model, message)


def render(model: ServedModel, message: Render) -> Rendered:
    ids = tuple(unpack_i32(message.token_ids))
    return Rendered(message.req, model.open_stream(()).step(ids, True).text, model.piece_bytes(ids))


def encode(model: ServedModel, message: Encode) -> Encoded:
    """The answer to a request that passed `check_encode`. Thread-safe."""
    if (trouble := os.environ.get(TROUBLE_VARIABLE)) is not None and message.text is not None:
        _make_trouble(message.text, trouble)
    grammar = None if message.grammar is None else model.grammar(message.grammar)
    ids: list[int] = []
    source, second_at = "text", 0
    if message.text is not None and model.info.task != GENERATE:
        ids, second_at = model.encode_whole(message.text, message.second, truncate=message.truncate)
    elif message.text is not None:
        ids = model.encode_text(message.text, continues=message.continues)
    elif message.messages is not None:
        ids, source = model.encode_chat(message.messages, message.tools), "messages"
    if ARMED:
        reach("tokenizer.encoded")
    if len(ids) > limits.MAX_PROMPT_TOKENS:
        raise ContextTooLong(f"{source}: {len(ids)} tokens, the limit is {limits.MAX_PROMPT_TOKENS}", field=source)
    pieces = model.pieces(ids) if message.pieces else ()
    return Encoded(message.req, pack_i32(ids), pieces, second_at, grammar)


def _make_trouble(text: str, word: str) -> None:
    """For tests: what a tokenizer may do that meets the wrong text."""
    if f"{word} hang" in text:
        threading.Event().wait()
    if f"{word} bomb" in text:
        hoard: list[bytes] = []
        while True:
            hoard.append(bytes(1 << 24))


def load_models(config: Config) -> ModelTable:
    """All configured models; raises only if not one of them can be served."""
    table = ModelTable()
    for model in config.models:
        try:
            path = model_path(model)
            table.add(load_model(model.name, path, max_context=model.max_context, fake=model.backend == "fake"))
        except LlmosError as error:
            table.add_failed(model.name, error)
    table.check()
    return table


async def run(context: ServiceContext, lifeline: AsyncLifeline) -> None:
    """Serve until asked to stop."""
    models = await asyncio.to_thread(load_models, context.config)
    if ARMED:
        reach("tokenizer.start.loaded")
    listener: AsyncListener[Any] = AsyncListener(
        context.run_dir, "text", Schema(GatewayToTokenizer), ROLES, incarnation=os.getpid()
    )
    service = TextService(models, listener.send, listener.core.forget)
    listener.core.on_greet = service.greeted
    reader = asyncio.create_task(_read(listener, service))
    waits = (reader, asyncio.create_task(lifeline.stop.wait()), asyncio.create_task(service.is_broken.wait()))
    lifeline.ready(models.describe())
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if service.bug is not None:
            raise service.bug
        if reader.done():
            reader.result()  # a bug in the loop ends the process
    finally:
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        await service.close()
        listener.close()


async def _read(listener: AsyncListener[Any], service: TextService) -> None:
    while True:
        service.handle(*await listener.receive())
