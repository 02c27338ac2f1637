"""The relay of ps, kill, status and models: numbers, filter, failures."""

from __future__ import annotations

import pytest

from llmos.codes import ErrorCode
from llmos.errors import NotFound, Unavailable
from llmos.ports.core import error_message
from llmos.protocol import messages as m
from llmos.services.gateway.control import TIMEOUT_S, Asker, ControlRelay
from llmos.services.gateway.owners import is_administrator, owner_name

ALICE = Asker(b"alice", "alice", is_administrator=False)
ROOT = Asker(b"root", "root", is_administrator=True)


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


def row(rid: int, owner: str) -> m.SeqRow:
    return m.SeqRow(rid, owner, "echo", 2, 5, 6, 7, 1, 0, 0, 100.0, 9.5)


ROWS = (row(1, "alice"), row(2, "bob"), row(3, "alice"))


def test_ps_shows_only_ones_own() -> None:
    world = Relay()
    world.relay.ask(ALICE, m.PsGet(7), 0.0)
    world.relay.ask(ROOT, m.PsGet(7), 0.0)
    assert world.asked == [m.PsGet(1), m.PsGet(2)]
    world.relay.answer(m.PsReply(2, ROWS))
    world.relay.answer(m.PsReply(1, ROWS))
    assert world.replies == [(b"root", m.PsReply(7, ROWS)), (b"alice", m.PsReply(7, (ROWS[0], ROWS[2])))]


def test_kill_of_ones_own_is_looked_up_first() -> None:
    world = Relay()
    world.relay.ask(ALICE, m.Kill(8, 3), 0.0)
    world.relay.answer(m.PsReply(1, ROWS))
    assert world.asked == [m.PsGet(1), m.Kill(2, 3)]
    world.relay.answer(m.Killed(2, 3))
    assert world.replies == [(b"alice", m.Killed(8, 3))]


def test_a_foreign_sequence_answers_like_an_unknown_one() -> None:
    answers = []
    for rid in (2, 99):
        world = Relay()
        world.relay.ask(ALICE, m.Kill(8, rid), 0.0)
        world.relay.answer(m.PsReply(1, ROWS))
        assert world.asked == [m.PsGet(1)]
        ((_, answer),) = world.replies
        assert isinstance(answer, m.Error)
        answers.append((answer.req, answer.code, answer.field, answer.message.replace(str(rid), "N")))
    assert answers[0] == answers[1] == (8, ErrorCode.NOT_FOUND, "rid", "no sequence N")


def test_a_sequence_that_ended_meanwhile_answers_the_same() -> None:
    world = Relay()
    world.relay.ask(ALICE, m.Kill(8, 1), 0.0)
    world.relay.answer(m.PsReply(1, ROWS))
    world.relay.answer(error_message(NotFound("no such sequence here"), 2))
    assert world.replies == [(b"alice", m.Error(8, ErrorCode.NOT_FOUND, "no sequence 1", "rid", 1))]


def test_administrators_kill_directly() -> None:
    world = Relay()
    world.relay.ask(ROOT, m.Kill(8, 2), 0.0)
    assert world.asked == [m.Kill(1, 2)]


@pytest.mark.parametrize("request_", [m.PsGet(5), m.Kill(5, 1), m.StatusGet(5), m.ModelsGet(5)])
def test_without_a_microkernel_everything_is_unavailable(request_: m.PsGet) -> None:
    world = Relay()
    world.up = False
    world.relay.ask(ALICE, request_, 0.0)
    ((client, answer),) = world.replies
    assert client == b"alice"
    assert isinstance(answer, m.Error)
    assert (answer.req, answer.code) == (5, ErrorCode.UNAVAILABLE)


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
