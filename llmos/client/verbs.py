"""The messages of the control port, from what callers pass to what goes on the wire, pure. Whatever comes in, the only exception
that comes out is `InvalidRequest`, which names the caller's own argument.

The verbs of one sequence take a `rid` that was checked when its handle was made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmos.client.checked import (
    checked_after,
    checked_count,
    checked_deadline_ms,
    checked_fate,
    checked_int,
    checked_name,
    checked_nice,
    checked_number,
    checked_rid,
    utf8_size,
)
from llmos.errors import InvalidRequest
from llmos.protocol import limits
from llmos.protocol.checks import check_kill, check_tenant_set
from llmos.protocol.messages import After, Deadline, Fork, Kill, Message, Nice, Suspend, TenantSet

Build = Callable[[int], Message]
_COUNTS = ("max_pages", "guaranteed_pages", "max_running", "max_waiting")


def kill_request(rid: Any, tenant: Any, job: Any, model: Any) -> Build:
    """One sequence, or all that match every selector given."""
    number = None if rid is None else checked_rid(rid)
    owner = None if tenant is None else checked_name("tenant", tenant, limits.MAX_TENANT_NAME_CHARS)
    root = None if job is None else checked_rid(job, "job")
    name = None if model is None else checked_name("model", model, limits.MAX_MODEL_NAME_CHARS)
    check_kill(Kill(0, number, tenant=owner, job=root, model=name))
    return lambda req: Kill(req, number, tenant=owner, job=root, model=name)


def fork_request(rid: int, n: Any) -> Build:
    count = checked_count("n", n)
    return lambda req: Fork(req, rid, count)


def nice_request(rid: int, value: Any) -> Build:
    niceness = checked_nice(value)
    return lambda req: Nice(req, rid, niceness)


def suspend_request(rid: int, pages: Any) -> Build:
    fate = checked_fate(pages)
    return lambda req: Suspend(req, rid, fate)


def deadline_request(rid: int, seconds: Any) -> Build:
    milliseconds = checked_deadline_ms(seconds)
    return lambda req: Deadline(req, rid, milliseconds)


def after_request(rid: int, others: Any) -> Build:
    after = checked_after(others)
    return lambda req: After(req, rid, after)


def tenant_set_request(name: Any, values: dict[str, Any]) -> Build:
    """`values` by the names of `TenantSet`'s fields; None leaves a value as it is."""
    if not isinstance(name, str):
        raise InvalidRequest(f"tenant: expected a str, got {type(name).__name__}", field="tenant")
    utf8_size("tenant", name)
    for field, value in values.items():
        if value is not None:
            (checked_int if field in _COUNTS else checked_number)(field, value)
    check_tenant_set(TenantSet(0, name, **values))
    return lambda req: TenantSet(req, name, **values)
