"""The output of a sequence: what was asked for, and the asking for it until it is there.

A `Submission` outlives its connections. When one is lost, it asks for what is missing:

    accepted before              Attach from the first token that it lacks
    a Generate                   the same Generate; its client_request_id makes that the same sequence
    an Attach                    the same Attach
    a Continue                   Stat, then Attach or the same Continue (see `AsyncSequence.generate`)

States: asking -> sent -> over, and from sent back to asking when the connection is lost. `left` is apart from that: nobody reads any
more, and the output is still to be ended (or, if it is only attached, was let go).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from llmos.client._core import AckCounter, ConnectionLost, Drain, Sink
from llmos.client.connection import Connection
from llmos.client.generation import Generation
from llmos.client.patience import Patience
from llmos.client.requests import aged
from llmos.client.types import Chunk, Completion
from llmos.client.wire import DATA, Build, Wire, late
from llmos.errors import LlmosError, NotFound, Unavailable, WrongState
from llmos.protocol.messages import Ack, Attach, Cancel, Continue, Generate


@dataclass(frozen=True, slots=True)
class Probe:
    """Instead of a Continue that may have been done: an Attach that tells. `prompt_tokens`: what comes before the output it asks
    for; if there is none, that is `WrongState`, and the Continue was not done."""

    build: Build
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A checked request for the output of a sequence from token `start` on. Nothing is sent before it is begun or collected.

    `rid`: the sequence, if there is one already. `prepare` makes the message (it may have to ask for something first). `again`: what to
    ask when the connection was lost before it was accepted; None = the same. `on_completion` gets the end, also if nobody reads it.
    `detaches`: leaving early lets the sequence go on; else it ends the output. `owned`: the sequence ends with its client.
    """

    wire: Wire
    prepare: Callable[[], Awaitable[Build]]
    timeout_s: float | None
    again: Callable[[], Awaitable[Probe | None]] | None = None
    on_completion: Callable[[Completion], None] | None = None
    rid: int | None = None
    start: int = 0
    detaches: bool = False
    owned: bool = False

    async def collect(self) -> Completion:
        """Ask for it and read to the end."""
        items: asyncio.Queue[Any] = asyncio.Queue()
        acks = AckCounter(self.start)
        submission = Submission(self, items.put_nowait)
        try:
            async with asyncio.timeout(self.timeout_s):
                submission.begin()
                while isinstance(item := await items.get(), Chunk):
                    if (upto := acks.read(len(item.token_ids))) is not None:
                        submission.acknowledge(upto)
        except TimeoutError:
            raise late(self.timeout_s) from None
        finally:
            submission.leave()
        if isinstance(item, LlmosError):
            raise item
        assert isinstance(item, Completion), item
        return item


