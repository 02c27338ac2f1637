"""A response as an object and as events. Numbers of events: openai_responses.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec

from llmos.codes import FinishReason
from llmos.protocol.messages import Finished
from llmos.services.gateway.http.failures import openai_body
from llmos.services.gateway.http.openai_answer import stream_error
from llmos.services.gateway.http.outputs import Output, Outputs, collect

FIRST_DELTA = 4  # its number, if it has one token
_STATES = {FinishReason.STOP: "completed", FinishReason.LENGTH: "incomplete"}


@dataclass(slots=True)
class Response:
    """`asked`: what is known of the request. `text`: all of it, once it has ended."""

    output: Output
    created: int
    asked: dict[str, Any]
    text: str = ""

    @property
    def id(self) -> str:
        return f"resp_{self.created}_{self.output.rid}"

    def body(self, state: str | None = None) -> dict[str, Any]:
        """`state` None: it has ended."""
        output = self.output
        if state is None:
            assert output.reason is not None
            state = _STATES.get(output.reason, "cancelled")
        is_cut = state == "incomplete"
        has_ended = output.reason is not None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": state,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": output.model,
            "output": [self.message("incomplete" if state != "completed" else state)] if has_ended else [],
            "usage": self._usage(),
            "metadata": {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            **self.asked,
        }

    def message(self, state: str) -> dict[str, Any]:
        content = [] if state == "in_progress" else [self.part(self.text)]
        return {"id": self.item_id, "type": "message", "status": state, "role": "assistant", "content": content}

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    @property
    def item_id(self) -> str:
        return f"msg_{self.output.rid}"

    def _usage(self) -> dict[str, Any] | None:
        usage = self.output.usage
        if usage is None:
            return None
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.output_tokens,
        }


async def events(response: Response, outputs: Outputs, after: int, whole: Outputs | None) -> AsyncIterator[bytes]:
    """Those with numbers above `after`. `whole`: reads the text again from its beginning, when this one began later."""
    output = response.output
    place = {"item_id": response.item_id, "output_index": 0, "content_index": 0}
    running = response.body("in_progress")
    opening: tuple[tuple[str, dict[str, Any]], ...] = (
        ("response.created", {"response": running}),
        ("response.in_progress", {"response": running}),
        ("response.output_item.added", {"output_index": 0, "item": response.message("in_progress")}),
        ("response.content_part.added", {**place, "part": response.part("")}),
    )
    if begun := b"".join(_event(kind, at, after, **fields) for at, (kind, fields) in enumerate(opening)):
        yield begun
    texts: list[str] = []
    while pieces := await outputs.take():
        parts = []
        for piece in pieces:
            message = piece.message
            texts.append(message.text)
            upto = _total(output) + 1 if isinstance(message, Finished) else message.offset + len(message.ids)
            if message.text:
                delta = {"delta": message.text, "logprobs": []}
                parts.append(_event("response.output_text.delta", FIRST_DELTA - 1 + upto, after, **place, **delta))
        if told := b"".join(parts):
            yield told
    response.text = await _text(texts, whole)
    body = response.body()
    ending: tuple[tuple[str, dict[str, Any]], ...] = (
        ("response.output_text.done", {**place, "text": response.text, "logprobs": []}),
        ("response.content_part.done", {**place, "part": response.part(response.text)}),
        ("response.output_item.done", {"output_index": 0, "item": body["output"][0]}),
        (f"response.{body['status']}", {"response": body}),
    )
    first = FIRST_DELTA + _total(output) + 1
    yield b"".join(_event(kind, first + at, after, **fields) for at, (kind, fields) in enumerate(ending))


def _total(output: Output) -> int:
    """A reader may have asked for what comes after its last token."""
    assert output.usage is not None
    return output.usage.output_tokens


async def _text(texts: list[str], whole: Outputs | None) -> str:
    if whole is None:
        return "".join(texts)
    try:
        await whole.begin()
        (found,) = await collect(whole)
    finally:
        whole.leave()
    return "".join(found.text)


def _event(kind: str, number: int, after: int, **fields: Any) -> bytes:
    if number <= after:
        return b""
    body = {"type": kind, "sequence_number": number, **fields}
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(body))


def error_event(error: Exception) -> bytes:
    found = openai_body(stream_error(error))["error"]
    return b"event: error\ndata: %b\n\n" % msgspec.json.encode({"type": "error", "sequence_number": 0, **found})
