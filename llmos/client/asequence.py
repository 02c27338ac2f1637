"""`AsyncSequence`: one sequence of the daemon, as an object. A handle holds nothing but the number; the sequence lives in the daemon,
whoever is connected, and any number of handles may mean the same one.

    async with await client.spawn("Once upon a time") as seq:
        kids = await seq.fork(4)
        answers = await asyncio.gather(*(kid.generate(max_tokens=20) for kid in kids))
        await seq.append(" there was a")
        print(await seq.generate())

An open sequence (`spawn`, and the forks of one) rests between its outputs and keeps its pages; `close`, `kill` or idleness end it.
What a verb means for the other kind, and in which states it is refused (`WrongState`), the daemon decides.

When a connection is lost under a verb, it is asked again. Where that could do it twice, the sequence is looked at first: did it grow,
did it begin, has it ended? Only `fork` can not tell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Literal, TypeVar, Unpack, overload

from llmos.client._core import ConnectionLost
from llmos.client.checked import checked_rid
from llmos.client.lengths import is_possible
from llmos.client.options import OutputOptions, PageWord, SequenceLike, TokensLike
from llmos.client.output import Output, Probe
from llmos.client.requests import append_request, attach_request, continue_request
from llmos.client.stream import AsyncTokenStream
from llmos.client.types import Completion, Ending
from llmos.client.verbs import (
    after_request,
    deadline_request,
    fork_request,
    nice_request,
    suspend_request,
)
from llmos.client.wire import CONTROL, DATA, AfterLoss, Build, Wire
from llmos.codes import FinishReason
from llmos.errors import LlmosError, NotFound, ProtocolError, RequestTimeout, WrongState
from llmos.protocol.messages import (
    Appended,
    Close,
    Done,
    Explain,
    Explained,
    Forked,
    Kill,
    Killed,
    Message,
    Resume,
    Stat,
    Stats,
    Wait,
    Waited,
)

M = TypeVar("M", bound=Message)


class AsyncSequence:
    """A handle. `rid` is the sequence's number in the daemon; its model is asked for when it is needed."""

    def __init__(self, wire: Wire, rid: SequenceLike, model: str | None = None) -> None:
        self.rid = checked_rid(rid)
        self._wire = wire
        self._model = model

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.rid}>"

    @overload
    def generate(
        self, *, stream: Literal[False] = False, **options: Unpack[OutputOptions]
    ) -> Coroutine[Any, Any, Completion]: ...

    @overload
    def generate(self, *, stream: Literal[True], **options: Unpack[OutputOptions]) -> AsyncTokenStream: ...

    def generate(
        self, *, stream: bool = False, **options: Unpack[OutputOptions]
    ) -> Coroutine[Any, Any, Completion] | AsyncTokenStream:
        """Let an open sequence go on from where it is; afterwards it rests again.

        Options: the fields of `SamplingParams`, which win over `params=`; `deadline_s` and `timeout_s` as in `Client.generate`.

        Await the result, or with `stream=True` iterate over it. Leaving early ends the output, not the sequence. Bad arguments raise
        `InvalidRequest` at once.
        """
        output = self._output(options)
        return AsyncTokenStream(output, self._same) if stream else output.collect()

    def attach(self, offset: int = 0, *, timeout_s: float | None = None) -> AsyncTokenStream:
        """Read the newest output from token `offset` on, also one that has ended (for a limited time).

        A sequence has one reader: an earlier one gets `WrongState`. Leaving the stream lets the sequence go on.
        """
        return AsyncTokenStream(self._attached(offset, timeout_s), self._same)

    async def append(self, text: TokensLike) -> int:
        """More input, text or token ids, for an open sequence that is not generating; returns its new length in tokens."""
        for_model = append_request(self.rid, text)
        model, before = await self._model_and_length()
        build = for_model(model)
        change = self._wire.lengths.change(self.rid)

        async def arrived() -> Appended | None:
            length = (await self.stat()).num_tokens
            if not is_possible(before, length, build(0).token_ids):
                await unknown(f"sequence {self.rid} got the input: somebody else writes to it")()
            return Appended(0, self.rid, length) if length > before else None

        reply = await self._wire.call(DATA, build, Appended, arrived)
        self._wire.lengths.enter(self.rid, change, reply.num_tokens)
        return reply.num_tokens

    async def fork(self, n: int = 1) -> list[AsyncSequence]:
        """`n` copies that share its pages. Those of a generating sequence generate on, each with a seed of its own: `attach` reads.

        If the connection is lost on the way it raises `Unavailable`: whether it was done is not known.
        """
        lengths = self._wire.lengths
        length = lengths.get(self.rid)
        reply = await self._ask(fork_request(self.rid, n), Forked, unknown(f"sequence {self.rid} was forked"))
        for rid in reply.rids:
            if length is not None:
                lengths.enter(rid, lengths.change(rid), length)
        return [AsyncSequence(self._wire, rid, self._model) for rid in reply.rids]

    async def wait(self, *, timeout_s: float | None = None) -> Ending:
        """How it ended, when it has. Raises nothing for a failure: see `Ending.reason`."""
        limit = self._wire.limit(timeout_s)
        try:
            reply = await self._wire.wait(CONTROL, lambda req: Wait(req, self.rid), Waited, limit)
        except RequestTimeout:
            text = f"sequence {self.rid} did not end within {limit:g} s"
            raise RequestTimeout(text, field="timeout_s", rid=self.rid) from None
        try:
            return Ending(reply.rid, FinishReason(reply.reason).name.lower(), reply.usage)
        except ValueError:
            raise ProtocolError(f"unknown finish reason {reply.reason}", field="reason", rid=reply.rid) from None

    async def suspend(self, pages: PageWord = "keep") -> None:
        """Take it off the machine until `resume`; nothing is lost.

        Its pages are kept until somebody else needs them, swapped to host memory, or dropped and recomputed later.
        """
        await self._ask(suspend_request(self.rid, pages), Done)

    async def resume(self) -> None:
        """Let it go on after `suspend`."""
        await self._ask(lambda req: Resume(req, self.rid), Done)

    async def nice(self, value: int) -> None:
        """Change how urgent it is: -20 (first; below 0 is for administrators) to 19."""
        await self._ask(nice_request(self.rid, value), Done)

    async def deadline(self, seconds: float | None) -> None:
        """Change by when what it generates has to be done, from now; None: whenever."""
        await self._ask(deadline_request(self.rid, seconds), Done)

    async def after(self, *others: SequenceLike) -> None:
        """Change what it waits for, if it has not begun: all of `others` have to end well. None of them: for nothing."""
        await self._ask(after_request(self.rid, others), Done)

    async def explain(self) -> Explained:
        """Where its time went: queue, quota, prefill, decode, preempted, swapped, suspended, blocked, client."""
        return await self._ask(lambda req: Explain(req, self.rid), Explained)

    async def stat(self) -> Stats:
        """All that is known of it, of its job and of its place in it."""
        return await self._ask(lambda req: Stat(req, self.rid), Stats)

    async def kill(self) -> None:
        """End it, whatever it does."""
        await self._kill(lambda req: Kill(req, self.rid))

    async def close(self) -> None:
        """End an open sequence and give its pages back; `WrongState` if it has ended already."""
        await self._ask(
            lambda req: Close(req, self.rid), Done, self._if_ended(FinishReason.CLOSED, lambda: Done(0, self.rid))
        )

    async def __aenter__(self) -> AsyncSequence:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with forgiving(error):
            await self.close()

    def _output(self, options: OutputOptions) -> Output:
        build = continue_request(self.rid, options)
        lengths = self._wire.lengths
        change = before = 0

        async def prepare() -> Build:
            nonlocal change, before
            model, before = await self._model_and_length()
            change = lengths.change(self.rid)
            return build(model)

        async def again() -> Probe | None:
            """Did it begin? Then there is an output that follows what was there before, or will be."""
            if (await self.stat()).row.prompt_tokens != before:
                return None
            return Probe(attach_request(self.rid, 0), before)

        def ended(completion: Completion) -> None:
            lengths.enter(self.rid, change, completion.usage.prompt_tokens + completion.usage.output_tokens)

        limit = self._wire.limit(options.get("timeout_s"))
        return Output(wire=self._wire, prepare=prepare, timeout_s=limit, again=again, on_completion=ended, rid=self.rid)

    def _attached(self, offset: int, timeout_s: float | None) -> Output:
        build = attach_request(self.rid, offset)

        async def prepare() -> Build:
            return build

        limit = self._wire.limit(timeout_s)
        return Output(wire=self._wire, prepare=prepare, timeout_s=limit, rid=self.rid, start=offset, detaches=True)

    def _same(self, _: int) -> AsyncSequence:
        return self

    async def _model_and_length(self) -> tuple[str, int]:
        length = self._wire.lengths.get(self.rid)
        if self._model is None or length is None:
            stats = await self.stat()
            self._model, length = stats.row.model, stats.num_tokens
        return self._model, length

    async def _kill(self, build: Build) -> Killed:
        return await self._ask(build, Killed, self._if_ended(FinishReason.KILLED, lambda: Killed(0, (self.rid,))))

    def _if_ended(self, reason: FinishReason, reply: Callable[[], M]) -> AfterLoss[M]:
        """It was done if the sequence has ended like that."""

        async def look() -> M | None:
            return reply() if (await self.stat()).reason == reason else None

        return look

    async def _ask(self, build: Build, expected: type[M], after_loss: AfterLoss[M] | None = None) -> M:
        return await self._wire.call(CONTROL, build, expected, after_loss)


def unknown(what: str) -> Callable[[], Awaitable[None]]:
    """For what must not be done twice, and leaves no trace of its own to look for."""

    async def give_up() -> None:
        raise ConnectionLost(f"the connection to the gateway was lost: it is not known whether {what}")

    return give_up


def forgiving(error: BaseException | None) -> contextlib.suppress:
    """Around the close at the end of a block that raised `error`: that the sequence is gone already is no error, and no error of
    closing hides the block's own."""
    return contextlib.suppress(*((NotFound, WrongState) if error is None else (LlmosError,)))
