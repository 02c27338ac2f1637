"""What the supervisor is asked for and asks for: services to be renewed, and no new work before the daemon stops."""

from __future__ import annotations

import pytest
from kernel_world import CONTROL, GATEWAY, SUPERVISOR, VOCAB, World, params

from llmos.codes import ErrorCode, FinishReason, PageFate, ServiceState
from llmos.microkernel.sender import Sender
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32

NAMES = ("gateway", "executor.demo", "microkernel")


def make_world(**options: object) -> World:
    world = World(**options)
    world.start_executor()
    return world


def report(world: World) -> None:
    services = tuple(m.ServiceStatus(name, int(ServiceState.RUNNING), 7, 0, 0.0, "") for name in NAMES)
    world.send(SUPERVISOR, m.ServiceReport(services))


def drain(world: World) -> m.Draining:
    count = len(world.replies)
    world.send(SUPERVISOR, m.Drain())
    (answer,) = world.replies[count:]
    assert isinstance(answer, m.Draining)
    return answer


def error(world: World, message: m.Message, sender: Sender = CONTROL) -> m.Error:
    answer = world.ask(message, sender)
    assert isinstance(answer, m.Error)
    return answer


def test_a_restart_is_answered_and_handed_to_the_supervisor():
    world = make_world()
    assert world.kernel.greet(SUPERVISOR, 0.0) == []
    report(world)
    request = m.RestartService(9, "executor.demo")
    sends = world.kernel.handle(CONTROL, request, 0.0)
    assert [(send.peer, send.message) for send in sends] == [(CONTROL.peer, m.Done(9, 0)), (SUPERVISOR.peer, request)]


def test_an_unknown_service_is_refused_with_the_names_there_are():
    world = make_world()
    assert error(world, m.RestartService(1, "gateway")).code == ErrorCode.UNAVAILABLE  # no supervisor yet
    world.kernel.greet(SUPERVISOR, 0.0)
    assert error(world, m.RestartService(2, "gateway")).code == ErrorCode.UNAVAILABLE  # nor what it has
    report(world)
    answer = error(world, m.RestartService(3, "nobody" + "x" * 1000))
    assert (answer.code, answer.field) == (ErrorCode.NOT_FOUND, "name")
    assert answer.message.endswith("there are: executor.demo, gateway, microkernel")
    assert len(answer.message) < 200


@pytest.mark.parametrize("role", ["executor", "storage"])
def test_only_people_ask_for_restarts_and_only_the_supervisor_drains(role: str):
    world = make_world()
    for sender, message in [
        (Sender(9, role, role), m.RestartService(1, "gateway")),
        (Sender(9, role, role), m.Drain()),
        (GATEWAY, m.Drain()),
    ]:
        (send,) = world.kernel.handle(sender, message, 0.0)
        assert isinstance(send.message, m.Error)
        assert send.message.code == ErrorCode.PERMISSION
    world.submit([1], max_tokens=1)  # none of that had an effect


def test_while_it_drains_nothing_new_is_taken_and_what_runs_ends():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=10, seed=1)
    opened = world.spawn([1, 2])
    world.step()
    assert drain(world).generating == 1
    refused = [
        (m.SeqSubmit(90, "demo", pack_i32([1]), params(max_tokens=1), "alice"), GATEWAY),
        (m.SeqSpawn(91, "demo", pack_i32([1]), "alice"), GATEWAY),
        (m.SeqAppend(92, opened, "demo", pack_i32([1])), GATEWAY),
        (m.SeqContinue(93, opened, "demo", params(max_tokens=1)), GATEWAY),
        (m.Fork(94, rid), CONTROL),
    ]
    for message, sender in refused:
        answer = error(world, message, sender)
        assert (answer.code, answer.message) == (ErrorCode.UNAVAILABLE, "llmosd is stopping and takes no new work")
    world.run()
    stream = world.streams[rid]
    assert stream.ids == stream.expected(10)
    ended_at = world.now
    world.now += 0.25
    assert drain(world) == m.Draining(0, pytest.approx((world.now - ended_at) * 1e3))


def test_only_what_gets_on_counts():
    world = make_world()
    first = world.submit([1, 2, 3], max_tokens=50)
    suspended = world.submit([4, 5, 6], max_tokens=50)
    world.submit([7, 8, 9], max_tokens=50, after=(first,))
    world.spawn([1, 2])  # rests
    world.step()
    assert drain(world).generating == 2
    world.ask(m.Suspend(80, suspended, PageFate.KEEP))
    assert drain(world).generating == 1
    world.run()
    assert world.streams[first].end is not None
    assert drain(world).generating == 0


def test_restarts_that_were_asked_for_convict_nobody():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=10, seed=1)
    for _ in range(5):  # alone in flight each time, without a token between
        assert world.executor is not None
        assert world.executor.inbox
        world.executor = None
        world.send(SUPERVISOR, m.ServiceDown("executor", "executor.demo", 1, replaced=True, asked=True))
        world.start_executor()
    world.run()
    stream = world.streams[rid]
    assert stream.end is not None
    assert stream.end.reason == FinishReason.LENGTH
    assert stream.ids == stream.expected(10)


def test_a_death_that_is_told_late_does_not_cost_the_next_process_its_place():
    """Executor and microkernel died together: the next executor is here before the next microkernel hears of the death."""
    world = World()
    executor = Sender(50, "executor", "executor.demo", 4711)
    ready = m.ExecutorReady("demo", 64, 4, 8, 32, 4096, VOCAB, "float32", "fake", 0, 1.0)
    world.executor_peer = executor.peer
    world.send(executor, ready)
    storage = Sender(51, "storage", "storage", 4712)
    world._deliver(world.kernel.greet(storage, world.now))
    world.send(SUPERVISOR, m.ServiceDown("executor", "executor.demo", 4000, replaced=True))
    world.send(SUPERVISOR, m.ServiceDown("storage", "storage", 4001, replaced=True))
    state = world.kernel.state
    assert (state.lanes["demo"].executor, state.storage) == (executor.peer, storage.peer)
    world.send(SUPERVISOR, m.ServiceDown("executor", "executor.demo", 4711, replaced=True))
    world.send(SUPERVISOR, m.ServiceDown("storage", "storage", 4712, replaced=True))
    assert (state.lanes["demo"].executor, state.storage) == (None, 0)
