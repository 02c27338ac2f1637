"""The parts that answers of /v1/chat/completions and /v1/completions are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmos.codes import FinishReason
from llmos.protocol.messages import TokenLogprobs, Usage
from llmos.services.gateway.http.failures import HttpError
from llmos.services.gateway.http.outputs import Output
from llmos.services.gateway.http.token_texts import shown

# How a sequence ended: OpenAI's word for it. Whoever is cancelled or killed hears it as an error, not as an answer.
_WORDS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
_ENDED = {
    FinishReason.CANCELLED: "was cancelled",
    FinishReason.KILLED: "was killed",
    FinishReason.CLOSED: "was closed",
    FinishReason.IDLE: "was idle for too long",
}


def finish_word(output: Output) -> str:
    """Raises if nobody would call that an answer."""
    assert output.reason is not None
    word = _WORDS.get(output.reason)
    if word is None:
        text = (
            f"sequence {output.rid} {_ENDED.get(output.reason, output.reason.name.lower())} after {output.upto} tokens"
        )
        raise HttpError(409, text, kind="conflict_error", code=output.reason.name.lower())
    return word


def usage_body(outputs: Sequence[Output], samples: int) -> dict[str, Any]:
    """Each prompt counts once, however many samples it has."""
    ends = [output.usage for output in outputs]
    first: list[Usage] = [usage for usage in ends[::samples] if usage is not None]
    made = sum(usage.output_tokens for usage in ends if usage is not None)
    prompt = sum(usage.prompt_tokens for usage in first)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in first)},
    }


def chat_logprobs(
    ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], table: dict[int, bytes]
) -> dict[str, Any]:
    """OpenAI's form for chats. What was made while nobody read it has none."""
    content = []
    for token, one in zip(ids, logprobs):
        if one is not None:
            tops = [_entry(top, value, table) for top, value in zip(one.top_ids, one.top_logprobs)]
            content.append(_entry(token, one.logprob, table) | {"top_logprobs": tops})
    return {"content": content, "refusal": None}


def _entry(token: int, logprob: float, table: dict[int, bytes]) -> dict[str, Any]:
    raw = table.get(token, b"")
    return {"token": shown(raw), "logprob": logprob, "bytes": list(raw)}


def text_logprobs(
    ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], table: dict[int, bytes], offset: int
) -> tuple[dict[str, Any], int]:
    """OpenAI's form for texts. `offset`: characters before the first of these tokens; returned: those behind the last one."""
    tokens, values, tops, offsets = [], [], [], []
    for token, one in zip(ids, logprobs):
        text = shown(table.get(token, b""))
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if one is None else one.logprob)
        tops.append(
            None
            if one is None
            else {shown(table.get(top, b"")): value for top, value in zip(one.top_ids, one.top_logprobs)}
        )
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}, offset
