"""While the microkernel is known to be overloaded the gateway refuses by itself."""

from __future__ import annotations

import pytest
from router_world import World

from llmos.codes import ErrorCode
from llmos.errors import Overloaded
from llmos.protocol import messages as m
from llmos.protocol.params import SamplingParams
from llmos.services.gateway.overload import TRUSTED_S, Overload

ERROR = Overloaded("full", retry_after_s=2.0)


def test_it_holds_for_a_moment_for_that_model_and_tenant() -> None:
    overload = Overload()
    overload.check("m", "a", 0.0)
    overload.note("m", "a", ERROR, 0.0)
    with pytest.raises(Overloaded) as caught:
        overload.check("m", "a", 0.9 * TRUSTED_S)
    assert caught.value.retry_after_s == 2.0
    for model, tenant, now in (("n", "a", 0.0), ("m", "b", 0.0), ("m", "a", TRUSTED_S)):
        overload.check(model, tenant, now)


def full_world() -> World:
    world = World()
    world.generate(req=1)
    submit = world.kernel[-1]
    assert isinstance(submit, m.SeqSubmit)
    world.from_kernel(m.Error(submit.req, ErrorCode.OVERLOADED, "queue is full", None, None, 2000.0))
    return world


@pytest.mark.parametrize("model", [None, "echo"])
def test_a_crowd_is_refused_without_asking(model: str | None) -> None:
    world = full_world()
    asked = len(world.kernel)
    world.generate(req=2, model=model, client_request_id="mine")
    world.generate(req=3, model=model, text="a prompt that is not even encoded", token_ids=None)
    assert len(world.kernel) == asked
    assert world.text == []
    assert world.listener.sent[b"a"][-1] == m.Error(3, ErrorCode.OVERLOADED, "queue is full", None, None, 2000.0)
    assert world.errors(b"a") == [(req, ErrorCode.OVERLOADED) for req in (1, 2, 3)]
    world.now = TRUSTED_S
    world.generate(req=4)
    assert len(world.kernel) == asked + 1


def test_what_may_have_been_accepted_before_is_asked_for() -> None:
    world = full_world()
    asked = len(world.kernel)
    world.generate(req=2, client_request_id="mine", again=True)
    assert isinstance(world.kernel[asked], m.SeqSubmit)


def test_another_tenant_is_not_concerned() -> None:
    world = full_world()
    world.client(b"b", m.Generate(1, None, "x", None, None, SamplingParams(max_tokens=5)), 0.0, 1234)
    assert len(world.text) == 1
