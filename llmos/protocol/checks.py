"""Ranges of what scheduling requests carry, for whoever checks them: the SDK for its caller, the gateway for everybody
else, and the microkernel once more, which trusts nobody.

Each raises `InvalidRequest` that names the field. Who may ask is not judged here.
"""

from __future__ import annotations

from llmos.codes import PageFate
from llmos.errors import InvalidRequest
from llmos.protocol import limits
from llmos.protocol.messages import ExecutorReady, Kill, TenantSet

_EXECUTOR = (
    ("num_pages", 1, limits.MAX_KV_PAGES),
    ("page_size", 1, limits.MAX_PAGE_SIZE),
    ("max_rows", 1, limits.UNLIMITED),
    ("max_step_tokens", 1, limits.UNLIMITED),
    ("max_context", 1, limits.MAX_CONTEXT),
    ("vocab_size", 1, limits.MAX_VOCAB),
    ("host_pages", 0, limits.MAX_KV_PAGES),
    ("swap_us", 0, 1e9),
    ("output_size", 0, limits.MAX_VECTOR),
)
_COUNTS = ("max_pages", "guaranteed_pages", "max_running", "max_waiting")


def check_nice(nice: int) -> None:
    if not limits.MIN_NICE <= nice <= limits.MAX_NICE:
        raise InvalidRequest(f"nice: {nice} is outside [{limits.MIN_NICE}, {limits.MAX_NICE}]", field="nice")


def check_deadline(deadline_ms: float | None) -> None:
    """None = no deadline."""
    if deadline_ms is not None and not 0 < deadline_ms <= limits.MAX_DEADLINE_MS:
        raise InvalidRequest(
            f"deadline_ms: {deadline_ms} is outside (0, {limits.MAX_DEADLINE_MS:.0f}]", field="deadline_ms"
        )


def check_fork(count: int) -> None:
    if not 1 <= count <= limits.MAX_FORKS:
        raise InvalidRequest(f"count: {count} is outside [1, {limits.MAX_FORKS}]", field="count")


def check_after(after: tuple[int, ...]) -> None:
    if len(after) > limits.MAX_AFTER:
        raise InvalidRequest(f"after: {len(after)} sequences, the limit is {limits.MAX_AFTER}", field="after")


def check_page_fate(pages: int) -> None:
    if pages not in set(PageFate):
        names = ", ".join(f"{fate.value} ({fate.name.lower()})" for fate in PageFate)
        raise InvalidRequest(f"pages: {pages} is none of {names}", field="pages")


def check_kill(message: Kill) -> None:
    """One sequence or a selector, not both and not neither."""
    selectors = [name for name in ("tenant", "job", "model") if getattr(message, name) is not None]
    if (message.rid is None) == (not selectors):
        raise InvalidRequest("give either a rid, or one or more of tenant, job, model", field="rid")


def check_tenant(name: str) -> None:
    if not 0 < len(name) <= limits.MAX_TENANT_NAME_CHARS:
        raise InvalidRequest(
            f"tenant: {len(name)} characters, allowed are 1 to {limits.MAX_TENANT_NAME_CHARS}", field="tenant"
        )


def check_tenant_set(message: TenantSet) -> None:
    """Each value for itself; how they fit together only the microkernel can tell."""
    check_tenant(message.tenant)
    weight, rate = message.weight, message.tokens_per_s
    if weight is not None and not 0 < weight <= limits.MAX_TENANT_WEIGHT:
        raise InvalidRequest(f"weight: {weight} is outside (0, {limits.MAX_TENANT_WEIGHT:g}]", field="weight")
    for name in _COUNTS:
        value = getattr(message, name)
        if value is not None and not 0 <= value <= limits.UNLIMITED:
            raise InvalidRequest(f"{name}: {value} is outside [0, {limits.UNLIMITED}]", field=name)
    if rate is not None and not 0 <= rate <= limits.MAX_TENANT_TOKENS_PER_S:
        raise InvalidRequest(
            f"tokens_per_s: {rate} is outside [0, {limits.MAX_TENANT_TOKENS_PER_S:.0f}]", field="tokens_per_s"
        )


def check_executor(message: ExecutorReady) -> None:
    """What it says of itself decides how much the microkernel sets up for it."""
    for name, least, most in _EXECUTOR:
        value = getattr(message, name)
        if not least <= value <= most:
            raise InvalidRequest(f"{name}: {value} is outside [{least}, {most:.0f}]", field=name)
    for name in ("model", "dtype", "device"):
        if len(getattr(message, name)) > limits.MAX_MODEL_NAME_CHARS:
            raise InvalidRequest(f"{name}: more than {limits.MAX_MODEL_NAME_CHARS} characters", field=name)
