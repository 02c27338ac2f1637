"""POST /tokenize and /detokenize: text to token ids and back, by the served model's tokenizer."""

from __future__ import annotations

from array import array

from msgspec import Struct
from starlette.types import ASGIApp

from llmos.protocol.codec import pack_i32, unpack_i32
from llmos.protocol.messages import Detokenize, Detokenized, Tokenize, Tokenized
from llmos.services.gateway.http.bodies import plain, read_body
from llmos.services.gateway.http.chat_input import Message, ToolField, chat_messages, tools_of
from llmos.services.gateway.http.context import Call, json_response
from llmos.services.gateway.http.failures import HttpError


class TokenizeRequest(Struct, forbid_unknown_fields=True):
    """POST /tokenize: exactly one of `text`, `prompt` (the same) and `messages`. `return_token_strs`: also each token as text."""

    model: str | None = None
    text: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[ToolField] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Struct, forbid_unknown_fields=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


async def tokenize(call: Call) -> ASGIApp:
    asked = plain(await read_body(call.request, call.site.max_body), TokenizeRequest)
    text = asked.prompt if asked.text is None else asked.text
    if sum(part is not None for part in (asked.text, asked.prompt, asked.messages)) != 1:
        raise HttpError(400, "exactly one of text, prompt and messages is needed", param="text", code="invalid_value")
    chat = None if asked.messages is None else chat_messages(asked.messages)
    tools = tools_of(asked.tools, None, None).tools
    found = await call.session.ask(lambda req: Tokenize(req, asked.model, text, chat, tools), Tokenized)
    ids = list(unpack_i32(found.token_ids))
    body = {
        "model": found.model,
        "tokens": ids,
        "count": len(ids),
        "max_model_len": call.site.core.router.models[found.model].max_context,
    }
    return json_response(body | ({"token_strs": found.pieces} if asked.return_token_strs else {}))


async def detokenize(call: Call) -> ASGIApp:
    asked = plain(await read_body(call.request, call.site.max_body), DetokenizeRequest)
    try:
        ids = pack_i32(array("i", asked.tokens))
    except OverflowError:
        text = "tokens: a token id is outside of every vocabulary"
        raise HttpError(400, text, param="tokens", code="invalid_value") from None
    found = await call.session.ask(lambda req: Detokenize(req, asked.model, ids), Detokenized)
    return json_response({"model": found.model, "text": found.text, "prompt": found.text})
