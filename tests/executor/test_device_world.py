"""The real microkernel over the CUDA backend on the CPU, two steps ahead, with too few and poisoned pages: transformers' streams."""

from __future__ import annotations

import pytest
from cpu_reference import generate, prompt, saved_model
from device_reference import DeviceWorld
from kernel_world import CONTROL

from llmos.codes import FinishReason
from llmos.protocol import messages as m
from llmos.services.executor.cuda.kv_pool import POISON_VARIABLE

pytestmark = pytest.mark.slow

NEW_TOKENS = 20


def until_stop(tokens: list[int], stops: tuple[int, ...]) -> list[int]:
    """A greedy output as it is when these tokens end it."""
    for index, token in enumerate(tokens):
        if token in stops:
            return tokens[: index + 1]
    return tokens


@pytest.mark.parametrize("host_pages", [0, 24])
def test_a_crowd_on_few_pages(host_pages, monkeypatch):
    monkeypatch.setenv(POISON_VARIABLE, "1")
    model, directory = saved_model("llama-tied")
    world = DeviceWorld(
        directory, num_pages=17, host_pages=host_pages, max_rows=6, max_step_tokens=40, prefix_cache=True
    )
    lengths = (30, 9, 30, 14, 21, 45, 3)
    stops = (generate(model, prompt(14), NEW_TOKENS)[14 + 7], 11)
    rids = [
        world.submit(prompt(length), max_tokens=NEW_TOKENS, stop_token_ids=stops if i % 2 else ())
        for i, length in enumerate(lengths)
    ]
    for _ in range(4):
        world.step()
    forks = world.fork(rids[1], 2)
    for rid in forks:
        world.attach(rid)
    late = world.submit([*prompt(30), *prompt(4)], max_tokens=5)
    world.run()
    status = world.kernel.state.lanes["demo"].status()
    assert status.preemptions > 0, "the test is about a full pool"
    assert (status.swaps_out > 0) == bool(host_pages)
    assert world.executor.most_ahead == 2
    for index, (rid, length) in enumerate(zip(rids, lengths)):
        expected = generate(model, prompt(length), NEW_TOKENS)[length:]
        assert world.streams[rid].ids == (until_stop(expected, stops) if index % 2 else expected)
        assert world.streams[rid].end is not None
    assert world.streams[rids[3]].end.reason == FinishReason.STOP
    for rid in forks:
        assert world.streams[rid].ids == world.streams[rids[1]].ids
    assert world.streams[late].ids == generate(model, [*prompt(30), *prompt(4)], 5)[34:]


def test_a_new_generation_begins_with_steps_in_flight():
    model, directory = saved_model("llama-tied")
    world = DeviceWorld(directory)
    rid = world.submit(prompt(20), max_tokens=NEW_TOKENS)
    for _ in range(5):
        world.step()
    assert world.executor.inbox
    world.start_executor()
    world.run()
    assert world.streams[rid].ids == generate(model, prompt(20), NEW_TOKENS)[20:]


def test_suspended_in_the_middle_and_killed(monkeypatch):
    monkeypatch.setenv(POISON_VARIABLE, "1")
    model, directory = saved_model("llama-tied")
    world = DeviceWorld(directory)
    rid, other = (world.submit(prompt(length), max_tokens=NEW_TOKENS) for length in (20, 12))
    for _ in range(5):
        world.step()
    world.ask(m.Suspend(100, rid))
    world.ask(m.Kill(101, other), CONTROL)
    for _ in range(3):
        world.step()
    world.ask(m.Resume(102, rid))
    world.run()
    assert world.streams[rid].ids == generate(model, prompt(20), NEW_TOKENS)[20:]
    assert world.streams[other].end.reason == FinishReason.KILLED
