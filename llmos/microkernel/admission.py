"""Checks on a submitted sequence before it exists. Gateways checked it already; the microkernel trusts nobody with its pages."""

from __future__ import annotations

from array import array

from llmos.errors import ContextTooLong, InvalidRequest, Overloaded
from llmos.microkernel.scheduler import Scheduler
from llmos.microkernel.tenants import Tenant
from llmos.protocol import checks, limits
from llmos.protocol.messages import ExecutorReady
from llmos.protocol.params import SamplingParams
from llmos.protocol.prompt_logprobs import record_bytes


def check_prompt(tokens: array[int], vocab_size: int, field: str = "prompt") -> None:
    """Raise `InvalidRequest` unless these are 1.. token ids of the vocabulary."""
    if not tokens:
        raise InvalidRequest(f"{field}: empty", field=field)
    if len(tokens) > limits.MAX_PROMPT_TOKENS:
        raise InvalidRequest(f"{field}: {len(tokens)} tokens, the limit is {limits.MAX_PROMPT_TOKENS}", field=field)
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise InvalidRequest(f"{field}: token ids outside [0, {vocab_size})", field=field)


def check_names(owner: str, client_request_id: str | None) -> None:
    """What a sequence is remembered by."""
    checks.check_tenant(owner)
    if client_request_id is not None and len(client_request_id) > limits.MAX_REQUEST_ID_CHARS:
        text = f"client_request_id: {len(client_request_id)} characters, the limit is {limits.MAX_REQUEST_ID_CHARS}"
        raise InvalidRequest(text, field="client_request_id")


def check_params(params: SamplingParams) -> None:
    """Raise `InvalidRequest` if a field is out of range or was left for the gateway to fill in."""
    params.check()
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        if getattr(params, name) is None:
            raise InvalidRequest(f"{name} must be set on the kernel port", field=name)


def check_kind(model: str, executor: ExecutorReady, second_at: int, num_tokens: int) -> None:
    """Raise `InvalidRequest` if an encoder is to generate, or something else to encode."""
    if executor.output_size and second_at < 0:
        raise InvalidRequest(f"model {model!r} is an encoder: it makes vectors, not text", field="model")
    if not executor.output_size and second_at >= 0:
        raise InvalidRequest(f"model {model!r} is no encoder: it generates text", field="model")
    if not -1 <= second_at < max(1, num_tokens):
        raise InvalidRequest(f"second_at: {second_at} is outside [-1, {num_tokens})", field="second_at")


def room_for_output(
    prompt_len: int, params: SamplingParams, second_at: int, executor: ExecutorReady, num_pages: int
) -> int:
    """Most output tokens of a new sequence; 0 for a text that is encoded, and for a prompt that is only scored."""
    if params.prompt_logprobs is not None:
        size = prompt_len * record_bytes(params.prompt_logprobs)
        if size > limits.MAX_RESULT_BYTES:
            text = f"prompt_logprobs: {size} bytes for {prompt_len} tokens, the limit is {limits.MAX_RESULT_BYTES}"
            raise InvalidRequest(text, field="prompt_logprobs")
    if second_at >= 0 or params.max_tokens == 0:
        check_length(prompt_len, executor, num_pages)
        return 0
    return longest_output(prompt_len, params, executor, num_pages)


def longest_output(
    prompt_len: int, params: SamplingParams, executor: ExecutorReady, num_pages: int, field: str = "prompt"
) -> int:
    """Most output tokens the sequence may get: what it asked for, bounded by the context and by the `num_pages` it can ever have.

    Raises `ContextTooLong` if not even one fits.
    """
    room = _capacity(executor, num_pages) - prompt_len
    if room < 1:
        text = f"{prompt_len} tokens leave no room for output: the limit is {prompt_len + room} tokens"
        raise ContextTooLong(text, field=field)
    return room if params.max_tokens is None else min(params.max_tokens, room)


def check_length(num_tokens: int, executor: ExecutorReady, num_pages: int, field: str = "prompt") -> None:
    """Raise `ContextTooLong` unless an open sequence may become so long."""
    capacity = _capacity(executor, num_pages)
    if num_tokens > capacity:
        raise ContextTooLong(f"{num_tokens} tokens, the limit is {capacity}", field=field)


def _capacity(executor: ExecutorReady, num_pages: int) -> int:
    return min(executor.max_context, num_pages * executor.page_size)


def check_queues(scheduler: Scheduler, max_waiting: int, tenant: Tenant, more: int = 1) -> None:
    """Raise `Overloaded`, with a guess when there may be room, if the model's or the tenant's queue has no room for so many `more`."""
    waiting = len(scheduler.queue)
    if waiting + more > max_waiting:
        text = f"{waiting} sequences are waiting, the limit is {max_waiting}"
        raise Overloaded(text, retry_after_s=scheduler.next_end_s())
    limit = tenant.limits.max_waiting
    if tenant.waiting + more > limit:
        text = f"{tenant.waiting} sequences of {tenant.name} are waiting, the limit is {limit}"
        raise Overloaded(text, retry_after_s=scheduler.next_end_s())


def check_deadline(deadline_ms: float | None, needed_s: float) -> None:
    """Refuse what can not be met even if the machine did nothing else. `needed_s`: its steps at the measured step time."""
    checks.check_deadline(deadline_ms)
    if deadline_ms is not None and deadline_ms < needed_s * 1e3:
        text = f"deadline of {deadline_ms:g} ms can not be met: its steps alone take about {needed_s * 1e3:.0f} ms"
        raise InvalidRequest(text, field="deadline_ms")
