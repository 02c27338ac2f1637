"""From what callers pass as a prompt to what goes on the wire, pure. Whatever comes in, the only exception that comes out is
`InvalidRequest`.

The gateway checks everything again; here the caller's own names are at hand for the message.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from llmos.client.chat import parse_message
from llmos.client.checked import utf8_size
from llmos.errors import InvalidRequest
from llmos.protocol import limits
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import ChatMessage

Parsed = tuple[str | None, bytes | None, tuple[ChatMessage, ...] | None]


def parse_prompt(prompt: Any, field: str = "prompt") -> Parsed:
    """One of (text, token ids, chat messages) is set: a str is text, a list of ints is tokens, a list of dicts is a
    chat. `field`: what the caller calls it.
    """
    if isinstance(prompt, str):
        _check_size(field, utf8_size(field, prompt))
        return prompt, None, None
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise InvalidRequest(f"{field}: bytes are not text; decode them first", field=field)
    if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
        raise InvalidRequest(
            f"{field}: expected a str, token ids or chat messages, got {type(prompt).__name__}", field=field
        )
    items = list(prompt)
    if not items:
        raise InvalidRequest(f"{field} is empty", field=field)
    if isinstance(items[0], (Mapping, ChatMessage)):
        return None, None, _parse_chat(field, items)
    return None, _parse_ids(field, items), None


def parse_tokens(tokens: Any, field: str) -> tuple[str | None, bytes | None]:
    """(text, token ids), one of them set: what can go on where other tokens are already."""
    text, token_ids, messages = parse_prompt(tokens, field)
    if messages is not None:
        raise InvalidRequest(f"{field}: a chat can not be appended; give text or token ids", field=field)
    return text, token_ids


def _parse_ids(field: str, items: list[Any]) -> bytes:
    if len(items) > limits.MAX_PROMPT_TOKENS:
        raise InvalidRequest(f"{field}: {len(items)} token ids, the limit is {limits.MAX_PROMPT_TOKENS}", field=field)
    ids: list[int] = []
    for place, item in enumerate(items):
        try:
            token = operator.index(item)
        except TypeError:
            raise InvalidRequest(
                f"{field}[{place}]: expected a token id, got {type(item).__name__}", field=field
            ) from None
        if not 0 <= token < 2**31:
            raise InvalidRequest(f"{field}[{place}]: {token} is not a token id", field=field)
        ids.append(token)
    return pack_i32(ids)


def _parse_chat(field: str, items: list[Any]) -> tuple[ChatMessage, ...]:
    if len(items) > limits.MAX_CHAT_MESSAGES:
        raise InvalidRequest(f"{field}: {len(items)} messages, the limit is {limits.MAX_CHAT_MESSAGES}", field=field)
    size = 0
    messages: list[ChatMessage] = []
    for place, item in enumerate(items):
        where = f"{field}[{place}]"
        message, length = parse_message(where, item, field)
        messages.append(message)
        size += length
    _check_size(field, size)
    return tuple(messages)


def _check_size(field: str, size: int) -> None:
    if size == 0:
        raise InvalidRequest(f"{field} is empty", field=field)
    if size > limits.MAX_PROMPT_BYTES:
        raise InvalidRequest(f"{field}: {size} bytes, the limit is {limits.MAX_PROMPT_BYTES}", field=field)
