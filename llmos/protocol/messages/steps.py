"""Steps: microkernel and executors."""

from __future__ import annotations

from llmos.protocol.messages.base import Message, Part
from llmos.protocol.messages.client import TokenLogprobs
from llmos.protocol.params import SamplingParams


class ExecutorReady(Message, tag=100, frozen=True):
    """Executor -> microkernel after weights are loaded: what it measured. Pages are all free; old generations are void.

    `host_pages`: pages of host memory for swapping. `swap_us`: time to copy one page there or back, in a batch of many.
    `output_size`: 0 = it generates tokens; else it is an encoder, which gives so many numbers for a text.
    """

    model: str
    num_pages: int
    page_size: int
    max_rows: int
    max_step_tokens: int
    max_context: int
    vocab_size: int
    dtype: str
    device: str
    host_pages: int = 0
    swap_us: float = 0.0
    output_size: int = 0


class ExecutorWelcome(Message, tag=101, frozen=True):
    """Microkernel -> executor. Every plan and result of this life carries `generation`."""

    generation: int


class RowAdd(Part, frozen=True):
    """A sequence enters the executor's row table whole; later plans only send differences.

    `tokens`: int32[n], prompt and committed output; the first `prompt_len` are the prompt. `num_computed`: tokens whose KV is
    already in `pages` (prefix-cache hit). `pages`: int32[], page table so far. `params.seed` is set. `second_at`: as in `SeqSubmit`.
    """

    row: int
    rid: int
    tokens: bytes
    prompt_len: int
    num_computed: int
    pages: bytes
    params: SamplingParams
    second_at: int = -1


class StepPlan(Message, tag=102, frozen=True):
    """One step as a difference. Applied in this order: row_frees, swap_out, swap_in, copies, row_adds, page_appends, then the work.
    A plan without work (only copies) is answered like any other.

    swap_out: int32[n,2] (page, host page), swap_in: int32[n,2] (host page, page), copies: int32[n,2] (page, page), each from, to.
    row_frees: int32[n] rows. page_appends: int32[n,3] (row, index in page table, page).
    prefill: int32[n,4] (row, start, length, sample): compute tokens [start, start+length); if sample is 1, sample the next token. An
    encoder gets a text whole, in one piece, and never samples.
    decode: int32[n] rows that each compute their newest token and sample the next one; None = the same rows as in the previous plan.
    """

    generation: int
    step: int
    row_frees: bytes
    row_adds: tuple[RowAdd, ...]
    page_appends: bytes
    prefill: bytes
    decode: bytes | None
    swap_out: bytes = b""
    swap_in: bytes = b""
    copies: bytes = b""


class RowLogprobs(Part, frozen=True):
    row: int
    position: int
    logprobs: TokenLogprobs


class RowResult(Part, frozen=True):
    """As `ResultEntry`, for a row: its vector, or the records that its prefill made known. After tokens [start, start+length) of a prompt
    were computed, these are those of the tokens start+1 .. start+length, as far as the prompt goes, and of token 0 if start is 0."""

    row: int
    start: int
    values: bytes


class StepResult(Message, tag=103, frozen=True):
    """samples: int32[n,3] (row, position, token); position counts from the start of the prompt. failed: int32[n,2] (row, FinishReason);
    a row that failed gives nothing more, whatever later plans ask of it, until it is freed.
    busy_us: time the executor computed; idle_us: time it waited for this plan."""

    generation: int
    step: int
    samples: bytes
    logprobs: tuple[RowLogprobs, ...]
    failed: bytes
    busy_us: int
    idle_us: int
    results: tuple[RowResult, ...] = ()
