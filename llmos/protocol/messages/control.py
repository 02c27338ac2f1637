"""Control verbs: client, gateway and microkernel, relayed with the gateway's own `req` and `owner`."""

from __future__ import annotations

from llmos.protocol.messages.base import Message, Part


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
