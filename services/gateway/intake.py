"""From a client's message to a checked request that has asked its first question, or waits to have its prompt encoded; pure.

Whatever is wrong with the message is raised as the typed error that names the field; then nothing was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmos.protocol.limits import MADE_UP_REQUEST_ID
from llmos.protocol.messages import (
    Append,
    Attach,
    Continue,
    Detokenize,
    Embed,
    Encode,
    Encoded,
    Generate,
    ModelInfo,
    Render,
    SeqAppend,
    SeqAttach,
    SeqContinue,
    SeqSpawn,
    SeqSubmit,
    Spawn,
    Tokenize,
)
from llmos.protocol.params import Grammar, SamplingParams
from llmos.services.gateway import validate
from llmos.services.gateway.encodings import Encoding
from llmos.services.gateway.exchanges import Exchange
from llmos.services.gateway.owners import Asker
from llmos.services.gateway.requests import Outbox, Request
from llmos.services.gateway.streams import Stream


@dataclass(frozen=True, slots=True)
class Entry:
    """What a message comes in with. `number` becomes the request's; `key` is the `client_request_id` where the client gave none; no
    other request has it.
    """

    asker: Asker
    number: int
    key: str
    now: float
    models: Mapping[str, ModelInfo]
    out: Outbox


def generate(message: Generate, entry: Entry) -> Request:
    checked = validate.check_generate(message, entry.models, entry.asker.is_administrator)
    question = SeqSubmit(
        entry.number,
        checked.model.model,
        message.token_ids or b"",
        checked.params,
        entry.asker.owner,
        entry.key if message.client_request_id is None else message.client_request_id,
        message.nice,
        message.deadline_ms,
        message.parent,
        message.after,
    )
    request = Stream(
        entry.number,
        entry.asker.client,
        message.req,
        checked.model.model,
        question,
        received=entry.now,
        is_durable=_is_durable(message),
        tool_family=_tool_family(message, checked.model),
    )
    return _encode(request, message, checked.model, entry, checked.params.grammar)


def embed(message: Embed, entry: Entry) -> Request:
    info = validate.check_embed(message, entry.models, entry.asker.is_administrator)
    question = SeqSubmit(
        entry.number,
        info.model,
        b"",
        validate.complete_params(SamplingParams(), info),
        entry.asker.owner,
        entry.key if message.client_request_id is None else message.client_request_id,
        message.nice,
        message.deadline_ms,
        message.parent,
        message.after,
        second_at=0,
    )
    client, durable = entry.asker.client, _is_durable(message)
    request = Encoding(
        entry.number,
        client,
        message.req,
        info.model,
        question,
        labels=info.labels,
        received=entry.now,
        is_durable=durable,
    )
    if message.token_ids is not None:
        request.encoded(Encoded(entry.number, message.token_ids), info, entry.now, entry.out)
    else:
        text, second = message.text or "", message.second
        question_of_text = Encode(entry.number, info.model, text, None, second=second, truncate=message.truncate)
        request.encode(question_of_text, len(text) + len(second or ""))
    return request


def spawn(message: Spawn, entry: Entry) -> Request:
    info = validate.check_spawn(message, entry.models, entry.asker.is_administrator)
    question = SeqSpawn(
        entry.number,
        info.model,
        b"",
        entry.asker.owner,
        message.nice,
        message.parent,
        message.after,
        entry.key if message.client_request_id is None else message.client_request_id,
    )
    client = entry.asker.client
    request = Exchange(entry.number, client, message.req, info.model, question, is_durable=_is_durable(message))
    return _encode(request, message, info, entry)


def append(message: Append, entry: Entry) -> Request:
    info = validate.check_append(message, entry.models)
    question = SeqAppend(entry.number, message.rid, info.model, b"", entry.asker.limited_to)
    request = Exchange(entry.number, entry.asker.client, message.req, info.model, question)
    return _encode(request, message, info, entry)


def tokenize(message: Tokenize, entry: Entry) -> Request:
    info = validate.check_tokenize(message, entry.models)
    request = Exchange(entry.number, entry.asker.client, message.req, info.model)
    return _encode(request, message, info, entry)


def detokenize(message: Detokenize, entry: Entry) -> Request:
    info = validate.check_detokenize(message, entry.models)
    request = Exchange(entry.number, entry.asker.client, message.req, info.model)
    request.encode(Render(entry.number, info.model, message.token_ids), len(message.token_ids))
    return request


def go_on(message: Continue, entry: Entry) -> Request:
    checked = validate.check_continue(message, entry.models)
    question = SeqContinue(
        entry.number,
        message.rid,
        checked.model.model,
        checked.params,
        message.deadline_ms,
        entry.asker.limited_to,
    )
    client, model = entry.asker.client, checked.model.model
    request = Stream(entry.number, client, message.req, model, question, received=entry.now)
    if checked.params.grammar is None:
        request.submit(entry.now, entry.out)
    else:
        request.encode(_compile(entry.number, model, checked.params.grammar), len(checked.params.grammar.text))
    return request


def attach(message: Attach, entry: Entry) -> Request:
    validate.check_attach(message)
    question = SeqAttach(entry.number, message.rid, entry.asker.limited_to)
    request = Stream(entry.number, entry.asker.client, message.req, "", question, offset=message.offset)
    request.submit(entry.now, entry.out)
    return request


INTAKE: dict[type, Callable[[Any, Entry], Request]] = {
    Generate: generate,
    Embed: embed,
    Spawn: spawn,
    Append: append,
    Continue: go_on,
    Attach: attach,
    Tokenize: tokenize,
    Detokenize: detokenize,
}


def _is_durable(message: Generate | Spawn | Embed) -> bool:
    """Did the caller name it, to find it again? Libraries name requests to be able to repeat them, and say so."""
    key = message.client_request_id
    return key is not None and not key.startswith(MADE_UP_REQUEST_ID)


def _tool_family(message: Generate, info: ModelInfo) -> str | None:
    """How the output writes calls, if it was asked for some."""
    has_tools = message.tools and message.tool_choice != "none"
    return info.tools.family if has_tools and info.tools is not None else None


def _compile(number: int, model: str, grammar: Grammar) -> Encode:
    """The question about a grammar alone."""
    return Encode(number, model, None, None, grammar=grammar)


def _encode(
    request: Request,
    message: Generate | Spawn | Append | Tokenize,
    info: ModelInfo,
    entry: Entry,
    grammar: Grammar | None = None,
) -> Request:
    """Go on with the token ids, or wait for them, or for the grammar."""
    chat = None if isinstance(message, Append) else message.messages
    tools = message.tools if isinstance(message, Generate | Tokenize) else ()
    if isinstance(message, Generate) and message.tool_choice == "none":
        tools = ()
    given = b"" if isinstance(message, Tokenize) else message.token_ids or b""
    size = len(message.text or "") + sum(validate.size_of(part) for part in chat or ()) + len(given)
    if message.text is not None or chat is not None:
        pieces, continues = isinstance(message, Tokenize), isinstance(message, Append)
        question = Encode(entry.number, info.model, message.text, chat, pieces, continues, tools=tools, grammar=grammar)
        request.encode(question, size)
    elif grammar is not None:
        request.encode(_compile(entry.number, info.model, grammar), size + len(grammar.text))
    else:
        request.encoded(Encoded(entry.number, given), info, entry.now, entry.out)
    return request
