"""From a client's message to a checked request with its first question on the way, pure.

Whatever is wrong with the message is raised as the typed error that names the field; then nothing was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmos.protocol.messages import (
    Append,
    Attach,
    Continue,
    Encode,
    Encoded,
    Generate,
    ModelInfo,
    SeqAppend,
    SeqAttach,
    SeqContinue,
    SeqSpawn,
    SeqSubmit,
    Spawn,
    Tokenize,
)
from llmos.services.gateway import validate
from llmos.services.gateway.exchanges import Exchange
from llmos.services.gateway.owners import Asker
from llmos.services.gateway.requests import Outbox, Request
from llmos.services.gateway.streams import Stream


@dataclass(frozen=True, slots=True)
class Entry:
    """What a message comes in with. `number` becomes the request's."""

    asker: Asker
    number: int
    now: float
    models: Mapping[str, ModelInfo]
    out: Outbox


def generate(message: Generate, entry: Entry) -> Request:
    checked = validate.check_generate(message, entry.models, entry.asker.is_administrator)
    question = SeqSubmit(
        entry.number,
        checked.model.model,
        b"",
        checked.params,
        entry.asker.owner,
        message.client_request_id,
        message.nice,
        message.deadline_ms,
        message.parent,
        message.after,
    )
    request = Stream(entry.number, entry.asker.client, message.req, checked.model.model, question, received=entry.now)
    return _encode(request, message, checked.model, entry)


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
        message.client_request_id,
    )
    request = Exchange(entry.number, entry.asker.client, message.req, info.model, question)
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
    request = Stream(entry.number, entry.asker.client, message.req, checked.model.model, question)
    request.submit(entry.out)
    return request


def attach(message: Attach, entry: Entry) -> Request:
    validate.check_attach(message)
    question = SeqAttach(entry.number, message.rid, entry.asker.limited_to)
    request = Stream(entry.number, entry.asker.client, message.req, "", question, offset=message.offset)
    request.submit(entry.out)
    return request


INTAKE: dict[type, Callable[[Any, Entry], Request]] = {
    Generate: generate,
    Spawn: spawn,
    Append: append,
    Continue: go_on,
    Attach: attach,
    Tokenize: tokenize,
}


def _encode(request: Request, message: Generate | Spawn | Append | Tokenize, info: ModelInfo, entry: Entry) -> Request:
    """Ask the tokenizer, if there is text."""
    chat = None if isinstance(message, Append) else message.messages
    if message.text is None and chat is None:
        given = None if isinstance(message, Tokenize) else message.token_ids
        request.encoded(Encoded(entry.number, given or b""), info, entry.now, entry.out)
    else:
        pieces, continues = isinstance(message, Tokenize), isinstance(message, Append)
        entry.out.text.append(Encode(entry.number, info.model, message.text, chat, pieces, continues))
    return request
