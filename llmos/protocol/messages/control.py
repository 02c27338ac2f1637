"""Control verbs: client, gateway and microkernel, relayed with the gateway's own `req` and `owner`."""

from __future__ import annotations

from llmos.codes import PageFate
from llmos.protocol.messages.base import Message, Part
from llmos.protocol.messages.client import Usage


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
    job: int = 0  # rid of the job's first sequence
    host_pages: int = 0
    is_open: bool = False


class PsGet(Message, tag=80, frozen=True):
    """`owner`: only this owner's sequences (None = all). Gateways overwrite it with what the client may see."""

    req: int
    owner: str | None = None


class PsReply(Message, tag=81, frozen=True):
    req: int
    rows: tuple[SeqRow, ...]


class Kill(Message, tag=82, frozen=True):
    """One sequence by `rid`, or all that match every given one of `tenant`, `job` (the rid of any of its sequences), `model`.

    `owner`: refuse, as if unknown, sequences of another owner (None = any). Gateways overwrite it. A selector that matches nothing is
    answered with no rids, an unknown `rid` or `job` with NOT_FOUND.
    """

    req: int
    rid: int | None
    owner: str | None = None
    tenant: str | None = None
    job: int | None = None
    model: str | None = None


class Killed(Message, tag=83, frozen=True):
    req: int
    rids: tuple[int, ...]


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
    host_pages_total: int = 0
    host_pages_free: int = 0
    blocked: int = 0
    suspended: int = 0
    swaps_out: int = 0
    swaps_in: int = 0
    pages_copied: int = 0
    deadline_misses: int = 0


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
    """Take a live sequence off the machine until `Resume`. `pages` is a PageFate; nothing is lost either way, dropped pages are
    recomputed. Idempotent; the answer is `Done`."""

    req: int
    rid: int
    pages: int = PageFate.KEEP
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
    """Where did a sequence's time go? It may have ended a limited time ago. `owner` as in `Kill`."""

    req: int
    rid: int
    owner: str | None = None


class Explained(Message, tag=95, frozen=True):
    """Milliseconds by cause from acceptance to now or to the end; they add up to `age_ms`. `client`: it was ready, but its client did
    not read. `quota`: it waited because of its tenant's own limits. `blocked`: it waited for input or for other sequences."""

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
    quota_ms: float = 0.0
    swapped_ms: float = 0.0
    blocked_ms: float = 0.0
    swaps: int = 0


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
    """Change a tenant's limits on every model, for good; None leaves a value as it is. For administrators. The answer is
    `TenantsReply`."""

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


class Fork(Message, tag=140, frozen=True):
    """Copy a live sequence `count` times: same tokens, shared pages. A child of a generating sequence generates on from there with a
    seed of its own, read through `Attach`; a child of one at rest is at rest. The answer is `Forked`."""

    req: int
    rid: int
    count: int = 1
    owner: str | None = None


class Forked(Message, tag=141, frozen=True):
    req: int
    rids: tuple[int, ...]


class Wait(Message, tag=142, frozen=True):
    """Answered with `Waited` when the sequence has ended, at once if it has already (for a limited time)."""

    req: int
    rid: int
    owner: str | None = None


class Waited(Message, tag=143, frozen=True):
    req: int
    rid: int
    reason: int
    usage: Usage


class Stat(Message, tag=144, frozen=True):
    """Everything about one sequence, live or ended a limited time ago. The answer is `Stats`."""

    req: int
    rid: int
    owner: str | None = None


class JobRow(Part, frozen=True):
    """What the sequences of a job use together. `tokens`: computed for it, prompt and output."""

    job: int
    sequences: int
    live: int
    pages: int
    tokens: int


class Stats(Message, tag=145, frozen=True):
    """`num_tokens`: its whole length. `deadline_ms`: what is left of it. `reason`: a FinishReason once it ended, else 0."""

    req: int
    row: SeqRow
    job: JobRow
    num_tokens: int
    parent: int | None
    after: tuple[int, ...]
    children: int
    deadline_ms: float | None
    reason: int
    usage: Usage


class Close(Message, tag=146, frozen=True):
    """End an open sequence. The answer is `Done`."""

    req: int
    rid: int
    owner: str | None = None


class Deadline(Message, tag=147, frozen=True):
    """Change a live sequence's deadline, milliseconds from now; None removes it. The answer is `Done`."""

    req: int
    rid: int
    deadline_ms: float | None
    owner: str | None = None


class After(Message, tag=148, frozen=True):
    """Change what a sequence that has not begun waits for; it may not wait for itself, not even through others. The answer is `Done`."""

    req: int
    rid: int
    after: tuple[int, ...]
    owner: str | None = None


class RecordWrite(Message, tag=149, frozen=True):
    """Write the flight recorder to a file beside the daemon's state. For administrators. The answer is `RecordWritten`."""

    req: int


class RecordWritten(Message, tag=150, frozen=True):
    req: int
    path: str
    records: int
    bytes: int


class TenantLimitsRow(Part, frozen=True):
    """A tenant's limits as they are stored. Values as in `TenantRow`."""

    tenant: str
    weight: float
    max_pages: int
    guaranteed_pages: int
    max_running: int
    max_waiting: int
    tokens_per_s: float


class TenantsStored(Message, tag=151, frozen=True):
    """Storage -> microkernel after its hello: the limits that were set in earlier lives."""

    tenants: tuple[TenantLimitsRow, ...]


class TenantStore(Message, tag=152, frozen=True):
    """Microkernel -> storage: keep these limits."""

    tenant: TenantLimitsRow


class RestartService(Message, tag=153, frozen=True):
    """End a service's process and start another one; what runs goes on. For administrators. Client -> gateway -> microkernel, which knows
    the names, answers `Done` (rid 0) and tells the supervisor with the same message. That it happened is seen in `StatusReply`."""

    req: int
    name: str
