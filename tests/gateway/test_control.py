"""The relay of the control verbs: numbers, owners, rights, failures."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from gateway_world import explained, tenant_row, usage

from llmos.codes import ErrorCode, FinishReason, PageFate
from llmos.errors import InvalidRequest, NotFound
from llmos.keys.roles import Role
from llmos.protocol import limits
from llmos.protocol import messages as m
from llmos.protocol.failures import error_message
from llmos.services.gateway.control import PATIENCE_S, RECOVERY_S, TIMEOUT_S, ControlRelay
from llmos.services.gateway.owners import Asker, is_administrator, owner_name
from llmos.services.gateway.validate import check_control

ALICE = Asker(b"alice", "alice", Role.INSPECT)
ROOT = Asker(b"root", "root", Role.ADMIN)
BOB = Asker(b"bob", "bob", Role.INSPECT)
FOR_ADMINISTRATORS = [m.TenantSet(5, "alice", weight=3.0), m.RecordWrite(5), m.RestartService(5, "gateway")]
VERBS = [
    m.PsGet(5, "mallory"),
    m.Kill(5, 1, "mallory"),
    m.Kill(5, None, "mallory", tenant="bob", job=3, model="echo"),
    m.StatusGet(5),
    m.ModelsGet(5),
    m.Nice(5, 1, 3, "mallory"),
    m.Suspend(5, 1, PageFate.SWAP, "mallory"),
    m.Resume(5, 1, "mallory"),
    m.Explain(5, 1, "mallory"),
    m.TenantsGet(5, "mallory"),
    m.Fork(5, 1, 4, "mallory"),
    m.Wait(5, 1, "mallory"),
    m.Stat(5, 1, "mallory"),
    m.Close(5, 1, "mallory"),
    m.Deadline(5, 1, 250.0, "mallory"),
    m.After(5, 1, (2, 3), "mallory"),
    m.MeasuresGet(5),
    *FOR_ADMINISTRATORS,
]
ROW = m.SeqRow(9, "alice", "echo", 1, 0, 0, 0, 0, 0, 0, 0.0, 0.0)
ANSWERS = [
    m.PsReply(1, ()),
    m.Killed(1, (9,)),
    m.StatusReply(1, "0", 0.0, (), ()),
    m.ModelsReply(1, ()),
    m.Done(1, 9),
    explained(9, req=1),
    m.TenantsReply(1, (tenant_row("alice"),)),
    m.Forked(1, (10, 11)),
    m.Waited(1, 9, FinishReason.STOP, usage()),
    m.Stats(1, ROW, m.JobRow(9, 1, 1, 0, 0), 0, None, (), 0, None, 0, usage()),
    m.RecordWritten(1, "/x", 7, 350),
    m.MeasuresReply(1, ()),
    m.Error(1, ErrorCode.OVERLOADED, "later", "rid", 9),
]


class Relay:
    def __init__(self, max_open: int = 8) -> None:
        self.up = True
        self.asked: list[m.Message] = []
        self.replies: list[tuple[bytes, m.Message]] = []
        self.relay = ControlRelay(self._send, lambda client, message: self.replies.append((client, message)), max_open)

    def _send(self, message: m.Message) -> bool:
        if self.up:
            self.asked.append(message)
        return self.up

    def refused(self) -> tuple[int, int, str | None]:
        """The one reply, an Error."""
        ((_, answer),) = self.replies
        assert isinstance(answer, m.Error)
        return answer.req, answer.code, answer.field


def named(verb: Any, owner: str | None) -> m.Message:
    """The verb as the microkernel should get it: number 1, this owner."""
    owned: dict[str, Any] = {"owner": owner} if hasattr(verb, "owner") else {}
    renamed: m.Message = msgspec.structs.replace(verb, req=1, **owned)
    return renamed


def test_the_verbs_of_this_test_are_all_of_them() -> None:
    assert {type(verb) for verb in VERBS} == set(m.ControlVerb.__args__)
    assert {type(answer) for answer in ANSWERS} == {*m.ControlAnswer.__args__, m.Error}


@pytest.mark.parametrize("verb", VERBS[: -len(FOR_ADMINISTRATORS)], ids=lambda verb: type(verb).__name__)
def test_a_clients_own_name_replaces_what_it_wrote(verb: Any) -> None:
    world = Relay()
    world.relay.ask(ALICE, verb, 0.0)
    assert world.asked == [named(verb, "alice")]
    assert world.replies == []


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: type(verb).__name__)
def test_administrators_are_not_limited(verb: Any) -> None:
    world = Relay()
    world.relay.ask(ROOT, verb, 0.0)
    assert world.asked == [named(verb, None)]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
def test_each_answer_returns_under_the_clients_number(answer: Any) -> None:
    world = Relay()
    world.relay.ask(ALICE, m.StatusGet(70), 0.0)
    world.relay.answer(answer)
    world.relay.answer(answer)
    assert world.replies == [(b"alice", msgspec.structs.replace(answer, req=70))]


def test_answers_find_their_clients() -> None:
    world = Relay()
    world.relay.ask(ALICE, m.Kill(7, 3), 0.0)
    world.relay.ask(ROOT, m.Kill(7, 4), 0.0)
    world.relay.answer(m.Killed(2, (4,)))
    world.relay.answer(error_message(NotFound("no sequence 3", field="rid", rid=3), 1))
    assert world.replies == [
        (b"root", m.Killed(7, (4,))),
        (b"alice", m.Error(7, ErrorCode.NOT_FOUND, "no sequence 3", "rid", 3)),
    ]


@pytest.mark.parametrize(
    ("verb", "field"),
    [
        (m.Nice(5, 1, -1), "nice"),
        (m.Nice(5, 1, -20), "nice"),
        (m.TenantSet(5, "alice", weight=2.0), None),
        (m.RecordWrite(5), None),
        (m.RestartService(5, "gateway"), None),
    ],
)
def test_what_only_administrators_may(verb: Any, field: str | None) -> None:
    world = Relay()
    world.relay.ask(ALICE, verb, 0.0)
    assert world.refused() == (5, ErrorCode.PERMISSION, field)
    assert world.asked == []
    world.relay.ask(ROOT, verb, 0.0)
    assert len(world.asked) == 1


@pytest.mark.parametrize("nice", [0, 19])
def test_everybody_may_give_way(nice: int) -> None:
    check_control(m.Nice(5, 1, nice), is_administrator=False)


RID_VERBS = [verb for verb in VERBS if isinstance(getattr(verb, "rid", None), int)]
BAD: list[tuple[m.Message, str, str]] = [
    *(
        (msgspec.structs.replace(verb, rid=rid), "rid", rf"{rid} is outside \[1, 9223372036854775807\]")
        for verb in RID_VERBS
        for rid in (0, -7, 2**63)
    ),
    (m.Kill(5, None), "rid", "give either a rid, or one or more of tenant, job, model"),
    (m.Kill(5, 1, tenant="alice"), "rid", "give either a rid"),
    (m.Kill(5, None, tenant=""), "tenant", "1 to 64"),
    (m.Kill(5, None, tenant="x" * 65), "tenant", "65 characters"),
    (m.Kill(5, None, job=0), "job", r"0 is outside \[1, 9223372036854775807\]"),
    (m.Kill(5, None, model=""), "model", "0 characters, allowed are 1 to 128"),
    (m.Kill(5, None, model="x" * 129), "model", "129 characters"),
    (m.Suspend(5, 1, 3), "pages", r"3 is none of 0 \(keep\), 1 \(swap\), 2 \(drop\)"),
    (m.Suspend(5, 1, -1), "pages", "-1"),
    (m.Fork(5, 1, 0), "count", r"0 is outside \[1, 256\]"),
    (m.Fork(5, 1, 257), "count", "257"),
    (m.Deadline(5, 1, 0.0), "deadline_ms", r"0\.0 is outside \(0, 604800000\]"),
    (m.Deadline(5, 1, -1.0), "deadline_ms", "-1.0"),
    (m.Deadline(5, 1, math.nan), "deadline_ms", "nan"),
    (m.After(5, 1, tuple(range(1, 258))), "after", "257 sequences, the limit is 256"),
    (m.After(5, 1, (3, 0)), "after", r"0 is outside \[1, 9223372036854775807\]"),
    (m.After(5, 1, (3, 4, 3)), "after", "sequence 3 is named twice"),
    (m.Nice(5, 1, -21), "nice", r"-21 is outside \[-20, 19\]"),
    (m.Nice(5, 1, 20), "nice", "20"),
    (m.Nice(5, 1, 2**62), "nice", "4611686018427387904"),
    (m.TenantSet(5, ""), "tenant", "1 to 64"),
    (m.TenantSet(5, "x" * 65), "tenant", "65 characters"),
    (m.TenantSet(5, "a", weight=0.0), "weight", r"0\.0 is outside \(0, 1000\]"),
    (m.TenantSet(5, "a", weight=1000.5), "weight", "1000.5"),
    (m.TenantSet(5, "a", weight=math.nan), "weight", "nan"),
    (m.TenantSet(5, "a", weight=math.inf), "weight", "inf"),
    (m.TenantSet(5, "a", max_pages=-1), "max_pages", r"-1 is outside \[0, 2147483647\]"),
    (m.TenantSet(5, "a", guaranteed_pages=2**31), "guaranteed_pages", "2147483648"),
    (m.TenantSet(5, "a", max_running=-5), "max_running", "-5"),
    (m.TenantSet(5, "a", max_waiting=2**40), "max_waiting", "1099511627776"),
    (m.TenantSet(5, "a", tokens_per_s=-0.5), "tokens_per_s", "-0.5"),
    (m.TenantSet(5, "a", tokens_per_s=math.nan), "tokens_per_s", "nan"),
    (m.TenantSet(5, "a", tokens_per_s=math.inf), "tokens_per_s", "inf"),
]


@pytest.mark.parametrize(("verb", "field", "words"), BAD)
def test_values_out_of_range_name_their_field(verb: Any, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        check_control(verb, is_administrator=True)
    assert caught.value.field == field
    world = Relay()
    world.relay.ask(ROOT, verb, 0.0)
    assert world.refused() == (5, ErrorCode.INVALID_REQUEST, field)
    assert world.asked == []


def test_the_largest_and_smallest_values_pass() -> None:
    most, last = 2**31 - 1, 2**63 - 1
    for verb in (
        m.Fork(5, last, limits.MAX_FORKS),
        m.Deadline(5, 1, None),
        m.Deadline(5, 1, limits.MAX_DEADLINE_MS),
        m.After(5, 1, ()),
        m.After(5, 1, (last, *range(1, limits.MAX_AFTER))),
        m.Kill(5, None, tenant="x" * 64, job=last, model="x" * 128),
        *(m.Suspend(5, 1, pages) for pages in PageFate),
    ):
        check_control(verb, is_administrator=False)
    check_control(m.TenantSet(5, "x" * 64, 1000.0, most, most, most, most, 1e9), is_administrator=True)
    check_control(m.TenantSet(5, "x", 1e-6, 0, 0, 0, 0, 0.0), is_administrator=True)


def test_a_silent_microkernel_fails_what_waits_once() -> None:
    world = Relay()
    world.relay.ask(ALICE, m.StatusGet(5), 0.0)
    world.relay.expire(TIMEOUT_S - 0.1)
    assert world.replies == []
    world.relay.expire(TIMEOUT_S)
    world.relay.ask(ALICE, m.ModelsGet(6), TIMEOUT_S)
    world.relay.answer(m.StatusReply(1, "0", 0.0, (), ()))
    errors = [(a.req, a.code, a.message) for _, a in world.replies if isinstance(a, m.Error)]
    assert errors == [(5, ErrorCode.UNAVAILABLE, "the microkernel is silent")]
    assert len(world.replies) == 1


def test_questions_of_one_client_are_limited() -> None:
    world = Relay(max_open=2)
    for req in (5, 6, 7):
        world.relay.ask(ALICE, m.Stat(req, req), 0.0)
    assert world.refused() == (7, ErrorCode.OVERLOADED, None)
    world.relay.ask(BOB, m.Stat(5, 5), 0.0)
    world.relay.answer(error_message(NotFound("no sequence 5"), 1))
    world.relay.ask(ALICE, m.Stat(8, 8), 0.0)
    assert [message.req for message in world.asked] == [1, 2, 3, 4]  # type: ignore[attr-defined]


# ---------------------------------------------------------------- Wait


def waited(number: int) -> m.Waited:
    return m.Waited(number, 7, FinishReason.STOP, usage(3, 2))


def test_a_wait_may_last() -> None:
    world = Relay()
    world.relay.ask(ALICE, m.Wait(5, 7), 0.0)
    world.relay.expire(1e9)
    assert world.replies == []
    world.relay.answer(waited(1))
    assert world.replies == [(b"alice", m.Waited(5, 7, FinishReason.STOP, usage(3, 2)))]


def test_who_waits_for_the_same_sequence_shares_one_question() -> None:
    world = Relay()
    world.relay.ask(ALICE, m.Wait(5, 7), 0.0)
    world.relay.ask(ALICE, m.Wait(6, 7), 0.0)
    world.relay.ask(Asker(b"alice2", "alice", Role.INSPECT), m.Wait(5, 7), 0.0)
    assert world.asked == [m.Wait(1, 7, "alice")]
    world.relay.ask(BOB, m.Wait(5, 7), 0.0)  # may be told something else
    world.relay.ask(ROOT, m.Wait(5, 7), 0.0)
    world.relay.ask(ALICE, m.Wait(7, 8), 0.0)
    assert world.asked[1:] == [m.Wait(2, 7, "bob"), m.Wait(3, 7, None), m.Wait(4, 8, "alice")]
    world.relay.answer(waited(1))
    world.relay.answer(error_message(NotFound("no sequence 7", field="rid", rid=7), 2))
    assert [(client, answer.req, type(answer)) for client, answer in world.replies] == [  # type: ignore[attr-defined]
        (b"alice", 5, m.Waited),
        (b"alice", 6, m.Waited),
        (b"alice2", 5, m.Waited),
        (b"bob", 5, m.Error),
    ]
    world.relay.ask(ALICE, m.Wait(5, 7), 0.0)  # it is asked anew: the first was answered
    assert world.asked[-1] == m.Wait(5, 7, "alice")


def test_who_left_is_not_told_and_who_comes_joins() -> None:
    world = Relay()
    world.relay.ask(ALICE, m.Wait(5, 7), 0.0)
    world.relay.ask(ALICE, m.Wait(6, 8), 0.0)
    world.relay.on_client_gone(b"alice")
    world.relay.on_client_gone(b"alice")
    world.relay.ask(Asker(b"alice2", "alice", Role.INSPECT), m.Wait(9, 7), 0.0)
    assert world.asked == [m.Wait(1, 7, "alice"), m.Wait(2, 8, "alice")]
    world.relay.answer(waited(1))
    world.relay.answer(m.Waited(2, 8, FinishReason.STOP, usage()))
    assert world.replies == [(b"alice2", m.Waited(9, 7, FinishReason.STOP, usage(3, 2)))]


def test_a_wait_is_cancelled_without_an_answer() -> None:
    world = Relay(max_open=1)
    world.relay.ask(ALICE, m.Wait(5, 7), 0.0)
    world.relay.cancel(b"alice", 5)
    world.relay.cancel(b"alice", 5)
    world.relay.cancel(b"bob", 5)
    world.relay.ask(ALICE, m.Wait(6, 7), 0.0)
    world.relay.answer(waited(1))
    assert world.replies == [(b"alice", m.Waited(6, 7, FinishReason.STOP, usage(3, 2)))]


def test_waits_of_one_client_are_limited() -> None:
    world = Relay(max_open=2)
    for req in (5, 6, 7):
        world.relay.ask(ALICE, m.Wait(req, req), 0.0)
    assert world.refused() == (7, ErrorCode.OVERLOADED, None)
    world.relay.ask(ALICE, m.Kill(8, 5), 0.0)  # counts apart
    world.relay.ask(BOB, m.Wait(5, 7), 0.0)
    assert [type(message) for message in world.asked] == [m.Wait, m.Wait, m.Kill, m.Wait]
    world.relay.answer(waited(1))
    world.relay.ask(ALICE, m.Wait(9, 9), 0.0)
    assert world.asked[-1] == m.Wait(5, 9, "alice")


def test_a_number_under_which_the_client_waits_is_refused() -> None:
    world = Relay()
    world.relay.ask(ALICE, m.Wait(5, 7), 0.0)
    world.relay.ask(ALICE, m.Wait(5, 8), 0.0)
    assert world.refused() == (5, ErrorCode.INVALID_REQUEST, "req")
    world.relay.answer(waited(1))
    assert world.replies[-1] == (b"alice", m.Waited(5, 7, FinishReason.STOP, usage(3, 2)))


# ---------------------------------------------------------------- a microkernel that dies


def lose(world: Relay, now: float = 1.0) -> list[m.Message]:
    """It dies and another one comes; returns what that one is asked."""
    world.up = False
    world.relay.on_kernel_down(now)
    world.up = True
    before = len(world.asked)
    world.relay.on_kernel_up(now)
    return world.asked[before:]


REPEATED = [verb for verb in VERBS if not isinstance(verb, m.Fork)]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: type(verb).__name__)
def test_what_is_asked_while_it_is_away_is_asked_when_it_is_back(verb: Any) -> None:
    world = Relay()
    world.up = False
    world.relay.on_kernel_down(0.0)
    world.relay.ask(ROOT, verb, 0.0)
    assert (world.asked, world.replies) == ([], [])
    assert lose(world, 0.0) == [named(verb, None)]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: type(verb).__name__)
def test_what_is_asked_while_it_is_away_does_not_wait_for_ever(verb: Any) -> None:
    world = Relay()
    world.up = False
    world.relay.on_kernel_down(0.0)
    world.relay.ask(ROOT, verb, 5.0)
    limit = 5.0 + (PATIENCE_S if isinstance(verb, m.Wait) else RECOVERY_S)
    world.relay.expire(limit - 0.1)
    assert world.replies == []
    world.relay.expire(limit)
    assert world.refused() == (5, ErrorCode.UNAVAILABLE, None)
    assert lose(world, limit) == []


@pytest.mark.parametrize("verb", REPEATED, ids=lambda verb: type(verb).__name__)
def test_what_it_did_not_answer_its_successors_are_asked_again(verb: Any) -> None:
    world = Relay()
    world.relay.ask(ROOT, verb, 1.0)
    assert lose(world) == lose(world) == [named(verb, None)]
    world.relay.answer(m.Error(1, ErrorCode.OVERLOADED, "later"))
    assert world.replies == [(b"root", m.Error(5, ErrorCode.OVERLOADED, "later"))]
    assert lose(world) == []


@pytest.mark.parametrize("verb", REPEATED, ids=lambda verb: type(verb).__name__)
def test_losses_do_not_keep_a_question_for_ever(verb: Any) -> None:
    if isinstance(verb, m.Wait):
        return  # may last
    world = Relay()
    world.relay.ask(ROOT, verb, 0.0)
    for now in range(1, int(RECOVERY_S)):
        assert len(lose(world, now)) == 1
        world.relay.expire(now)
    assert world.replies == []
    world.relay.expire(RECOVERY_S)
    assert world.refused() == (5, ErrorCode.UNAVAILABLE, None)


def test_a_fork_may_have_happened() -> None:
    world = Relay()
    world.relay.ask(ALICE, m.Fork(5, 7, 2), 0.0)
    assert lose(world) == []
    assert world.refused() == (5, ErrorCode.UNAVAILABLE, None)
    ((_, error),) = world.replies
    assert isinstance(error, m.Error)
    assert (error.rid, "not known whether" in error.message) == (7, True)
    world.relay.answer(m.Forked(1, (8, 9)))
    assert len(world.replies) == 1


def test_the_microkernel_that_was_to_be_restarted_has_been() -> None:
    world = Relay()
    world.relay.ask(ROOT, m.RestartService(5, "microkernel"), 0.0)
    assert lose(world) == []
    assert world.replies == [(b"root", m.Done(5, 0))]


def test_a_deadline_counts_from_when_it_was_set() -> None:
    world = Relay()
    world.relay.ask(ALICE, m.Deadline(5, 7, 3000.0), 1.0)
    for now, left in ((2.0, 2000.0), (2.5, 1500.0), (9.0, 0.001)):
        assert lose(world, now) == [m.Deadline(1, 7, left, "alice")]
    world.relay.ask(ALICE, m.Deadline(6, 7, None), 1.0)
    assert lose(world, 9.0)[1:] == [m.Deadline(2, 7, None, "alice")]


ENDERS = [(m.Kill(5, 7), m.Killed(5, (7,)), FinishReason.KILLED), (m.Close(5, 7), m.Done(5, 7), FinishReason.CLOSED)]
HAS_ENDED = m.Error(1, ErrorCode.WRONG_STATE, "sequence 7 has ended", "rid", 7)


@pytest.mark.parametrize(("verb", "done", "reason"), ENDERS)
def test_a_sequence_that_was_ended_the_first_time(verb: Any, done: m.Message, reason: FinishReason) -> None:
    for happened, answer in (
        (reason, done),
        (FinishReason.LENGTH, msgspec.structs.replace(HAS_ENDED, req=5)),  # before the verb came
        (None, msgspec.structs.replace(HAS_ENDED, req=5)),
    ):
        world = Relay()
        world.relay.ask(ALICE, verb, 0.0)
        for _ in range(2):
            assert lose(world) == [named(verb, "alice")]
            world.relay.answer(HAS_ENDED)
            assert world.asked[-1] == m.Stat(1, 7, "alice")
        assert world.replies == []
        stats = m.Stats(1, ROW, m.JobRow(7, 1, 0, 0, 0), 0, None, (), 0, None, happened or 0, usage())
        world.relay.answer(stats if happened else error_message(NotFound("no sequence 7"), 1))
        assert world.replies == [(b"alice", answer)]


@pytest.mark.parametrize(("verb", "done", "reason"), ENDERS)
def test_a_sequence_that_had_ended_when_it_was_asked_once(verb: Any, done: m.Message, reason: FinishReason) -> None:
    world = Relay()
    world.relay.ask(ALICE, verb, 0.0)
    world.relay.answer(HAS_ENDED)
    assert world.replies == [(b"alice", msgspec.structs.replace(HAS_ENDED, req=5))]
    world.relay.ask(ALICE, m.Kill(6, None, tenant="alice"), 0.0)
    lose(world)
    world.relay.answer(m.Error(2, ErrorCode.WRONG_STATE, "whatever"))
    assert world.replies[1:] == [(b"alice", m.Error(6, ErrorCode.WRONG_STATE, "whatever"))]


def test_those_who_wait_are_told_by_the_next_one() -> None:
    world = Relay()
    world.relay.ask(ALICE, m.Wait(5, 7), 0.0)
    world.relay.ask(BOB, m.Wait(5, 7), 0.0)
    world.relay.ask(ALICE, m.Wait(6, 7), 0.0)
    world.relay.ask(BOB, m.Wait(6, 8), 0.0)
    world.relay.cancel(b"bob", 6)  # nobody waits for that one any more
    assert lose(world) == [m.Wait(1, 7, "alice"), m.Wait(2, 7, "bob")]
    world.relay.expire(1e9)
    world.relay.answer(waited(1))
    assert [(client, answer.req) for client, answer in world.replies] == [(b"alice", 5), (b"alice", 6)]  # type: ignore[attr-defined]
    world.relay.ask(BOB, m.Wait(7, 8), 0.0)
    assert world.asked[-1] == m.Wait(4, 8, "bob")


def test_owner_names() -> None:
    assert owner_name(0) == "root"
    assert owner_name(987_654) == "uid:987654"
    assert owner_name(None) == "unknown"
    assert is_administrator(0)
    assert not is_administrator(987_654)
    assert not is_administrator(None)
