"""Replay: the same decisions for an untouched recording; every planted difference found and named; damage never more than an error."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys

import msgspec
import pytest
from flight_world import Recorded, flight_file, live, make_world, recorded_world, records
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_world import GATEWAY

from llmos.errors import ProtocolError, VersionMismatch
from llmos.microkernel.describe import brief, first_difference
from llmos.microkernel.freeze import freeze
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.recorder import MAGIC, Call
from llmos.microkernel.replay import FlightFile, replay
from llmos.microkernel.scheduler import Scheduler
from llmos.microkernel.thaw import thaw
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, encode, pack_i32, unpack_i32
from llmos.protocol.params import SamplingParams

_to_kernel = Schema(m.ToKernel)
_from_kernel = Schema(m.FromKernel)
HEADER, SNAPSHOT, CALLED = 1, 2, 4
CALL, NOW, PEER, CHECKS, PLANS, ERROR = range(1, 7)  # places in a call's fields


def calls(found):
    """(number, fields, message) of every call, as a replay counts them."""
    every = (record for record in found if record[0][0] == CALLED)
    return [(number, *record) for number, record in enumerate(every, 1)]


@pytest.mark.parametrize("seed", range(15))
def test_the_same_decisions(seed):
    world = recorded_world(seed, 200)
    data = world.kernel.file()
    report = replay(data)
    assert (report.verdict, report.difference, report.damage, report.crash) == ("same", None, "", "")
    assert report.records == world.kernel.recorder.calls == len(calls(records(data)))
    assert report.steps == len(world.plans)
    assert report.segments == 1
    times = [fields[NOW] for _, fields, _ in calls(records(data))]
    assert report.seconds == times[-1] - times[0]


# ------------------------------------------------------------ planted differences


def two_tenants(weight=1.0):
    """A recording of two tenants who both wait for one row, begun when there is something to decide."""
    world = make_world(1, num_pages=60, page_size=4, max_rows=1, window=10**6, policy="fair")
    for index in range(6):
        world.submit([index, 2, 3], owner="alice" if index % 2 else "bob", max_tokens=3, seed=index)
    world.kernel = Recorded(world.kernel, 1 << 24)
    world.kernel.recorder.greet(GATEWAY, 0.0)
    world.run()
    return world


def test_a_flipped_token_is_found():
    found = records(two_tenants().kernel.file())
    results = [
        (number, index)
        for number, (index, record) in enumerate(((i, r) for i, r in enumerate(found) if r[0][0] == CALLED), 1)
        if record[0][CALL] == Call.HANDLE and isinstance(_to_kernel.decode(record[1]), m.StepResult)
    ]
    number, index = results[4]
    result = _to_kernel.decode(found[index][1])
    samples = unpack_i32(result.samples)
    samples[2] = (samples[2] + 1) % 1000
    found[index][1] = encode(msgspec.structs.replace(result, samples=pack_i32(samples)))
    report = replay(flight_file(found))
    assert report.verdict == "different"
    assert report.difference.record == number == report.records
    assert report.difference.effect == "SeqTokens to gateway"
    assert report.difference.call == (
        f"StepResult(generation=1, step={result.step}, samples=[({samples[0]}, {samples[1]}, {samples[2]})], logprobs=(), "
        "failed=[], busy_us=10, idle_us=0, results=()) from executor.demo"
    )
    assert f", {samples[2]})]" in report.difference.replayed
    assert report.difference.recorded == "another message"
    assert report.difference.at_s == pytest.approx(found[index][0][NOW])
    assert report.difference.wall == pytest.approx(1_700_000_000.0 - (found[0][0][5] - found[index][0][NOW]))


def test_a_changed_weight_in_the_snapshot_is_found():
    found = records(two_tenants().kernel.file())
    assert replay(flight_file(found)).verdict == "same"
    kernel = thaw(found[1][0][2])
    tenants = kernel.state.lanes["demo"].tenants
    tenants.get("bob").limits = type(tenants.get("bob").limits)(weight=100.0)
    found[1][0][2] = freeze(kernel)
    difference = replay(flight_file(found)).difference
    before, after = difference.recorded, difference.replayed
    assert difference.effect.startswith("StepPlan ")
    assert difference.effect.endswith(" to executor.demo")
    assert difference.field == "row_adds[0].rid"
    assert before != after
    assert int(after) % 2 == 1, "bob, who got more, comes first now"


@pytest.mark.parametrize(
    ("change", "field", "recorded", "replayed"),
    [
        (lambda plan: {"step": plan.step + 7}, "step", "8", "1"),
        (
            lambda plan: {"prefill": pack_i32([0, 0, 2, 1])},
            "prefill[0]", "row 0, start 0, length 2, sample 1", "row 0, start 0, length 3, sample 1",
        ),
        (lambda plan: {"prefill": b""}, "prefill[0]", "nothing, only 0", "row 0, start 0, length 3, sample 1"),
        (lambda plan: {"page_appends": pack_i32([1, 2, 3])}, "page_appends[0]", "row 1, index 2, page 3", "nothing, only 0"),
        (lambda plan: {"decode": None}, "decode", "the same rows as before", "[]"),
        (lambda plan: {"copies": pack_i32([1, 2])}, "copies[0]", "from 1, to 2", "nothing, only 0"),
        (lambda plan: {"row_adds": ()}, "row_adds[0]", "nothing, only 0", "RowAdd(row=0, rid=1, "),
        (
            lambda plan: {"row_adds": (msgspec.structs.replace(plan.row_adds[0], pages=pack_i32([9])),)},
            "row_adds[0].pages[0]", "page 9", "page 0",
        ),
        (
            lambda plan: {
                "row_adds": (msgspec.structs.replace(plan.row_adds[0], params=SamplingParams(temperature=2.0)),)
            },
            "row_adds[0].params.temperature", "2.0", "0.0",
        ),
    ],
)  # fmt: skip
def test_the_field_of_a_plan_is_named(change, field, recorded, replayed):
    world = make_world(1, page_size=4, steps_in_flight=1)
    world.kernel = Recorded(world.kernel, 1 << 24)
    world.submit([1, 2, 3], max_tokens=4)
    found = records(world.kernel.file())
    number, fields, _ = next(call for call in calls(found) if call[1][PLANS])
    [[place, frame]] = fields[PLANS]
    plan = _from_kernel.decode(frame)
    fields[PLANS] = [[place, encode(msgspec.structs.replace(plan, **change(plan)))]]
    fields[CHECKS] = [1]
    report = replay(flight_file(found))
    difference = report.difference
    assert (difference.record, difference.field, difference.recorded) == (number, field, recorded)
    assert difference.replayed.startswith(replayed)
    assert difference.call.startswith("tick after SeqSubmit(req=1, model='demo', prompt=[1, 2, 3], ")
    assert difference.call.endswith("... from gateway")


def test_a_lost_and_an_invented_effect_are_found():
    for change, recorded, replayed in (
        (lambda checks: checks[:-1], "nothing: 0 effects", "SeqAccepted(req=1, rid=1"),
        (lambda checks: [*checks, 5], "another message", "nothing: 1 effects"),
    ):
        world = make_world(1)
        world.kernel = Recorded(world.kernel, 1 << 24)
        world.submit([1, 2, 3])
        found = records(world.kernel.file())
        number, fields, _ = calls(found)[0]
        fields[CHECKS] = change(fields[CHECKS])
        difference = replay(flight_file(found)).difference
        assert (difference.record, difference.recorded) == (number, recorded)
        assert difference.replayed.startswith(replayed)


def test_other_code_is_found(monkeypatch):
    """What a replay is for: the same recording with a changed scheduler."""
    data = recorded_world(6, 150).kernel.file()
    original = Scheduler.schedule

    def worse(self, generation, now):
        self.limits = type(self.limits)(
            **{name: getattr(self.limits, name) for name in self.limits.__slots__} | {"max_step_tokens": 5}
        )
        return original(self, generation, now)

    monkeypatch.setattr(Scheduler, "schedule", worse)
    report = replay(data)
    assert report.difference.effect.startswith("StepPlan ")
    assert report.difference.field


def test_a_crash_is_replayed_and_so_is_its_absence(monkeypatch):
    world = recorded_world(7, 60)
    with monkeypatch.context() as planted:
        planted.setattr(Kernel, "tick", lambda self, now: [][7])
        with pytest.raises(IndexError):
            world.send(GATEWAY, m.PsGet(1))
        data = world.kernel.file("IndexError: list index out of range")
    report = replay(data)
    assert report.verdict == "different"
    assert report.difference.field == "exception"
    assert report.difference.recorded == "IndexError: list index out of range"
    assert report.difference.replayed == "none"
    assert report.difference.call == "tick after PsGet(req=1, owner=None) from gateway"
    monkeypatch.setattr(Kernel, "greet", lambda self, sender, now: [][7])
    world = make_world(7)
    world.kernel = Recorded(world.kernel, 1 << 24)
    with pytest.raises(IndexError):
        world.kernel.recorder.greet(GATEWAY, 1.0)
    report = replay(world.kernel.file())
    assert report.verdict == "same"
    assert report.crash.startswith("IndexError: list index out of range (test_replay.py:")


def test_a_violated_invariant_is_replayed(monkeypatch):
    world = recorded_world(8, 60)
    world.kernel.state.sequences.popitem()
    world.kernel.recorder._segments.clear()
    world.kernel.recorder._recording = False
    world.kernel.recorder.roll(world.now, idle=True)
    with pytest.raises(AssertionError):
        world.kernel.check()
    report = replay(world.kernel.file())
    assert (report.verdict, report.records) == ("same", 1)
    assert report.crash.startswith("AssertionError")


# ------------------------------------------------------------ damaged and foreign files

DATA = recorded_world(9, 40).kernel.file()
RECORDS = len(calls(records(DATA)))


def test_a_file_that_was_cut_off_is_read_up_to_the_cut():
    assert not replay(DATA).damage
    snapshot_end = len(MAGIC) + sum(12 + len(msgspec.msgpack.encode(fields)) for fields, _ in records(DATA)[:2])
    readable = []
    for length in range(0, len(DATA), 97):
        if length < snapshot_end:
            with pytest.raises(ProtocolError, match=r"not a flight file|nothing to replay: the file is cut off"):
                replay(DATA[:length])
            continue
        report = replay(DATA[:length])
        assert (report.verdict, report.damage) == ("same", f"the file is cut off at byte {length}")
        readable.append(report.records)
    assert readable == sorted(readable)
    assert 0 < readable[-1] <= RECORDS
    assert replay(DATA[:-1]).records == RECORDS


def test_a_damaged_record_ends_the_reading():
    *_, last, end = (12 + len(msgspec.msgpack.encode(fields)) + len(message) for fields, message in records(DATA))
    place = len(DATA) - end - last + 14
    report = replay(DATA[:place] + bytes([DATA[place] ^ 1]) + DATA[place + 1 :])
    assert report.verdict == "same"
    assert report.damage == f"the record at byte {place - 14} is damaged"
    assert report.records == RECORDS - 1


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.binary(min_size=1, max_size=5))
def test_bit_rot_is_damage_or_a_typed_error(place, junk):
    rotten = (DATA[:place] + junk + DATA[place + len(junk) :])[: len(DATA)]  # what follows the end is nobody's
    try:
        report = replay(rotten)
    except ProtocolError:
        return
    assert report.verdict == "same"
    assert report.damage or rotten == DATA


@settings(max_examples=150, deadline=None)
@given(
    st.randoms(use_true_random=False),
    st.one_of(st.integers(), st.binary(max_size=4), st.none(), st.just([]), st.text(max_size=3)),
)
def test_forged_records_are_a_finding_or_a_typed_error(rng, junk):
    found = records(DATA)
    fields = rng.choice(found)[0]
    fields[rng.randrange(len(fields))] = junk
    with contextlib.suppress(ProtocolError, OverflowError):
        replay(flight_file(found))


@pytest.mark.parametrize("time", [float("inf"), float("nan"), -1.0, 1e300])
@pytest.mark.parametrize(("kind", "place"), [(HEADER, 4), (HEADER, 5), (CALLED, NOW)])
def test_impossible_times_are_refused(kind, place, time):
    found = records(DATA)
    next(fields for fields, _ in found if fields[0] == kind)[place] = time
    with pytest.raises(ProtocolError, match="is no time"):
        replay(flight_file(found))


@pytest.mark.parametrize(("place", "value"), [(1, "9.9.9"), (2, "0123456789abcdef")])
def test_another_version_is_refused_in_one_line(place, value):
    found = records(DATA)
    found[0][0][place] = value
    with pytest.raises(VersionMismatch) as caught:
        replay(flight_file(found))
    assert value in caught.value.message
    assert "replay it with the llmos that wrote it" in caught.value.message
    assert "\n" not in caught.value.message


def test_other_files_are_refused():
    with pytest.raises(VersionMismatch, match="another format"):
        FlightFile(b"llmos flight 2\n" + DATA[len(MAGIC) :])
    for data in (b"", b"PK\3\4", MAGIC, MAGIC + bytes(40)):
        with pytest.raises(ProtocolError, match=r"not a flight file|is not one"):
            replay(data)
    with pytest.raises(ProtocolError, match="nothing to replay: no snapshot"):
        replay(flight_file([records(DATA)[0], records(DATA)[-1]]))
    job = flight_file([records(DATA)[0], [[SNAPSHOT, 0.0, freeze([1])], b""]])
    with pytest.raises(ProtocolError, match="not a kernel"):
        replay(job)


# ------------------------------------------------------------ words


def test_messages_in_words():
    assert brief(m.StepResult(1, 2, pack_i32([0, 5, 7] * 6), (), b"", 10, 0)) == (
        "StepResult(generation=1, step=2, samples=[(0, 5, 7), (0, 5, 7), (0, 5, 7), (0, 5, 7), ... 6 in all], logprobs=(), "
        "failed=[], busy_us=10, idle_us=0, results=())"
    )
    assert len(brief(m.PsGet(1, "x" * 1000))) == 200
    assert first_difference(m.PsGet(1), m.PsGet(1)) is None


# ------------------------------------------------------------ the command


@pytest.mark.slow
def test_the_process_reports_as_json(tmp_path):
    same, other, broken = (tmp_path / name for name in ("same", "other", "broken"))
    same.write_bytes(DATA)
    found = records(DATA)
    calls(found)[-1][1][CHECKS] = [1, 2, 3]
    other.write_bytes(flight_file(found))
    broken.write_bytes(b"nothing")
    command = [sys.executable, "-P", "-m", "llmos.microkernel.replay"]
    done = [
        subprocess.run([*command, path], capture_output=True, check=False)
        for path in (same, other, broken, tmp_path / "no")
    ]
    assert [each.returncode for each in done] == [0, 1, 2, 2]
    assert msgspec.json.decode(done[0].stdout)["records"] == RECORDS
    assert msgspec.json.decode(done[1].stdout)["difference"]["record"] == RECORDS
    assert done[2].stderr.decode() == f"{broken}: not a flight file\n"
    assert done[3].stderr.decode() == f"cannot read {tmp_path}/no: No such file or directory\n"


def test_live_uses_every_verb():
    """The random life that all this is tested with must not become trivial unnoticed."""
    world = recorded_world(0, 0)
    rng = random.Random(0)
    live(world, rng, 600)
    told = {
        type(_to_kernel.decode(message)).__name__
        for _, fields, message in calls(records(world.kernel.file()))
        if message
    }
    assert {
        "SeqSubmit",
        "SeqSpawn",
        "SeqAppend",
        "SeqContinue",
        "Fork",
        "Suspend",
        "Kill",
        "StepResult",
        "TenantSet",
    } <= told
    assert len(world.plans) > 100
