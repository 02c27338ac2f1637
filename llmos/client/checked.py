"""One argument at a time, from what a caller passes to what the wire carries.

Whatever comes in, the only exception that comes out is `InvalidRequest`, which names the caller's own argument. Whether the
sequence is there and whose it is, the daemon answers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmos.codes import PageFate
from llmos.errors import InvalidRequest
from llmos.protocol import limits
from llmos.protocol.checks import check_after, check_deadline, check_nice


def checked_rid(value: Any, field: str = "rid") -> int:
    """A sequence number, or that of a sequence object."""
    rid = getattr(value, "rid", value)
    if isinstance(rid, bool) or not isinstance(rid, int) or not 0 < rid < 2**63:
        raise InvalidRequest(f"{field}: {value!r} is not a sequence number", field=field)
    return rid


def checked_after(value: Any) -> tuple[int, ...]:
    """One sequence or several."""
    if isinstance(value, (str, bytes)) or hasattr(value, "rid") or not isinstance(value, Iterable):
        value = (value,)
    after = tuple(checked_rid(each, "after") for each in value)
    check_after(after)
    return after


def checked_nice(value: Any) -> int:
    niceness = checked_int("nice", value)
    check_nice(niceness)
    return niceness


def checked_deadline_ms(deadline_s: Any) -> float | None:
    """Seconds from now as milliseconds."""
    if deadline_s is None:
        return None
    milliseconds = checked_number("deadline_s", deadline_s) * 1000
    try:
        check_deadline(milliseconds)
    except InvalidRequest:
        highest = limits.MAX_DEADLINE_MS / 1000
        raise InvalidRequest(f"deadline_s: {deadline_s} is outside (0, {highest:.0f}]", field="deadline_s") from None
    return milliseconds


def checked_timeout(value: Any) -> float | None:
    """None = no limit."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise InvalidRequest(f"timeout_s: {value!r} is not a positive number of seconds", field="timeout_s")
    return value


def checked_patience(value: Any) -> float:
    """How long a lost connection is waited for. 0 = not at all."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise InvalidRequest(f"reconnect_s: {value!r} is not a number of seconds, 0 or more", field="reconnect_s")
    return value


def checked_count(field: str, value: Any) -> int:
    """How many children or samples."""
    count = checked_int(field, value)
    if not 1 <= count <= limits.MAX_FORKS:
        raise InvalidRequest(f"{field}: {count} is outside [1, {limits.MAX_FORKS}]", field=field)
    return count


def checked_offset(value: Any) -> int:
    offset = checked_int("offset", value)
    if not 0 <= offset <= limits.MAX_TOKENS:
        raise InvalidRequest(f"offset: {offset} is outside [0, {limits.MAX_TOKENS}]", field="offset")
    return offset


def checked_fate(pages: Any) -> PageFate:
    words = {fate.name.lower(): fate for fate in PageFate}
    if not isinstance(pages, str) or pages not in words:
        raise InvalidRequest(f"pages: {pages!r} is none of {', '.join(words)}", field="pages")
    return words[pages]


def checked_name(field: str, name: Any, limit: int) -> str:
    if not isinstance(name, str):
        raise InvalidRequest(f"{field}: expected a str, got {type(name).__name__}", field=field)
    utf8_size(field, name)
    if not 0 < len(name) <= limit:
        raise InvalidRequest(f"{field}: {len(name)} characters, allowed are 1 to {limit}", field=field)
    return name


def checked_int(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{field}: expected an int, got {type(value).__name__}", field=field)
    return value


def checked_number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(f"{field}: expected a number, got {type(value).__name__}", field=field)
    return float(value)


def utf8_size(name: str, text: str, *, field: str | None = None) -> int:
    """Size in UTF-8; a lone surrogate has none."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name}: not valid Unicode (lone surrogate at character {error.start})", field=field or name
        ) from None
