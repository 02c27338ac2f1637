"""The verbs on running sequences and tenants, from what callers pass to what goes on the wire, pure.

Whatever comes in, the only exception that comes out is `InvalidRequest`, which names the caller's own argument. Whether the
sequence is there and whose it is, the daemon answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmos.errors import InvalidRequest
from llmos.protocol import limits
from llmos.protocol.checks import check_deadline, check_nice, check_tenant_set
from llmos.protocol.messages import Explain, Kill, Message, Nice, Resume, Suspend, TenantSet

Build = Callable[[int], Message]
_COUNTS = ("max_pages", "guaranteed_pages", "max_running", "max_waiting")


def kill_request(rid: Any) -> Build:
    checked = _rid(rid)
    return lambda req: Kill(req, checked)


def nice_request(rid: Any, value: Any) -> Build:
    checked, niceness = _rid(rid), checked_nice(value)
    return lambda req: Nice(req, checked, niceness)


def suspend_request(rid: Any, keep_pages: Any) -> Build:
    checked = _rid(rid)
    if not isinstance(keep_pages, bool):
        raise InvalidRequest(f"keep_pages: expected a bool, got {type(keep_pages).__name__}", field="keep_pages")
    return lambda req: Suspend(req, checked, keep_pages)


def resume_request(rid: Any) -> Build:
    checked = _rid(rid)
    return lambda req: Resume(req, checked)


def explain_request(rid: Any) -> Build:
    checked = _rid(rid)
    return lambda req: Explain(req, checked)


def tenant_set_request(name: Any, values: dict[str, Any]) -> Build:
    """`values` by the names of `TenantSet`'s fields; None leaves a value as it is."""
    if not isinstance(name, str):
        raise InvalidRequest(f"tenant: expected a str, got {type(name).__name__}", field="tenant")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("tenant: not valid Unicode", field="tenant") from None
    for field, value in values.items():
        if value is not None:
            (_check_int if field in _COUNTS else _check_number)(field, value)
    check_tenant_set(TenantSet(0, name, **values))
    return lambda req: TenantSet(req, name, **values)


def checked_nice(value: Any) -> int:
    _check_int("nice", value)
    check_nice(value)
    return int(value)


def checked_deadline_ms(deadline_s: Any) -> float | None:
    """Seconds from now as milliseconds."""
    if deadline_s is None:
        return None
    _check_number("deadline_s", deadline_s)
    milliseconds = float(deadline_s) * 1000
    try:
        check_deadline(milliseconds)
    except InvalidRequest:
        highest = limits.MAX_DEADLINE_MS / 1000
        raise InvalidRequest(f"deadline_s: {deadline_s} is outside (0, {highest:.0f}]", field="deadline_s") from None
    return milliseconds


def _rid(rid: Any) -> int:
    if isinstance(rid, bool) or not isinstance(rid, int) or not 0 < rid < 2**63:
        raise InvalidRequest(f"rid: {rid!r} is not a sequence number", field="rid")
    return rid


def _check_int(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{field}: expected an int, got {type(value).__name__}", field=field)


def _check_number(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(f"{field}: expected a number, got {type(value).__name__}", field=field)
