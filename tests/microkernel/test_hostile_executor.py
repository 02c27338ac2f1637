"""An executor that hangs, or lies: the microkernel has it killed, and what it did counts for nothing."""

from __future__ import annotations

import pytest
from kernel_world import GATEWAY, SUPERVISOR, World

from llmos.codes import ErrorCode
from llmos.microkernel.sender import Sender
from llmos.microkernel.step_watch import StepWatch
from llmos.protocol import limits
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32

EXECUTOR = Sender(101, "executor", "executor.demo")  # the first of a `World`


def make_world(*, supervised: bool = True) -> World:
    world = World()
    world.start_executor()
    if supervised:
        world._deliver(world.kernel.greet(SUPERVISOR, world.now))
    return world


def wait(world: World, seconds: float) -> None:
    """Time passes, and the microkernel's loop turns as it does when nothing happens."""
    end = world.now + seconds
    while world.now < end:
        world.now += 0.1
        world._deliver(world.kernel.tick(world.now))


def kills(world: World) -> list[m.KillService]:
    return [reply for reply in world.replies if isinstance(reply, m.KillService)]


def lie(world: World, number: int = 1) -> None:
    for _ in range(number):
        world.send(EXECUTOR, m.StepResult(world.executor.generation, 10**6, b"", (), b"", 10, 0))


def replace_executor(world: World) -> None:
    world.executor = None
    world.send(SUPERVISOR, m.ServiceDown("executor", "executor.demo", 1, replaced=True))
    world.start_executor()


def test_an_endless_step_ends_with_its_executor_and_the_stream_goes_on():
    world = make_world()
    rid = world.submit([1, 2, 3], max_tokens=40)
    for _ in range(20):
        world.step()
    got = len(world.streams[rid].ids)
    assert 0 < got < 40
    wait(world, 1.9)
    assert kills(world) == []
    late = world.executor
    wait(world, 0.3)
    (kill,) = kills(world)
    assert kill.name == "executor.demo"
    assert kill.reason.endswith("(1 decodes, 0 prompt tokens) takes over 2.0 s")
    dropped = world.kernel.state.lanes["demo"].results_dropped
    world.send(EXECUTOR, late.run_one())  # it was only slow: too late
    assert world.kernel.state.lanes["demo"].results_dropped == dropped + 1
    assert len(world.streams[rid].ids) == got
    wait(world, 5.0)
    assert len(kills(world)) == 2  # in case that nobody heard
    replace_executor(world)
    world.run()
    assert len(world.streams[rid].ids) == 40
    wait(world, 10.0)
    assert len(kills(world)) == 2


def test_a_microkernel_that_slept_blames_nobody():
    world = make_world()
    world.submit([1, 2, 3], max_tokens=40)
    for _ in range(20):
        world.step()
    wait(world, 1.0)
    world.now += 3600.0
    wait(world, 1.9)
    assert kills(world) == []
    wait(world, 0.3)
    assert len(kills(world)) == 1


def test_an_idle_executor_is_never_late():
    world = make_world()
    world.submit([1, 2, 3], max_tokens=4)
    world.run()
    wait(world, 1000.0)
    assert kills(world) == []


def test_without_a_supervisor_nobody_can_be_killed():
    world = make_world(supervised=False)
    rid = world.submit([1, 2, 3], max_tokens=4)
    lie(world, 5)
    wait(world, 1000.0)
    assert kills(world) == []
    world.run()
    assert len(world.streams[rid].ids) == 4


def test_three_wrong_answers_within_ten_seconds():
    world = make_world()
    world.submit([1, 2, 3], max_tokens=40)
    lie(world, 2)
    wait(world, 10.1)
    lie(world, 2)
    assert kills(world) == []
    lie(world)
    assert [kill.reason for kill in kills(world)] == ["its results are wrong, again and again"]
    plans = len(world.plans)
    wait(world, 3.0)
    assert len(world.plans) == plans  # it is given nothing more


@pytest.mark.parametrize("blob", [b"12345", pack_i32([0, 10**6, 5]), pack_i32([0, 3, -1]), pack_i32([10**6, 3, 5])])
def test_what_counts_as_wrong(blob: bytes):
    world = make_world()
    world.submit([1, 2, 3], max_tokens=40)
    for _ in range(3):
        plan = world.plans[-1]
        world.send(EXECUTOR, m.StepResult(plan.generation, plan.step, blob, (), b"", 10, 0))
    assert len(kills(world)) == 1
    world.kernel.check()


