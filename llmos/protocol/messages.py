"""Every message on every llmos port, as frozen typed structs. `spec.md` beside this file is the prose version.

On the wire a message is one msgpack array `[type, fields...]` in one frame. Rules of evolution: types and fields are only
appended, an appended field has a default, a number is never reused; the schema hash (codec.py) covers all of it.
Token ids and page ids travel as little-endian int32 blobs (`pack_i32`), not as lists: a 256-row plan costs ~1 us to pack.

Groups: handshake 1-9 | client port 10-39 | text port 40-59 | kernel port, sequences 60-79 | kernel port, control 80-99 |
        executors 100-119 | supervisor port 120-139.
"""

from __future__ import annotations

import msgspec

from llmos.protocol.params import SamplingParams


class Message(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Base of all wire messages."""


class Part(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Base of structs that travel inside messages."""


# ---------------------------------------------------------------- handshake (every port)


class Hello(Message, tag=1, frozen=True):
    """First message of every connecting peer. `role`: client, gateway, executor, tokenizer, storage, supervisor."""

    protocol: int
    schema_hash: str
    role: str
    name: str
    pid: int


class Welcome(Message, tag=2, frozen=True):
    """The listener's answer. `incarnation` changes when the listener restarts."""

    protocol: int
    schema_hash: str
    name: str
    incarnation: int


class Error(Message, tag=3, frozen=True):
    """A typed failure. `req` is the request it answers (0 = none, e.g. an undecodable frame)."""

    req: int
    code: int
    message: str
    field: str | None = None
    rid: int | None = None


# ---------------------------------------------------------------- client port


class ChatMessage(Part, frozen=True):
    role: str
    content: str


class Usage(Part, frozen=True):
    """What a sequence consumed. Times in milliseconds, by the microkernel's monotonic clock."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    queue_ms: float
    total_ms: float


class TokenLogprobs(Part, frozen=True):
    """Log-probabilities (natural) at one output position: the chosen token's, then the best ones, most likely first."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Generate(Message, tag=10, frozen=True):
    """Client -> gateway. Exactly one of `text`, `token_ids`, `messages` is set. `req` is chosen by the client.

    `nice`: -20 (most urgent) to 19; below 0 is for administrators. `deadline_ms`: from now; a sequence still waiting then is ended,
    one that can not be done by then is refused.
    """

    req: int
    model: str | None
    text: str | None
    token_ids: bytes | None
    messages: tuple[ChatMessage, ...] | None
    params: SamplingParams
    client_request_id: str | None = None
    nice: int = 0
    deadline_ms: float | None = None


class Accepted(Message, tag=11, frozen=True):
    req: int
    rid: int
    model: str
    prompt_tokens: int


class Tokens(Message, tag=12, frozen=True):
    """Gateway -> client: output tokens from `offset` on. `text` may lag behind `ids` (UTF-8, stop strings)."""

    req: int
    offset: int
    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None = None


class Finished(Message, tag=13, frozen=True):
    """The one terminal record of an accepted request. `text` is what was still held back."""

    req: int
    rid: int
    reason: int
    text: str
    usage: Usage
    stop_string: str | None = None


class Ack(Message, tag=14, frozen=True):
    """Client -> gateway: all output tokens below `upto` have been read."""

    req: int
    upto: int


class Cancel(Message, tag=15, frozen=True):
    """Client -> gateway: end request `req`. Idempotent; the answer is its `Finished`."""

    req: int


class Tokenize(Message, tag=16, frozen=True):
    """Client -> gateway. Exactly one of `text`, `messages`."""

    req: int
    model: str | None
    text: str | None
    messages: tuple[ChatMessage, ...] | None


class Tokenized(Message, tag=17, frozen=True):
    req: int
    model: str
    token_ids: bytes
    pieces: tuple[str, ...]


# ---------------------------------------------------------------- text port (gateway -> tokenizer)


class ModelInfo(Part, frozen=True):
    """What a gateway must know of a model. `defaults` are the model's own generation settings."""

    model: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    defaults: SamplingParams


class ModelInfoGet(Message, tag=40, frozen=True):
    req: int


class ModelInfoList(Message, tag=41, frozen=True):
    req: int
    models: tuple[ModelInfo, ...]


class Encode(Message, tag=42, frozen=True):
    """Exactly one of `text`, `messages`. `pieces`: also return each token as text."""

    req: int
    model: str
    text: str | None
    messages: tuple[ChatMessage, ...] | None
    pieces: bool = False


class Encoded(Message, tag=43, frozen=True):
    req: int
    token_ids: bytes
    pieces: tuple[str, ...] = ()


class DecodeOpen(Message, tag=44, frozen=True):
    """Start incremental decoding of one stream. `stream` is chosen by the gateway, never reused on a connection."""

    stream: int
    model: str
    stop: tuple[str, ...]


class DecodeItem(Part, frozen=True):
    """Next output tokens of a stream; `final` flushes what is held back and closes the stream."""

    stream: int
    ids: tuple[int, ...]
    final: bool


class DecodeStep(Message, tag=45, frozen=True):
    """All streams that got tokens in one step, in one message."""

    items: tuple[DecodeItem, ...]


class DecodedItem(Part, frozen=True):
    """`text` is safe to show. If `stop` is set, it was found: `used` of the item's tokens belong to the output, the stream is closed."""

    stream: int
    text: str
    used: int
    stop: str | None = None
    final: bool = False


class Decoded(Message, tag=46, frozen=True):
    items: tuple[DecodedItem, ...]


class DecodeClose(Message, tag=47, frozen=True):
    """The stream's owner left; drop its state without an answer."""

    stream: int


# ---------------------------------------------------------------- kernel port: sequences (gateway -> microkernel)


class SeqSubmit(Message, tag=60, frozen=True):
    """Gateway -> microkernel. `params` are complete (no None but seed, max_tokens, logprobs); stop_token_ids include the model's own."""

    req: int
    model: str
    prompt: bytes
    params: SamplingParams
    owner: str
    client_request_id: str | None = None
    nice: int = 0
    deadline_ms: float | None = None


class SeqAccepted(Message, tag=61, frozen=True):
    req: int
    rid: int


class TokenEntry(Part, frozen=True):
    rid: int
    offset: int
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


class SeqEnd(Part, frozen=True):
    rid: int
    reason: int
    usage: Usage


class SeqTokens(Message, tag=62, frozen=True):
    """Microkernel -> gateway: everything that one step committed for this gateway's sequences, and the sequences that ended.

    `columns`: int64[n,3] (rid, offset, token) for sequences that did not ask for log-probabilities; the others are in `entries`.
    """

    entries: tuple[TokenEntry, ...]
    ends: tuple[SeqEnd, ...]
    columns: bytes = b""


class SeqCancel(Message, tag=63, frozen=True):
    """Gateway -> microkernel. Idempotent; the answer is the sequence's end in `SeqTokens`. `reason` is a FinishReason."""

    rid: int
    reason: int


class SeqFinish(Message, tag=64, frozen=True):
    """Gateway -> microkernel: a stop string ended the text; output tokens from `upto` on do not count."""

    rid: int
    upto: int


class SeqAck(Message, tag=65, frozen=True):
    """Gateway -> microkernel: the client has read all output tokens below `upto`."""

    rid: int
    upto: int


# ---------------------------------------------------------------- control (client -> gateway -> microkernel, relayed unchanged)


class SeqRow(Part, frozen=True):
    """One line of `ps`. `age_ms` since acceptance."""

    rid: int
    owner: str
    model: str
    state: int
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    pages: int
    cached_tokens: int
    preemptions: int
    age_ms: float
    tokens_per_s: float
    nice: int = 0


class PsGet(Message, tag=80, frozen=True):
    """`owner`: only this owner's sequences (None = all). Gateways overwrite it with what the client may see."""

    req: int
    owner: str | None = None


class PsReply(Message, tag=81, frozen=True):
    req: int
    rows: tuple[SeqRow, ...]


class Kill(Message, tag=82, frozen=True):
    """`owner`: refuse, as if unknown, a sequence of another owner (None = any). Gateways overwrite it."""

    req: int
    rid: int
    owner: str | None = None


class Killed(Message, tag=83, frozen=True):
    req: int
    rid: int


class StatusGet(Message, tag=84, frozen=True):
    req: int


class LaneStatus(Part, frozen=True):
    """One served model as the microkernel sees it. Pages are counted, not bytes."""

    model: str
    generation: int
    ready: bool
    page_size: int
    pages_total: int
    pages_free: int
    pages_cached: int
    waiting: int
    running: int
    steps: int
    tokens_committed: int
    preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    results_dropped: int
    dtype: str
    device: str
    max_context: int


class ServiceStatus(Part, frozen=True):
    name: str
    state: int
    pid: int
    restarts: int
    uptime_ms: float
    detail: str


class StatusReply(Message, tag=85, frozen=True):
    req: int
    version: str
    uptime_ms: float
    lanes: tuple[LaneStatus, ...]
    services: tuple[ServiceStatus, ...]


class ModelsGet(Message, tag=86, frozen=True):
    """Client -> gateway -> microkernel -> storage, and back."""

    req: int


class ModelRow(Part, frozen=True):
    """One registered model. `state`: available, serving, failed. `bytes`: size of its files."""

    name: str
    path: str
    digest: str
    architecture: str
    state: str
    bytes: int


class ModelsReply(Message, tag=87, frozen=True):
    req: int
    models: tuple[ModelRow, ...]


class Nice(Message, tag=90, frozen=True):
    """Change a live sequence's nice value. `owner` as in `Kill`. The answer is `Done`."""

    req: int
    rid: int
    nice: int
    owner: str | None = None


class Suspend(Message, tag=91, frozen=True):
    """Take a live sequence off the machine until `Resume`. `keep_pages`: its pages stay until somebody else needs them; otherwise they
    are given back at once. Either way nothing is lost, dropped pages are recomputed. Idempotent; the answer is `Done`."""

    req: int
    rid: int
    keep_pages: bool = True
    owner: str | None = None


class Resume(Message, tag=92, frozen=True):
    """Let a suspended sequence wait for the machine again. Idempotent; the answer is `Done`."""

    req: int
    rid: int
    owner: str | None = None


class Done(Message, tag=93, frozen=True):
    req: int
    rid: int


class Explain(Message, tag=94, frozen=True):
    """Where did a live sequence's time go? `owner` as in `Kill`."""

    req: int
    rid: int
    owner: str | None = None


class Explained(Message, tag=95, frozen=True):
    """Milliseconds since acceptance by cause; they add up to `age_ms`. `client`: it was ready, but its client did not read."""

    req: int
    rid: int
    state: int
    age_ms: float
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    preempted_ms: float
    suspended_ms: float
    client_ms: float
    preemptions: int
    suspensions: int
    cached_tokens: int
    nice: int


class TenantRow(Part, frozen=True):
    """A tenant's limits and use on one model. 2147483647 = unlimited; `tokens_per_s` 0 = no limit."""

    tenant: str
    model: str
    weight: float
    max_pages: int
    guaranteed_pages: int
    max_running: int
    max_waiting: int
    tokens_per_s: float
    pages: int = 0
    running: int = 0
    waiting: int = 0
    tokens: int = 0


class TenantsGet(Message, tag=96, frozen=True):
    """`owner`: only this tenant (None = all)."""

    req: int
    owner: str | None = None


class TenantsReply(Message, tag=97, frozen=True):
    req: int
    tenants: tuple[TenantRow, ...]


class TenantSet(Message, tag=98, frozen=True):
    """Change a tenant's limits on every model; None leaves a value as it is. For administrators. The answer is `TenantsReply`."""

    req: int
    tenant: str
    weight: float | None = None
    max_pages: int | None = None
    guaranteed_pages: int | None = None
    max_running: int | None = None
    max_waiting: int | None = None
    tokens_per_s: float | None = None


class ModelState(Message, tag=88, frozen=True):
    """Microkernel -> storage: a model's executor came or went. `state`: serving, available, failed."""

    name: str
    state: str


# ---------------------------------------------------------------- executors


class ExecutorReady(Message, tag=100, frozen=True):
    """Executor -> microkernel after weights are loaded: what it measured. Pages are all free; old generations are void."""

    model: str
    num_pages: int
    page_size: int
    max_rows: int
    max_step_tokens: int
    max_context: int
    vocab_size: int
    dtype: str
    device: str


class ExecutorWelcome(Message, tag=101, frozen=True):
    """Microkernel -> executor. Every plan and result of this life carries `generation`."""

    generation: int


class RowAdd(Part, frozen=True):
    """A sequence enters the executor's row table whole; later plans only send differences.

    `tokens`: int32[n], prompt and committed output; the first `prompt_len` are the prompt. `num_computed`: tokens whose KV is
    already in `pages` (prefix-cache hit). `pages`: int32[], page table so far. `params.seed` is set.
    """

    row: int
    rid: int
    tokens: bytes
    prompt_len: int
    num_computed: int
    pages: bytes
    params: SamplingParams


class StepPlan(Message, tag=102, frozen=True):
    """One step as a difference. Applied in this order: row_frees, row_adds, page_appends, then the work.

    row_frees: int32[n] rows. page_appends: int32[n,3] (row, index in page table, page).
    prefill: int32[n,4] (row, start, length, sample): compute tokens [start, start+length); if sample is 1, sample the next token.
    decode: int32[n] rows that each compute their newest token and sample the next one; None = the same rows as in the previous plan.
    """

    generation: int
    step: int
    row_frees: bytes
    row_adds: tuple[RowAdd, ...]
    page_appends: bytes
    prefill: bytes
    decode: bytes | None


class RowLogprobs(Part, frozen=True):
    row: int
    position: int
    logprobs: TokenLogprobs


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


# ---------------------------------------------------------------- supervisor port


class ServiceReady(Message, tag=120, frozen=True):
    """Child -> supervisor: it can work now. `detail` is one line for people (what was loaded, how long it took)."""

    name: str
    pid: int
    detail: str


class Heartbeat(Message, tag=121, frozen=True):
    """Child -> supervisor from its work loop. `progress` grows with work done."""

    name: str
    progress: int


class ServiceFailed(Message, tag=122, frozen=True):
    """Child -> supervisor just before it exits because it can not work (a typed reason for people)."""

    name: str
    code: int
    message: str
    field: str | None = None


class Stop(Message, tag=123, frozen=True):
    """Supervisor -> child: finish and exit within the grace time."""


class ServiceReport(Message, tag=124, frozen=True):
    """Supervisor -> microkernel: all services as they are now; sent on each change."""

    services: tuple[ServiceStatus, ...]


class ServiceDown(Message, tag=125, frozen=True):
    """Supervisor -> microkernel: the process is dead and reaped. `role` as in its Hello; `name` e.g. executor.demo."""

    role: str
    name: str
    pid: int


ControlVerb = PsGet | Kill | StatusGet | ModelsGet | Nice | Suspend | Resume | Explain | TenantsGet | TenantSet
ControlAnswer = PsReply | Killed | StatusReply | ModelsReply | Done | Explained | TenantsReply
ClientToGateway = Hello | Generate | Ack | Cancel | Tokenize | ControlVerb
GatewayToClient = Welcome | Error | Accepted | Tokens | Finished | Tokenized | ControlAnswer
GatewayToTokenizer = Hello | ModelInfoGet | Encode | DecodeOpen | DecodeStep | DecodeClose
TokenizerToGateway = Welcome | Error | ModelInfoList | Encoded | Decoded
ToKernel = (
    Hello
    | SeqSubmit
    | SeqCancel
    | SeqFinish
    | SeqAck
    | ControlVerb
    | ModelsReply
    | ExecutorReady
    | StepResult
    | ServiceReport
    | ServiceDown
)
FromKernel = (
    Welcome | Error | SeqAccepted | SeqTokens | ControlAnswer | ModelsGet | ModelState | ExecutorWelcome | StepPlan
)
ToSupervisor = Hello | ServiceReady | Heartbeat | ServiceFailed
FromSupervisor = Welcome | Error | Stop
