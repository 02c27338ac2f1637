"""The router table: every route there is, and who may use it. What is not here answers 401 to strangers and 404 to others."""

from __future__ import annotations

from dataclasses import dataclass

from llmos.services.gateway.http import (
    openai_chat,
    openai_completions,
    openai_models,
)
from llmos.services.gateway.http.context import Endpoint


@dataclass(frozen=True, slots=True)
class Route:
    """`is_open`: needs no key. `path` as starlette writes it: `/a/{name:int}`."""

    method: str
    path: str
    endpoint: Endpoint
    is_open: bool = False


ROUTES: tuple[Route, ...] = (
    Route("GET", "/v1/models", openai_models.list_models),
    Route("GET", "/v1/models/{name:path}", openai_models.get_model),
    Route("POST", "/v1/chat/completions", openai_chat.chat_completions),
    Route("POST", "/v1/completions", openai_completions.completions),
)
