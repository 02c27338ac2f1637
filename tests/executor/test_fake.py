"""The fake backend: documented tokens, the same plans as the real one, and no torch in its process."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from plan_driver import PlanDriver

from llmos.codes import FinishReason
from llmos.config import ModelConfig
from llmos.errors import ConfigError, ModelError
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import RowAdd, StepPlan
from llmos.protocol.params import SamplingParams
from llmos.services.executor.backend import Limits, StepOutput
from llmos.services.executor.fake import FakeBackend, fake_token


def make_fake(**changes) -> FakeBackend:
    return FakeBackend(
        Limits(8, 128), **{"vocab_size": 500, "max_context": 256, "num_pages": 64, "page_size": 4} | changes
    )


def test_tokens_are_the_documented_function_however_they_are_batched():
    driver = PlanDriver(make_fake(), chunk=5)
    seqs = [driver.add(range(length), 20, seed=length) for length in (3, 11, 30)]
    for _ in range(12):
        driver.step()
    driver.release(seqs[0])  # preempted
    driver.run()
    for seq in seqs:
        expected = [fake_token(seq.params.seed, len(seq.prompt) + i, 500) for i in range(20)]
        assert seq.output == expected


def test_fake_token_is_pinned():
    assert [fake_token(1, position, 32_000) for position in range(4)] == PINNED
    assert all(0 <= fake_token(seed, 9, 7) < 7 for seed in range(100))


PINNED = [15280, 1617, 31184, 1214]


def test_logprobs_are_certain():
    driver = PlanDriver(make_fake())
    seq = driver.add([1, 2], 3, logprobs=2)
    driver.run()
    assert [entry.logprob for entry in seq.logprobs] == [0.0] * 3
    assert [entry.top_ids for entry in seq.logprobs] == [(token,) for token in seq.output]


def test_context_is_bounded_by_the_pool():
    assert make_fake(num_pages=8).capabilities.max_context == 32
    assert make_fake(num_pages=640).capabilities.max_context == 256


def test_opens_without_a_model_directory_and_with_one(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOS_FAKE_STEP_MS", "30")
    config = ModelConfig(name="m", backend="fake", num_pages=10, page_size=8)
    backend = FakeBackend.open(config, tmp_path, Limits(4, 32))
    assert (backend.capabilities.vocab_size, backend.capabilities.max_context) == (32_000, 80)
    started = time.monotonic()
    backend.execute(plan([add()], prefill=[0, 0, 3, 1]))
    assert time.monotonic() - started >= 0.03
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json: model_type: is missing"):
        FakeBackend.open(config, tmp_path, Limits(4, 32))


def test_host_pages_come_from_the_configuration_and_the_check_from_the_environment(tmp_path, monkeypatch):
    config = ModelConfig(name="m", backend="fake", page_size=8, host_cache_gib=3 / 2**10)
    plain = FakeBackend.open(config, tmp_path, Limits(4, 32))
    assert (plain.capabilities.host_pages, plain.capabilities.swap_us) == (3 * 2**20 // (8 * 64), 1.0)
    assert plain.contents is None
    monkeypatch.setenv("LLMOS_FAKE_CHECK", "1")
    without = FakeBackend.open(ModelConfig(name="m", backend="fake"), tmp_path, Limits(4, 32))
    assert (without.capabilities.host_pages, without.capabilities.swap_us) == (0, 0.0)
    assert without.contents is not None
    with pytest.raises(ConfigError, match="host_cache_gib: 1e-07 GiB holds no page") as caught:
        FakeBackend.open(ModelConfig(name="m", backend="fake", host_cache_gib=1e-7), tmp_path, Limits(4, 32))
    assert caught.value.field == "host_cache_gib"


def test_a_plan_of_moves_alone_is_answered():
    moves = {"swap_out": pack_i32([1, 0]), "swap_in": pack_i32([0, 2]), "copies": pack_i32([3, 4])}
    output = make_fake(host_pages=1).execute(StepPlan(1, 1, b"", (), b"", b"", b"", **moves))
    assert (output.samples, output.logprobs, output.failed) == (b"", (), b"")


def test_no_torch_in_its_process():
    code = (
        "import sys; import llmos.services.executor.service, llmos.services.executor.fake;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'safetensors')))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def add(row: int = 0, tokens: tuple[int, ...] = (1, 2, 3), pages: tuple[int, ...] = (0,), **changes) -> RowAdd:
    fields = {"rid": 1, "prompt_len": len(tokens), "num_computed": 0, "params": SamplingParams(seed=1)} | changes
    return RowAdd(row=row, tokens=pack_i32(tokens), pages=pack_i32(pages), **fields)


def plan(adds=(), *, frees=(), appends=(), prefill=(), decode=(), moves=((), (), ())) -> StepPlan:
    work = (pack_i32(values) for values in (appends, prefill, decode, *moves))
    return StepPlan(1, 1, pack_i32(frees), tuple(adds), *work)


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        ([plan([add(8)])], "row 8 of 8"),
        ([plan([add()]), plan([add()])], "row 0 is not free"),
        ([plan(frees=[2])], "row 2 is free"),
        ([plan([add(pages=(64,))])], r"pages \[64\] of 64"),
        ([plan([add(pages=(-1,))])], r"pages \[-1\] of 64"),
        ([plan([add(num_computed=3)])], "3 of 3 tokens are computed"),
        ([plan([add(num_computed=2, pages=())])], "0 pages for 2 computed tokens"),
        ([plan([add(params=SamplingParams())])], "row 0 has no seed"),
        ([plan([add(tokens=())])], "0 tokens"),
        ([plan([add()], appends=[0, 2, 5])], "page index 2"),
        ([plan([add()], appends=[1, 0, 5])], "row 1 is free"),
        ([plan([add()], prefill=[0, 1, 2, 1])], "0 are computed"),
        ([plan([add()], prefill=[0, 0, 4, 0])], "past its 3 tokens"),
        ([plan([add()], prefill=[0, 0, 2, 1])], "samples before the newest token"),
        ([plan([add()], prefill=[0, 0, 0, 0])], "is empty"),
        ([plan([add(pages=())], prefill=[0, 0, 3, 1])], "no page for"),
        ([plan([add()], decode=[0])], "more than their newest token"),
        ([plan(decode=[5])], "one is free"),
        ([plan(moves=([64, 0], [], []))], r"pages \[64\] of 64"),
        ([plan(moves=([], [0, 1], []))], r"host pages \[0\] of 0"),
        ([plan(moves=([], [], [1, 2, 3, 2]))], r"pages \[2\] are written twice"),
        ([plan([add(tokens=(1, 2, 3, 4))], prefill=[0, 0, 4, 1]), plan(decode=[0])], "no page for their newest token"),
    ],
)
def test_impossible_plans_are_refused(steps, complaint):
    backend = make_fake()
    for step in steps[:-1]:
        backend.execute(step)
    with pytest.raises(AssertionError, match=complaint):
        backend.execute(steps[-1])


def test_numbers_go_bad_at_a_token_as_often_as_asked():
    backend = FakeBackend(Limits(4, 64), vocab_size=100, nan=7, nan_times=1)
    params = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=1)

    def enter(step: int, row: int, tokens: list[int]) -> StepOutput:
        add = RowAdd(row, row + 1, pack_i32(tokens), len(tokens), 0, pack_i32([row]), params)
        return backend.execute(StepPlan(1, step, b"", (add,), b"", pack_i32([row, 0, len(tokens), 1]), b""))

    bad = enter(1, 0, [5, 7])
    assert (bad.samples, bad.failed) == (b"", pack_i32([0, FinishReason.NUMERICAL_ERROR]))
    assert backend.execute(StepPlan(1, 2, b"", (), b"", b"", pack_i32([0]))).failed == bad.failed
    good = enter(3, 1, [5, 7])
    assert (len(good.samples), good.failed) == (12, b"")
