"""The router table: every route there is, and who may use it. What is not here answers 401 to strangers and 404 to others."""

from __future__ import annotations

from dataclasses import dataclass

from llmos.services.gateway.http import (
    anthropic_messages,
    encoders,
    health,
    metrics,
    native,
    openai_chat,
    openai_completions,
    openai_models,
    openai_responses,
    openapi,
    page_door,
    page_files,
    tokens,
)
from llmos.services.gateway.http.context import Endpoint


@dataclass(frozen=True, slots=True)
class Route:
    """`is_open`: needs no key. `path` as starlette writes it: `/a/{name:int}`."""

    method: str
    path: str
    endpoint: Endpoint
    is_open: bool = False


_SEQUENCE = "/llmos/v1/sequences/{rid:int}"
ROUTES: tuple[Route, ...] = (
    Route("GET", "/", page_files.page, is_open=True),
    Route("GET", "/page/{name}", page_files.page_file, is_open=True),
    Route("GET", "/livez", health.livez, is_open=True),
    Route("GET", "/readyz", health.readyz, is_open=True),
    Route("GET", "/progressz", health.progressz),
    Route("GET", "/openapi.json", openapi.document),
    Route("GET", "/docs", openapi.page),
    Route("GET", "/metrics", metrics.metrics),
    Route("GET", "/open", page_door.open_session, is_open=True),
    Route("GET", "/v1/models", openai_models.list_models),
    Route("GET", "/v1/models/{name:path}", openai_models.get_model),
    Route("POST", "/v1/chat/completions", openai_chat.chat_completions),
    Route("POST", "/v1/completions", openai_completions.completions),
    Route("POST", "/v1/embeddings", encoders.embeddings),
    Route("POST", "/rerank", encoders.rerank),
    Route("POST", "/v1/rerank", encoders.rerank),
    Route("POST", "/score", encoders.score),
    Route("POST", "/v1/score", encoders.score),
    Route("POST", "/classify", encoders.classify),
    Route("POST", "/v1/classify", encoders.classify),
    Route("POST", "/v1/responses", openai_responses.create),
    Route("GET", "/v1/responses/{name}", openai_responses.retrieve),
    Route("POST", "/v1/responses/{name}/cancel", openai_responses.cancel),
    Route("POST", "/v1/messages", anthropic_messages.messages),
    Route("POST", "/v1/messages/count_tokens", anthropic_messages.count_tokens),
    Route("POST", "/tokenize", tokens.tokenize),
    Route("POST", "/detokenize", tokens.detokenize),
    Route("GET", "/llmos/v1/sequences", native.list_sequences),
    Route("GET", _SEQUENCE, native.stat),
    Route("GET", f"{_SEQUENCE}/explain", native.explain),
    Route("POST", f"{_SEQUENCE}/fork", native.fork),
    Route("POST", f"{_SEQUENCE}/suspend", native.suspend),
    Route("POST", f"{_SEQUENCE}/resume", native.resume),
    Route("POST", f"{_SEQUENCE}/nice", native.nice),
    Route("POST", f"{_SEQUENCE}/kill", native.kill),
    Route("GET", "/llmos/v1/status", native.status),
    Route("GET", "/llmos/v1/services", native.services),
    Route("GET", "/llmos/v1/tenants", native.tenants),
)
