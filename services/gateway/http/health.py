"""GET /livez, /readyz, /progressz: does the process answer, can it serve, does work get done?

`/livez` and `/readyz` need no key and say no more than yes or no. Progress is tokens committed while something runs: a machine that has
work and commits nothing for `STALL_S` answers 503, whatever else its processes say of themselves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp

from llmos.protocol.messages import LaneStatus, StatusGet, StatusReply
from llmos.services.gateway.http.context import Call, json_response

STALL_S = 60.0


@dataclass(slots=True)
class _Seen:
    """When a model's figures last were other ones, or nothing ran."""

    figures: tuple[int, int]
    since: float


class Progress:
    """What was seen of each model, over the requests for it."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def look(self, lane: LaneStatus, now: float) -> float:
        """Seconds since it got on, as far as this process knows; 0 if nothing runs."""
        figures = (lane.steps, lane.tokens_committed)
        seen = self._seen.get(lane.model)
        if seen is None or seen.figures != figures or not lane.running:
            self._seen[lane.model] = seen = _Seen(figures, now)
        return now - seen.since


_progress = Progress()


async def livez(call: Call) -> ASGIApp:
    return json_response({"status": "ok"})


async def readyz(call: Call) -> ASGIApp:
    """The services are there, and an executor of at least one model."""
    is_ready = call.site.core.is_connected
    if is_ready:
        status = await call.session.ask(StatusGet, StatusReply)
        is_ready = any(lane.ready for lane in status.lanes)
    return json_response({"status": "ok" if is_ready else "not ready"}, status=200 if is_ready else 503)


async def progressz(call: Call) -> ASGIApp:
    status = await call.session.ask(StatusGet, StatusReply)
    now = time.monotonic()
    models: list[dict[str, Any]] = []
    for lane in status.lanes:
        models.append(
            {
                "model": lane.model,
                "ready": lane.ready,
                "running": lane.running,
                "waiting": lane.waiting,
                "steps": lane.steps,
                "tokens_committed": lane.tokens_committed,
                "seconds_without_progress": round(_progress.look(lane, now), 3),
            }
        )
    is_stalled = any(model["seconds_without_progress"] > STALL_S for model in models)
    body = {"status": "stalled" if is_stalled else "ok", "models": models}
    return json_response(body, status=503 if is_stalled else 200)
