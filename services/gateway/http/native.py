"""llmos's own verbs under /llmos/v1/: sequences as processes, services, tenants. Answers are the protocol's structs as JSON objects.

What each may ask is `rights.py`; whose sequences it reaches is the microkernel's to say: those of others answer 404.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.types import ASGIApp

from llmos.codes import FinishReason, PageFate, SeqState, ServiceState
from llmos.protocol import limits
from llmos.protocol.messages import (
    Done,
    Explain,
    Explained,
    Fork,
    Forked,
    Kill,
    Killed,
    Nice,
    PsGet,
    PsReply,
    Resume,
    ServiceStatus,
    Stat,
    Stats,
    StatusGet,
    StatusReply,
    Suspend,
    TenantsGet,
    TenantsReply,
)
from llmos.services.gateway.http.bodies import plain, read_body
from llmos.services.gateway.http.context import Call, json_response
from llmos.services.gateway.http.failures import HttpError

_WORDS = {"state": SeqState, "reason": FinishReason}


class ForkRequest(Struct, forbid_unknown_fields=True):
    """POST /llmos/v1/sequences/RID/fork: so many copies."""

    count: Annotated[int, Meta(ge=1, le=limits.MAX_FORKS)] = 1


class SuspendRequest(Struct, forbid_unknown_fields=True):
    """POST /llmos/v1/sequences/RID/suspend. `pages`: keep, swap or drop."""

    pages: str = "keep"


class NiceRequest(Struct, forbid_unknown_fields=True):
    """POST /llmos/v1/sequences/RID/nice: -20 is served first, 19 last; below 0 is for administrators."""

    nice: Annotated[int, Meta(ge=limits.MIN_NICE, le=limits.MAX_NICE)]


async def list_sequences(call: Call) -> ASGIApp:
    found = await call.session.ask(PsGet, PsReply)
    return json_response({"sequences": [shown(row) for row in found.rows]})


async def stat(call: Call) -> ASGIApp:
    rid = _rid(call)
    return json_response(shown(await call.session.ask(lambda req: Stat(req, rid), Stats)))


async def explain(call: Call) -> ASGIApp:
    rid = _rid(call)
    return json_response(shown(await call.session.ask(lambda req: Explain(req, rid), Explained)))


async def kill(call: Call) -> ASGIApp:
    rid = _rid(call)
    await _nothing_in(call)
    return json_response({"killed": (await call.session.ask(lambda req: Kill(req, rid), Killed)).rids})


async def fork(call: Call) -> ASGIApp:
    rid = _rid(call)
    asked = plain(await read_body(call.request, call.site.max_body), ForkRequest)
    return json_response({"forked": (await call.session.ask(lambda req: Fork(req, rid, asked.count), Forked)).rids})


async def suspend(call: Call) -> ASGIApp:
    rid = _rid(call)
    asked = plain(await read_body(call.request, call.site.max_body), SuspendRequest)
    if asked.pages.upper() not in PageFate.__members__:
        words = ", ".join(fate.name.lower() for fate in PageFate)
        raise HttpError(400, f"pages: {asked.pages!r:.40} is none of {words}", param="pages", code="invalid_value")
    fate = PageFate[asked.pages.upper()]
    return json_response(shown(await call.session.ask(lambda req: Suspend(req, rid, fate), Done)))


async def resume(call: Call) -> ASGIApp:
    rid = _rid(call)
    await _nothing_in(call)
    return json_response(shown(await call.session.ask(lambda req: Resume(req, rid), Done)))


async def nice(call: Call) -> ASGIApp:
    rid = _rid(call)
    asked = plain(await read_body(call.request, call.site.max_body), NiceRequest)
    return json_response(shown(await call.session.ask(lambda req: Nice(req, rid, asked.nice), Done)))


async def status(call: Call) -> ASGIApp:
    """Models with their pages and counters, and llmosd's processes."""
    return json_response(shown(await call.session.ask(StatusGet, StatusReply)))


async def services(call: Call) -> ASGIApp:
    found = await call.session.ask(StatusGet, StatusReply)
    return json_response({"services": [shown(row) for row in found.services]})


async def tenants(call: Call) -> ASGIApp:
    found = await call.session.ask(TenantsGet, TenantsReply)
    return json_response({"tenants": [shown(row) for row in found.tenants]})


def shown(part: Struct) -> dict[str, Any]:
    """A struct of the protocol as an object, its numbers of states as words."""
    found: dict[str, Any] = {}
    for name in part.__struct_fields__:
        value = getattr(part, name)
        if name == "req":
            continue
        if isinstance(value, Struct):
            value = shown(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], Struct):
            value = [shown(each) for each in value]
        elif name in _WORDS and isinstance(value, int):
            value = _word(ServiceState if isinstance(part, ServiceStatus) else _WORDS[name], value)
        found[name] = value
    return found


def _word(kind: Any, value: int) -> str | None:
    """0 stands for none."""
    return kind(value).name.lower() if value else None


def _rid(call: Call) -> int:
    return int(call.request.path_params["rid"])


async def _nothing_in(call: Call) -> None:
    """A body that nobody would read is refused."""
    body = await read_body(call.request, call.site.max_body)
    if body.strip() not in (b"", b"{}"):
        raise HttpError(400, "this takes no body", code="unknown_parameter")
