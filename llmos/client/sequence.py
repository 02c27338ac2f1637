"""`Sequence`: one sequence of the daemon, as an object that blocks. What its calls mean stands at `AsyncSequence`.

with client.spawn("Once upon a time") as seq:
    kids = seq.fork(4)
    print(kids[0].generate(max_tokens=20))
    seq.append(" there was a")
    print(seq.generate())
"""

from __future__ import annotations

from collections.abc import Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, overload

from llmos.client.asequence import AsyncSequence, forgiving
from llmos.client.blocking import blocking
from llmos.client.options import OutputOptions
from llmos.client.stream import TokenStream
from llmos.client.types import Completion

if TYPE_CHECKING:
    from llmos.client.sync import Client

T = TypeVar("T")


class Sequence:
    """A handle. `rid` is the sequence's number in the daemon. Thread-safe, as its client is."""

    def __init__(self, client: Client, inner: AsyncSequence) -> None:
        self.rid = inner.rid
        self._client = client
        self._inner = inner

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.rid}>"

    @overload
    def generate(self, *, stream: Literal[False] = False, **options: Unpack[OutputOptions]) -> Completion: ...

    @overload
    def generate(self, *, stream: Literal[True], **options: Unpack[OutputOptions]) -> TokenStream: ...

    def generate(self, *, stream: bool = False, **options: Unpack[OutputOptions]) -> Completion | TokenStream:
        """Let an open sequence go on from where it is; afterwards it rests again.

        Options: the fields of `SamplingParams`, which win over `params=`; `deadline_s` and `timeout_s` as in `Client.generate`.

        With `stream=True` the result is an iterator over chunks. Leaving early ends the output, not the sequence.
        """
        output = self._inner._output(options)
        return self._client._stream(output, self._same) if stream else self._run(output.collect())

    def attach(self, offset: int = 0, *, timeout_s: float | None = None) -> TokenStream:
        """Read the newest output from token `offset` on, also one that has ended (for a limited time).

        A sequence has one reader: an earlier one gets `WrongState`. Leaving the stream lets the sequence go on.
        """
        return self._client._stream(self._inner._attached(offset, timeout_s), self._same)

    def fork(self, n: int = 1) -> list[Sequence]:
        """`n` copies that share its pages. Those of a generating sequence generate on, each with a seed of its own: `attach` reads."""
        return [Sequence(self._client, kid) for kid in self._run(self._inner.fork(n))]

    append = blocking(AsyncSequence.append)
    wait = blocking(AsyncSequence.wait)
    suspend = blocking(AsyncSequence.suspend)
    resume = blocking(AsyncSequence.resume)
    nice = blocking(AsyncSequence.nice)
    deadline = blocking(AsyncSequence.deadline)
    after = blocking(AsyncSequence.after)
    explain = blocking(AsyncSequence.explain)
    stat = blocking(AsyncSequence.stat)
    kill = blocking(AsyncSequence.kill)
    close = blocking(AsyncSequence.close)

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with forgiving(error):
            self.close()

    def _same(self, _: int) -> Sequence:
        return self

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._client._run(coroutine)
