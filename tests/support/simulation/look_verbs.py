"""Events that change nothing: looking, and requests that are wrong in themselves."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_world import VOCAB, params

from llmos.codes import ErrorCode, SeqState
from llmos.microkernel.sender import Sender
from llmos.microkernel.sequence import QUEUED
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from simulation.before import Before
from simulation.fates import check_times
from simulation.ledger import INVALID, NOT_FOUND, Known
from simulation.verbs import sequence, verb
from simulation.world import SUPERVISOR, World

# ------------------------------------------------------------ looking


@verb
def look(
    world: World, before: Before, number: int, *, gate: str, what: str, seq: str = "", owner: str | None = None
) -> None:
    sender, req = world.gates[gate], world.next_req()
    if what == "ps":
        rows = world.ask(sender, m.PsGet(req, owner), set()).rows
        expected = {known.rid for known in world.ledger.live.values() if owner in (None, known.owner)}
        assert len(rows) == len(expected)
        assert {row.rid for row in rows} == expected
    elif what == "status":
        for lane in world.ask(sender, m.StatusGet(req), set()).lanes:
            _check_status(world, lane)
    elif what == "tenants":
        rows = world.ask(sender, m.TenantsGet(req, owner), set()).tenants
        assert all(owner in (None, row.tenant) for row in rows)
    elif (known := world.ledger.by_label.get(seq)) is not None:
        must = world.ledger.known_problems(known, owner)
        kind = {"stat": m.Stat, "explain": m.Explain}[what]
        answer = world.ask(sender, kind(req, known.rid, owner), must)
        if isinstance(answer, m.Stats):
            _check_stats(world, known, answer)
        elif answer is not None:
            check_times(world, known, sequence(world, known))


def _check_status(world: World, lane: m.LaneStatus) -> None:
    live = [sequence(world, known) for known in world.ledger.live.values() if known.model == lane.model]
    counts = [sum(seq.state in states for seq in live) for states in (
        (SeqState.RUNNING,), QUEUED, (SeqState.BLOCKED,), (SeqState.SUSPENDED,))]  # fmt: skip
    assert [lane.running, lane.waiting, lane.blocked, lane.suspended] == counts
    assert lane.ready == (lane.model in world.mirrors)
    if lane.ready:
        held = sum(len(seq.host_pages) for seq in live)
        assert lane.host_pages_free <= lane.host_pages_total - held
        assert lane.pages_free + lane.pages_cached <= lane.pages_total


def _check_stats(world: World, known: Known, stats: m.Stats) -> None:
    row = stats.row
    assert (row.owner, row.model, row.nice, row.is_open) == (known.owner, known.model, known.nice, known.is_open)
    assert stats.parent == known.parent
    assert stats.children == known.children
    assert stats.after == tuple(sorted(known.after))
    assert stats.reason == (known.reason or 0)
    assert (row.prompt_tokens, stats.num_tokens) == (len(known.before), known.seen)
    job = [other for other in world.ledger.by_label.values() if other.job == known.job]
    assert stats.job.live == sum(other.reason is None for other in job)
    if not any(other.times_lost for other in job):
        assert stats.job.sequences == len(job)
    if known.deadline is not None and known.reason is None:
        assert stats.deadline_ms == pytest.approx((known.deadline - world.now) * 1e3)


# ------------------------------------------------------------ what is always refused


def _nonsense(world: World, req: int, what: str) -> tuple[Sender, Any, tuple[ErrorCode, str | None]]:
    """A request that is wrong in itself, who sends it, and the refusal."""
    gate, model = world.gates["g1"], world.setup.models[0]
    prompt, one = pack_i32([1]), params(max_tokens=1)
    executor = Sender(9_999_999, "executor", f"executor.{model}")
    nobody = 10**9
    return {
        "model": (gate, m.SeqSubmit(req, "nope", prompt, one, "alice"), (NOT_FOUND, "model")),
        "empty": (gate, m.SeqSubmit(req, model, b"", one, "alice"), (INVALID, "prompt")),
        "blob": (gate, m.SeqSubmit(req, model, b"123", one, "alice"), (ErrorCode.PROTOCOL, None)),
        "vocabulary": (gate, m.SeqSubmit(req, model, pack_i32([VOCAB]), one, "alice"), (INVALID, "prompt")),
        "negative": (gate, m.SeqSpawn(req, model, pack_i32([-1]), "alice"), (INVALID, "prompt")),
        "params": (gate, m.SeqSubmit(req, model, prompt, params(top_p=0.0), "alice"), (INVALID, "top_p")),
        "incomplete": (gate, m.SeqSubmit(req, model, prompt, params(top_k=None), "alice"), (INVALID, "top_k")),
        "after": (gate, m.SeqSubmit(req, model, prompt, one, "alice", None, 0, None, None, (1,) * 257), (INVALID, "after")),
        "unknown after": (gate, m.SeqSpawn(req, model, prompt, "alice", 0, None, (nobody,)), (NOT_FOUND, "after")),
        "unknown parent": (gate, m.SeqSpawn(req, model, prompt, "alice", 0, nobody), (NOT_FOUND, "parent")),
        "attach": (gate, m.SeqAttach(req, nobody), (NOT_FOUND, "rid")),
        "append": (gate, m.SeqAppend(req, nobody, model, prompt), (NOT_FOUND, "rid")),
        "kill": (gate, m.Kill(req, nobody, "alice"), (NOT_FOUND, "rid")),
        "kill both": (gate, m.Kill(req, nobody, None, "alice"), (INVALID, "rid")),
        "job": (gate, m.Kill(req, None, None, job=nobody), (NOT_FOUND, "job")),
        "wait": (gate, m.Wait(req, nobody), (NOT_FOUND, "rid")),
        "weight": (gate, m.TenantSet(req, "alice", weight=0.0), (INVALID, "weight")),
        "pages": (gate, m.TenantSet(req, "alice", max_pages=-1), (INVALID, "max_pages")),
        "rate": (gate, m.TenantSet(req, "alice", tokens_per_s=float("nan")), (INVALID, "tokens_per_s")),
        "name": (gate, m.TenantSet(req, "", weight=1.0), (INVALID, "tenant")),
        "record": (gate, m.RecordWrite(req), (INVALID, "recorder_mib")),
        "role": (executor, m.Kill(req, 1), (ErrorCode.PERMISSION, None)),
        "supervisor": (SUPERVISOR, m.SeqAttach(req, 1), (ErrorCode.PERMISSION, None)),
        "executor": (gate, m.ServiceDown("executor", f"executor.{model}", 1), (ErrorCode.PERMISSION, None)),
        "ready": (executor, m.ExecutorReady(model, 0, 4, 1, 1, 9, VOCAB, "", ""), (INVALID, "num_pages")),
        "host": (executor, m.ExecutorReady(model, 9, 4, 1, 1, 9, VOCAB, "", "", -1), (INVALID, "host_pages")),
    }[what]  # fmt: skip


NONSENSE = (
    "model", "empty", "blob", "vocabulary", "negative", "params", "incomplete", "after", "unknown after", "unknown parent",
    "attach", "append", "kill", "kill both", "job", "wait", "weight", "pages", "rate", "name", "record", "role", "supervisor",
    "executor", "ready", "host",
)  # fmt: skip


@verb
def nonsense(world: World, before: Before, number: int, *, what: str) -> None:
    sender, message, refusal = _nonsense(world, world.next_req(), what)
    if isinstance(message, (m.SeqSubmit, m.SeqSpawn, m.SeqAppend)):
        if world.ledger.refusal:
            refusal = (ErrorCode.UNAVAILABLE, None)
        elif what not in ("model", "append") and world.scheduler(message.model) is None:
            refusal = (ErrorCode.UNAVAILABLE, "model")
    if hasattr(message, "req"):
        world.ask(sender, message, {refusal}, {(ErrorCode.OVERLOADED, None), (ErrorCode.CONTEXT_TOO_LONG, "prompt")})
    else:
        world.tell(sender, message, {refusal})
