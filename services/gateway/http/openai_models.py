"""GET /v1/models, GET /v1/models/NAME: what is served now."""

from __future__ import annotations

from typing import Any

from starlette.types import ASGIApp

from llmos.protocol.messages import ModelInfo, ModelsGet, ModelsReply
from llmos.services.gateway.http.context import Call, json_response
from llmos.services.gateway.validate import find_model


async def list_models(call: Call) -> ASGIApp:
    await call.session.ask(ModelsGet, ModelsReply)  # judges the right to ask, and whether the microkernel is there
    models = call.site.core.router.models
    return json_response({"object": "list", "data": [_shown(call, info) for info in models.values()]})


async def get_model(call: Call) -> ASGIApp:
    await call.session.ask(ModelsGet, ModelsReply)
    return json_response(_shown(call, find_model(call.request.path_params["name"], call.site.core.router.models)))


def _shown(call: Call, info: ModelInfo) -> dict[str, Any]:
    """The last three fields are llmos's own; vLLM's clients look for the first of them."""
    return {
        "id": info.model,
        "object": "model",
        "created": call.site.started,
        "owned_by": "llmos",
        "max_model_len": info.max_context,
        "vocab_size": info.vocab_size,
        "has_chat_template": info.has_chat_template,
    }
