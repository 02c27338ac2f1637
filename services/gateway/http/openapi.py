"""GET /openapi.json: every route, described from the structs that judge the requests; GET /docs: the same for people.

What a struct does not have is refused, so the document can not promise more than there is.
"""

from __future__ import annotations

import functools
import html
import inspect
import re
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp

from llmos.services.gateway.http import (
    anthropic_messages,
    encoders,
    native,
    openai_chat,
    openai_completions,
    openai_responses,
    tokens,
)
from llmos.services.gateway.http.context import Call, Endpoint

BODIES: dict[Endpoint, type] = {
    openai_chat.chat_completions: openai_chat.ChatRequest,
    openai_completions.completions: openai_completions.CompletionRequest,
    openai_responses.create: openai_responses.ResponseRequest,
    anthropic_messages.messages: anthropic_messages.MessagesRequest,
    anthropic_messages.count_tokens: anthropic_messages.Conversation,
    encoders.embeddings: encoders.EmbeddingsRequest,
    encoders.rerank: encoders.RerankRequest,
    encoders.score: encoders.ScoreRequest,
    encoders.classify: encoders.ClassifyRequest,
    tokens.tokenize: tokens.TokenizeRequest,
    tokens.detokenize: tokens.DetokenizeRequest,
    native.fork: native.ForkRequest,
    native.suspend: native.SuspendRequest,
    native.nice: native.NiceRequest,
}
_ERRORS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "No key, or one that is unknown or revoked.",
    "403": "The key's role does not allow it.",
    "404": "No such model, sequence or route.",
    "409": "The sequence is not in a state in which this makes sense.",
    "413": "The body is too large.",
    "429": "No room now; `retry-after` says when there may be.",
    "503": "A service is not there; `retry-after` as above.",
}
_PARAMETER = re.compile(r"\{(\w+)(?::(\w+))?\}")
_REF = "#/components/schemas/{name}"


async def document(call: Call) -> ASGIApp:
    return Response(_document_json(), 200, None, "application/json")


async def page(call: Call) -> ASGIApp:
    """Without a script, a style of another place, or anything to load."""
    return Response(
        _page(), 200, {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}, "text/html"
    )


@functools.cache
def _document_json() -> bytes:
    return msgspec.json.encode(make_document())


def make_document() -> dict[str, Any]:
    from llmos.services.gateway.http.routes import ROUTES

    schemas, components = msgspec.json.schema_components(tuple(BODIES.values()), ref_template=_REF)
    by_endpoint = dict(zip(BODIES, schemas))
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        path = _PARAMETER.sub(r"{\1}", route.path)
        operation = _operation(route.endpoint, route.method, path, is_open=route.is_open)
        if route.endpoint in by_endpoint:
            content = {"application/json": {"schema": by_endpoint[route.endpoint]}}
            operation["requestBody"] = {"required": True, "content": content}
        if parameters := [_parameter(name, kind) for name, kind in _PARAMETER.findall(route.path)]:
            operation["parameters"] = parameters
        paths.setdefault(path, {})[route.method.lower()] = operation
    error = {"type": "object", "properties": {"error": {"type": "object"}}, "required": ["error"]}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "llmos",
            "version": "1",
            "summary": "OpenAI's and Anthropic's protocols, and llmos's own verbs.",
        },
        "paths": paths,
        "security": [{"bearer": []}, {"key": []}],
        "components": {
            "schemas": dict(components) | {"Error": error},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(endpoint: Endpoint, method: str, path: str, *, is_open: bool) -> dict[str, Any]:
    name = re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_")
    words = inspect.getdoc(endpoint) or path
    error = {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}}
    found: dict[str, Any] = {
        "operationId": name,
        "summary": words.splitlines()[0],
        "responses": {"200": {"description": "Done."}}
        | {status: {"description": text, "content": error} for status, text in _ERRORS.items()},
    }
    return found | ({"security": []} if is_open else {})


def _parameter(name: str, kind: str) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 0} if kind == "int" else {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "schema": schema}


@functools.cache
def _page() -> bytes:
    made = make_document()
    parts = []
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            body = operation.get("requestBody")
            fields = ""
            if body is not None:
                name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                fields = _fields(made["components"]["schemas"][name])
            title = html.escape(f"{method.upper()} {path}")
            parts.append(f"<section><h2>{title}</h2><p>{html.escape(operation['summary'])}</p>{fields}</section>")
    style = "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}h2{font:1.1rem monospace}td,th{text-align:left;"
    style += "padding:0 1rem 0 0;vertical-align:top;font-size:.9rem}code{font-family:monospace}"
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>llmos HTTP</title><style>{style}</style><h1>llmos over HTTP</h1>"
    return (head + "<p>The same as <a href=/openapi.json>/openapi.json</a>.</p>" + "".join(parts) + "</html>").encode()


def _fields(schema: dict[str, Any]) -> str:
    needed = set(schema.get("required", ()))
    rows = [
        f"<tr><td><code>{html.escape(name)}</code>{' *' if name in needed else ''}<td>{html.escape(_kind(field))}</tr>"
        for name, field in schema.get("properties", {}).items()
    ]
    words = html.escape(schema.get("description", ""))
    return f"<p>{words}</p><table><tr><th>field (* needed)<th>type</tr>{''.join(rows)}</table>"


def _kind(field: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "anyOf" in field:
        return " or ".join(_kind(each) for each in field["anyOf"])
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    kind = str(field.get("type", field.get("enum", "anything")))
    if kind == "array" and isinstance(field.get("items"), dict):
        return f"list of ({_kind(field['items'])})"
    limits = [f"{sign} {field[name]}" for name, sign in (("minimum", "from"), ("maximum", "to")) if name in field]
    return " ".join([kind, *limits])
