"""The relay of the control verbs: numbers, owners, rights, failures."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from gateway_world import explained, tenant_row

from llmos.codes import ErrorCode
from llmos.errors import InvalidRequest, NotFound, PermissionRefused, Unavailable
from llmos.ports.core import error_message
from llmos.protocol import messages as m
from llmos.services.gateway.control import TIMEOUT_S, Asker, ControlRelay
from llmos.services.gateway.owners import is_administrator, owner_name
from llmos.services.gateway.validate import check_control

ALICE = Asker(b"alice", "alice", is_administrator=False)
ROOT = Asker(b"root", "root", is_administrator=True)
VERBS = [
    m.PsGet(5, "mallory"),
    m.Kill(5, 1, "mallory"),
    m.StatusGet(5),
    m.ModelsGet(5),
    m.Nice(5, 1, 3, "mallory"),
    m.Suspend(5, 1, False, "mallory"),
    m.Resume(5, 1, "mallory"),
    m.Explain(5, 1, "mallory"),
    m.TenantsGet(5, "mallory"),
    m.TenantSet(5, "alice", weight=3.0),
]
ANSWERS = [
    m.PsReply(1, ()),
    m.Killed(1, 9),
    m.StatusReply(1, "0", 0.0, (), ()),
    m.ModelsReply(1, ()),
    m.Done(1, 9),
    explained(9, req=1),
    m.TenantsReply(1, (tenant_row("alice"),)),
    m.Error(1, ErrorCode.OVERLOADED, "later", "rid", 9),
]


class Relay:
    def __init__(self) -> None:
        self.up = True
        self.asked: list[m.Message] = []
        self.replies: list[tuple[bytes, m.Message]] = []
        self.relay = ControlRelay(self._send, lambda client, message: self.replies.append((client, message)))

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


@pytest.mark.parametrize("verb", VERBS[:-1], ids=lambda verb: type(verb).__name__)
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
    world.relay.answer(m.Killed(2, 4))
    world.relay.answer(error_message(NotFound("no sequence 3", field="rid", rid=3), 1))
    assert world.replies == [
        (b"root", m.Killed(7, 4)),
        (b"alice", m.Error(7, ErrorCode.NOT_FOUND, "no sequence 3", "rid", 3)),
    ]


@pytest.mark.parametrize(
    ("verb", "field"),
    [(m.Nice(5, 1, -1), "nice"), (m.Nice(5, 1, -20), "nice"), (m.TenantSet(5, "alice", weight=2.0), "tenant")],
)
def test_what_only_administrators_may(verb: Any, field: str) -> None:
    world = Relay()
    world.relay.ask(ALICE, verb, 0.0)
    assert world.refused() == (5, ErrorCode.PERMISSION, field)
    assert world.asked == []
    with pytest.raises(PermissionRefused, match="administrators only"):
        check_control(verb, is_administrator=False)
    check_control(verb, is_administrator=True)


@pytest.mark.parametrize("nice", [0, 19])
def test_everybody_may_give_way(nice: int) -> None:
    check_control(m.Nice(5, 1, nice), is_administrator=False)


BAD: list[tuple[m.Message, str, str]] = [
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
    most = 2**31 - 1
    check_control(m.TenantSet(5, "x" * 64, 1000.0, most, most, most, most, 1e9), is_administrator=True)
    check_control(m.TenantSet(5, "x", 1e-6, 0, 0, 0, 0, 0.0), is_administrator=True)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: type(verb).__name__)
def test_without_a_microkernel_everything_is_unavailable(verb: Any) -> None:
    world = Relay()
    world.up = False
    world.relay.ask(ROOT, verb, 0.0)
    assert world.refused() == (5, ErrorCode.UNAVAILABLE, None)


def test_a_lost_or_silent_microkernel_fails_what_waits_once() -> None:
    world = Relay()
    world.relay.ask(ALICE, m.StatusGet(5), 0.0)
    world.relay.expire(TIMEOUT_S - 0.1)
    assert world.replies == []
    world.relay.expire(TIMEOUT_S)
    world.relay.ask(ALICE, m.ModelsGet(6), TIMEOUT_S)
    world.relay.fail_all(Unavailable("gone"))
    world.relay.answer(m.StatusReply(1, "0", 0.0, (), ()))
    codes = [(a.req, a.code) for _, a in world.replies if isinstance(a, m.Error)]
    assert codes == [(5, ErrorCode.UNAVAILABLE), (6, ErrorCode.UNAVAILABLE)]
    assert len(world.replies) == 2


def test_owner_names() -> None:
    assert owner_name(0) == "root"
    assert owner_name(987_654) == "uid:987654"
    assert owner_name(None) == "unknown"
    assert is_administrator(0)
    assert not is_administrator(987_654)
    assert not is_administrator(None)