def test_one_that_registers_again_and_again():
    world = make_world()
    ready = m.ExecutorReady("demo", 64, 4, 8, 64, 200, 1000, "none", "fake")
    for _ in range(3):
        world.send(EXECUTOR, ready)
    assert [kill.reason for kill in kills(world)] == ["it registers again and again"]
    world.send(EXECUTOR, ready)
    assert world.replies[-1].code == ErrorCode.UNAVAILABLE
    replace_executor(world)
    world.submit([1, 2, 3], max_tokens=4)
    world.run()


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"model": "other"}, ErrorCode.NOT_FOUND, "model"),
        ({"num_pages": limits.MAX_KV_PAGES + 1}, ErrorCode.INVALID_REQUEST, "num_pages"),
        ({"num_pages": 0}, ErrorCode.INVALID_REQUEST, "num_pages"),
        ({"page_size": limits.MAX_PAGE_SIZE + 1}, ErrorCode.INVALID_REQUEST, "page_size"),
        ({"host_pages": limits.MAX_KV_PAGES + 1}, ErrorCode.INVALID_REQUEST, "host_pages"),
        ({"host_pages": -1}, ErrorCode.INVALID_REQUEST, "host_pages"),
        ({"max_context": 2**63}, ErrorCode.INVALID_REQUEST, "max_context"),
        ({"vocab_size": 0}, ErrorCode.INVALID_REQUEST, "vocab_size"),
        ({"swap_us": float("nan")}, ErrorCode.INVALID_REQUEST, "swap_us"),
        ({"dtype": "x" * 129}, ErrorCode.INVALID_REQUEST, "dtype"),
    ],
)
def test_what_an_executor_may_claim(changes: dict[str, object], code: int, field: str):
    world = make_world()
    fields = {
        "model": "demo", "num_pages": 64, "page_size": 4, "max_rows": 8, "max_step_tokens": 64, "max_context": 200,
        "vocab_size": 1000, "dtype": "none", "device": "fake",
    }  # fmt: skip
    world.send(EXECUTOR, m.ExecutorReady(**(fields | changes)))
    assert (world.replies[-1].code, world.replies[-1].field) == (code, field)


def test_an_executor_serves_its_own_model_only():
    world = make_world()
    ready = m.ExecutorReady("demo", 64, 4, 8, 64, 200, 1000, "none", "fake")
    world.send(Sender(7, "executor", "executor.other"), ready)
    assert (world.replies[-1].code, world.replies[-1].field) == (ErrorCode.PERMISSION, "model")
    world.send(GATEWAY, ready)
    assert world.replies[-1].code == ErrorCode.PERMISSION


def test_how_long_a_step_may_take():
    watch = StepWatch()
    assert watch.limit(1, 0) == 300.0  # nothing is known: the first one may compile
    watch.begun(0.0)
    watch.done(8, 0, 0.01)
    assert watch.limit(8, 0) == 2.0
    watch.done(8, 0, 0.51)
    assert watch.limit(8, 0) == pytest.approx(10.0)
    assert watch.limit(0, 256) == 30.0  # never seen, and larger
    assert watch.limit(0, 2048) == pytest.approx(120.5)
    for _ in range(300):
        watch.begun(0.0)
        watch.done(8, 0, 0.01)
    assert watch.limit(8, 0) == 2.0  # one slow step is forgotten
    watch.begun(0.0)
    watch.done(0, 2048, 40.0)
    assert watch.limit(0, 2048) == 120.0  # a long step that is always long is legal


def test_results_of_an_earlier_life_are_nobodys_fault():
    world = make_world()
    world.submit([1, 2, 3], max_tokens=40)
    for _ in range(9):
        world.send(EXECUTOR, m.StepResult(world.executor.generation - 1, 1, b"", (), b"", 10, 0))
    wait(world, 1.0)
    assert kills(world) == []
    assert world.kernel.state.lanes["demo"].results_dropped == 9
    lie(world, 3)
    wait(world, 0.2)
    assert len(kills(world)) == 1
