"""Checks on a submitted sequence before it exists. Gateways checked it already; the microkernel trusts nobody with its pages."""

from __future__ import annotations

from array import array

from llmos.errors import ContextTooLong, InvalidRequest, Overloaded
from llmos.protocol import limits
from llmos.protocol.messages import ExecutorReady
from llmos.protocol.params import SamplingParams


def check_prompt(tokens: array[int], vocab_size: int) -> None:
    """Raise `InvalidRequest` unless the prompt is 1.. token ids of the vocabulary."""
    if not tokens:
        raise InvalidRequest("prompt is empty", field="prompt")
    if len(tokens) > limits.MAX_PROMPT_TOKENS:
        raise InvalidRequest(f"prompt of {len(tokens)} tokens, the limit is {limits.MAX_PROMPT_TOKENS}", field="prompt")
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise InvalidRequest(f"prompt has token ids outside [0, {vocab_size})", field="prompt")


def check_params(params: SamplingParams) -> None:
    """Raise `InvalidRequest` if a field is out of range or was left for the gateway to fill in."""
    params.check()
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        if getattr(params, name) is None:
            raise InvalidRequest(f"{name} must be set on the kernel port", field=name)


def longest_output(prompt_len: int, params: SamplingParams, executor: ExecutorReady) -> int:
    """Most output tokens the sequence may get: what it asked for, bounded by the context and by what the whole pool can hold.

    Raises `ContextTooLong` if not even one fits.
    """
    # The newest token's KV is never written, so the last page need not hold it.
    capacity = min(executor.max_context, executor.num_pages * executor.page_size)
    room = capacity - prompt_len
    if room < 1:
        raise ContextTooLong(
            f"prompt of {prompt_len} tokens leaves no room: the limit is {capacity} tokens", field="prompt"
        )
    return room if params.max_tokens is None else min(params.max_tokens, room)


def check_queue(waiting: int, limit: int) -> None:
    if waiting >= limit:
        raise Overloaded(f"{waiting} sequences are waiting, the limit is {limit}")