class Submission:
    """An output on its way to its reader. Made anywhere; all methods run on the loop. The sink gets Chunks, then one last item."""

    def __init__(self, output: Output, sink: Sink) -> None:
        self._output = output
        self._wire = output.wire
        self._sink = sink
        self._generation = Generation(
            self._take, output.start, on_lost=self._interrupted, detaches=output.detaches, owned=output.owned
        )
        self._patience = Patience(output.wire.reconnect_s)
        self._connection: Connection | None = None  # while sent
        self._task: asyncio.Task[None] | None = None  # while asking
        self._build: Build | None = None
        self._first_asked = 0.0
        self._had = output.start  # when it was last asked for
        self._probes = False
        self._left = False
        self._over = False

    @property
    def rid(self) -> int | None:
        """The sequence's number, once it is accepted."""
        return self._generation.rid

    def begin(self) -> None:
        """Ask for it."""
        self._start(self._ask())

    def acknowledge(self, upto: int) -> None:
        if self._connection is not None:  # else the rest is asked for, which says as much
            self._connection.send_if_open(Ack(self._generation.req, upto))

    def leave(self) -> None:
        """Read no further; without effect after the end."""
        if self._left or self._over:
            return
        self._left, self._sink = True, lambda _: None
        if self._connection is not None:
            self._let_go(self._connection)
        elif self._task is not None and (self._generation.times_asked == 0 or self._output.detaches):
            self._task.cancel()

    # ------------------------------------------------------------ asking

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._connection = None
        self._task = task = self._wire.run(coroutine)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if task is not self._task or self._over:
            return
        if task.cancelled():
            self._give(Unavailable("the client was closed"))
        elif (bug := task.exception()) is not None:
            self._give(bug)  # no reader waits for ever, whatever we did wrong

    async def _ask(self, pause: float = 0.0, *, may_probe: bool = True) -> None:
        """Ask for the output, or for what is missing of it."""
        try:
            await asyncio.sleep(pause)
            build = await self._question(may_probe)
            connection = await self._wire.connection(DATA)
            self._patience.asked(time.monotonic())
            self._had = self._generation.upto
            connection.submit(build, self._generation.asked)
        except ConnectionLost as error:
            self._interrupted(error)
        except LlmosError as error:
            self._give(error)
        else:
            self._connection = connection
            if self._left:
                self._let_go(connection)

    async def _question(self, may_probe: bool) -> Build:
        generation, output = self._generation, self._output
        self._probes = False
        if self._build is None:
            self._build = await output.prepare()
            self._first_asked = time.monotonic()
            message = self._build(0)
            if isinstance(message, Generate | Continue):
                generation.wants_logprobs = message.params.logprobs is not None
            return self._build
        rid = generation.rid
        if rid is not None:
            return lambda req: Attach(req, rid, generation.upto)
        probe = await output.again() if output.again is not None and may_probe else None
        if probe is not None:
            self._probes, generation.prompt_tokens = True, probe.prompt_tokens
            return probe.build
        return aged(self._build, lambda: time.monotonic() - self._first_asked)

    def _let_go(self, connection: Connection) -> None:
        """Nobody reads what was asked for. If it has to end, that is waited for, so that a lost connection can not undo it."""
        generation = self._generation
        generation.owned = False
        if not generation.detaches:
            connection.send_if_open(Cancel(generation.req))
        elif connection.core.replace(generation.req, generation, Drain(generation)):
            connection.send_if_open(Ack(generation.req, generation.upto))
            self._over = True

    # ------------------------------------------------------------ what comes back

    def _interrupted(self, error: Unavailable | None = None) -> None:
        """The connection was lost, or llmosd takes nothing new and will be started again."""
        generation = self._generation
        progressed = generation.upto > self._had
        pause = self._patience.interrupted(time.monotonic(), progressed=progressed, accepted=generation.accepted)
        if pause is None or self._wire.closed or (self._left and generation.detaches):
            text = "the connection to the gateway was lost" if error is None else error.message
            self._give(Unavailable(text, retry_after_s=None if error is None else error.retry_after_s))
        else:
            self._start(self._ask(pause))

    def _take(self, item: Any) -> None:
        """From the generation."""
        if isinstance(item, Chunk):
            self._sink(item)
        elif self._probes and _is_no_output(item):
            self._generation.rid = self._generation.prompt_tokens = None
            self._start(self._ask(may_probe=False))
        elif isinstance(item, Unavailable) and item.retry_after_s is not None:
            self._interrupted(item)  # llmosd is stopping: the next one takes it
        else:
            self._give(self._judged(item))

    def _judged(self, item: Any) -> Any:
        """What an end means that came after an interruption."""
        rid = self._generation.rid
        if not self._generation.is_resumed or rid is None:
            return item
        if isinstance(item, NotFound):
            return Unavailable(f"llmosd lost sequence {rid} while the connection was interrupted", rid=rid)
        if self._output.owned and not self._left and isinstance(item, Completion) and item.finish_reason == "cancelled":
            return Unavailable(f"sequence {rid} was cancelled while the connection was interrupted", rid=rid)
        return item

    def _give(self, item: Any) -> None:
        """The last item."""
        self._connection, self._over = None, True
        if isinstance(item, Completion) and self._output.on_completion is not None:
            self._output.on_completion(item)
        self._sink(item)


def _is_no_output(item: Any) -> bool:
    """What a probe finds if the Continue was not done: nothing, or a turn before it that was cancelled before its first token."""
    is_empty = isinstance(item, Completion) and item.finish_reason == "cancelled" and not item.token_ids
    return is_empty or isinstance(item, WrongState)
