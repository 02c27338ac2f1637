"""From what callers pass to what goes on the wire, pure. Whatever comes in, the only exception that comes out is
`InvalidRequest`.

The gateway checks everything again; here the caller's own names (`prompt`, `top_p`) are at hand for the message.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from llmos.client.verbs import checked_deadline_ms, checked_nice
from llmos.errors import InvalidRequest
from llmos.protocol import limits
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import ChatMessage, Generate, Tokenize
from llmos.protocol.params import SamplingParams

ChatLike = ChatMessage | Mapping[str, str]
PromptLike = str | Sequence[int] | Sequence[ChatLike]
_FIELDS = SamplingParams.__struct_fields__


class GenerateRequest(Protocol):
    """A checked request that only lacks its number."""

    def __call__(self, req: int) -> Generate: ...


def generate_request(
    prompt: PromptLike,
    model: str | None,
    params: SamplingParams | None,
    client_request_id: str | None,
    sampling: Mapping[str, Any],
    nice: int = 0,
    deadline_s: float | None = None,
) -> GenerateRequest:
    """Check everything and return the message's maker."""
    text, token_ids, messages = parse_prompt(prompt)
    checked = merge_params(params, sampling)
    _check_name("model", model, limits.MAX_MODEL_NAME_CHARS)
    _check_name("client_request_id", client_request_id, limits.MAX_REQUEST_ID_CHARS)
    niceness, deadline_ms = checked_nice(nice), checked_deadline_ms(deadline_s)
    return lambda req: Generate(
        req, model, text, token_ids, messages, checked, client_request_id, niceness, deadline_ms
    )


class TokenizeRequest(Protocol):
    def __call__(self, req: int) -> Tokenize: ...


def tokenize_request(prompt: str | Sequence[ChatLike], model: str | None) -> TokenizeRequest:
    text, token_ids, messages = parse_prompt(prompt)
    if token_ids is not None:
        raise InvalidRequest("prompt: these are token ids already", field="prompt")
    _check_name("model", model, limits.MAX_MODEL_NAME_CHARS)
    return lambda req: Tokenize(req, model, text, messages)


def parse_prompt(prompt: Any) -> tuple[str | None, bytes | None, tuple[ChatMessage, ...] | None]:
    """One of (text, token ids, chat messages) is set: a str is text, a list of ints is tokens, a list of dicts is a
    chat.
    """
    if isinstance(prompt, str):
        _check_size(_utf8("prompt", prompt))
        return prompt, None, None
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise InvalidRequest("prompt: bytes are not text; decode them first", field="prompt")
    if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
        raise InvalidRequest(
            f"prompt: expected a str, token ids or chat messages, got {type(prompt).__name__}", field="prompt"
        )
    items = list(prompt)
    if not items:
        raise InvalidRequest("prompt is empty", field="prompt")
    if isinstance(items[0], (Mapping, ChatMessage)):
        return None, None, _parse_chat(items)
    return None, _parse_ids(items), None


def _parse_ids(items: list[Any]) -> bytes:
    if len(items) > limits.MAX_PROMPT_TOKENS:
        raise InvalidRequest(f"prompt: {len(items)} token ids, the limit is {limits.MAX_PROMPT_TOKENS}", field="prompt")
    ids: list[int] = []
    for place, item in enumerate(items):
        try:
            token = operator.index(item)
        except TypeError:
            raise InvalidRequest(
                f"prompt[{place}]: expected a token id, got {type(item).__name__}", field="prompt"
            ) from None
        if not 0 <= token < 2**31:
            raise InvalidRequest(f"prompt[{place}]: {token} is not a token id", field="prompt")
        ids.append(token)
    return pack_i32(ids)


def _parse_chat(items: list[Any]) -> tuple[ChatMessage, ...]:
    if len(items) > limits.MAX_CHAT_MESSAGES:
        raise InvalidRequest(f"prompt: {len(items)} messages, the limit is {limits.MAX_CHAT_MESSAGES}", field="prompt")
    size = 0
    messages: list[ChatMessage] = []
    for place, item in enumerate(items):
        where = f"prompt[{place}]"
        if isinstance(item, ChatMessage):
            item = {"role": item.role, "content": item.content}
        if not isinstance(item, Mapping):
            raise InvalidRequest(f"{where}: expected a chat message, got {type(item).__name__}", field="prompt")
        if unknown := set(item) - {"role", "content"}:
            raise InvalidRequest(f"{where}: unknown key {sorted(map(str, unknown))[0]!r}", field="prompt")
        parts = {key: item.get(key) for key in ("role", "content")}
        for key, value in parts.items():
            if not isinstance(value, str):
                raise InvalidRequest(f"{where}.{key}: expected a str, got {type(value).__name__}", field="prompt")
            size += _utf8(f"{where}.{key}", value, field="prompt")
        messages.append(ChatMessage(str(parts["role"]), str(parts["content"])))
    _check_size(size)
    return tuple(messages)


def merge_params(params: SamplingParams | None, sampling: Mapping[str, Any]) -> SamplingParams:
    """`params` with keyword arguments on top, checked. `stop` may be one string, `logit_bias` a dict."""
    if params is not None and not isinstance(params, SamplingParams):
        raise InvalidRequest(f"params: expected SamplingParams, got {type(params).__name__}", field="params")
    for name in sampling:
        if name not in _FIELDS:
            nearest = difflib.get_close_matches(name, _FIELDS, n=1, cutoff=0.0)[0]
            raise InvalidRequest(f"unknown sampling parameter {name!r}; did you mean {nearest!r}?", field=name)
    values: dict[str, Any] = {name: getattr(params or SamplingParams(), name) for name in _FIELDS} | dict(sampling)
    if isinstance(values["stop"], str):
        values["stop"] = (values["stop"],)
    if isinstance(values["logit_bias"], Mapping):
        values["logit_bias"] = tuple(values["logit_bias"].items())
    try:
        merged = msgspec.convert([values[name] for name in _FIELDS], SamplingParams)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    merged.check()
    for text in merged.stop:
        _utf8("stop", text)
    return merged


def _wrong_type(text: str) -> InvalidRequest:
    """msgspec says "Expected `float`, got `str` - at `$[2]`"; say which parameter that is."""
    what, _, path = text.rpartition(" - at ")
    place = path.strip("`").removeprefix("$[").partition("]")[0]
    field = _FIELDS[int(place)] if place.isdigit() and int(place) < len(_FIELDS) else None
    return InvalidRequest(f"{field or 'params'}: {what or text}", field=field or "params")


def _utf8(name: str, text: str, *, field: str | None = None) -> int:
    """Size in UTF-8; a lone surrogate has none."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name}: not valid Unicode (lone surrogate at character {error.start})", field=field or name
        ) from None


def _check_size(size: int) -> None:
    if size == 0:
        raise InvalidRequest("prompt is empty", field="prompt")
    if size > limits.MAX_PROMPT_BYTES:
        raise InvalidRequest(f"prompt: {size} bytes, the limit is {limits.MAX_PROMPT_BYTES}", field="prompt")


def _check_name(field: str, name: str | None, limit: int) -> None:
    if name is None:
        return
    if not isinstance(name, str):
        raise InvalidRequest(f"{field}: expected a str, got {type(name).__name__}", field=field)
    _utf8(field, name)
    if not 0 < len(name) <= limit:
        raise InvalidRequest(f"{field}: {len(name)} characters, allowed are 1 to {limit}", field=field)
