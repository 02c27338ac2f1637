"""The blocking form of an async method, types and docstring included: `ps = blocking(AsyncClient.ps)` in a class body.

So the two shells of the SDK say everything once: what a call takes, means and returns stands at the async method. Only calls
whose result differs (a stream, a sequence) are written by hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, overload

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Shell(Protocol[A]):
    """An object that blocks, around one that awaits."""

    _inner: A

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run on the event loop's thread and wait for the result."""
        ...


class Method(Protocol[P, T_co]):
    """A function in a class body, as a type checker sees it: bound when it is taken from an instance."""

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[Concatenate[Any, P], T_co]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> Callable[P, T_co]: ...


def blocking(method: Callable[Concatenate[A, P], Coroutine[Any, Any, T]]) -> Method[P, T]:
    """A method of a `Shell[A]` that takes the same arguments, waits, and returns the result."""

    @functools.wraps(method)
    def call(self: Shell[A], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(method(self._inner, *args, **kwargs))

    return cast("Method[P, T]", call)
