"""The other parts of chaos.py: the script of faults, histories that grow, right answers, and who is to blame for a stall."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from chaos.answers import VOCAB, FakeAnswers, word, write_fake_model
from chaos.history import HistoryReader, HistoryWriter
from chaos.judge import Verdict, Violation
from chaos.material import FakeMaterial
from chaos.output import DUPLICATED, FAILED, LOST
from chaos.report import HEADINGS, table
from chaos.script import KINDS, CrashLoopLimit, make_script
from chaos.tally import Fault, Tally, percentile
from tokenizers import Tokenizer

from llmos.services.executor.fake import fake_token

# ---------------------------------------------------------------- script


def first(count: int, seed: int = 7, kinds=KINDS, faults=("kill", "stop"), mean_s: float = 2.0):
    return list(itertools.islice(make_script(seed, kinds, faults, mean_s), count))


def test_the_same_seed_gives_the_same_script():
    assert first(200) == first(200)
    assert first(200) != first(200, seed=8)


def test_every_kind_is_hit_equally_often_and_sometimes_twice_in_a_row():
    planned = first(240)
    assert set(Counter((one.kind, one.fault) for one in planned).values()) == {20}
    assert any(a.kind == b.kind for a, b in itertools.pairwise(planned))


def test_pauses_have_the_mean_and_are_bounded():
    pauses = [one.pause_s for one in first(4000)]
    assert sum(pauses) / len(pauses) == pytest.approx(2.0, rel=0.05)
    assert min(pauses) >= 0.02
    assert max(pauses) <= 10.0


def test_a_service_is_kept_below_the_crash_loop_limit():
    limit = CrashLoopLimit(2, 15.0)
    limit.hit("executor", 100.0)
    assert limit.delay_s("executor", 101.0) == 0.0
    limit.hit("executor", 101.0)
    assert limit.delay_s("executor", 102.0) == 13.0
    assert limit.delay_s("storage", 102.0) == 0.0
    assert limit.delay_s("executor", 115.0) == 0.0
    limit.hit("executor", 115.0)
    assert limit.delay_s("executor", 116.0) == 14.0
    assert limit.delay_s("executor", 200.0) == 0.0
    limit.hit("supervisor", 116.0)  # the new one counts from 0
    assert limit.delay_s("executor", 116.0) == 0.0


# ---------------------------------------------------------------- histories


def test_a_reader_follows_a_writer(tmp_path):
    writer = HistoryWriter(tmp_path, 3, clock=itertools.count(1).__next__)
    reader = HistoryReader(tmp_path, 3)
    assert list(HistoryReader(tmp_path, 4).new_events()) == []
    writer.write(writer.new_request(), "ask", verb="generate")
    writer.flush()
    assert list(reader.new_events()) == [{"t": 1, "req": 1, "event": "ask", "verb": "generate"}]
    assert list(reader.new_events()) == []
    writer.write(1, "left")
    writer.close()
    assert list(reader.new_events()) == [{"t": 2, "req": 1, "event": "left"}]
    reader.close()


def test_half_a_line_waits_for_its_other_half(tmp_path):
    path = tmp_path / "client-000.00000.jsonl"
    reader = HistoryReader(tmp_path, 0)
    path.write_text('{"t": 1, "re')
    assert list(reader.new_events()) == []
    with path.open("a") as file:
        file.write('q": 5}\n')
    assert list(reader.new_events()) == [{"t": 1, "req": 5}]
    reader.close()


@pytest.mark.parametrize("keep", [False, True])
def test_segments_that_were_read_are_deleted(tmp_path, monkeypatch, keep):
    monkeypatch.setattr("chaos.history.SEGMENT_BYTES", 300)
    writer = HistoryWriter(tmp_path, 0, clock=lambda: 0.0)
    reader = HistoryReader(tmp_path, 0, keep=keep)
    read = []
    for number in range(50):
        writer.write(number, "tokens", text="word")
        writer.flush()
        if number % 7 == 0:
            read += [event["req"] for event in reader.new_events()]
    writer.close()
    read += [event["req"] for event in reader.new_events()]
    reader.close()
    assert read == list(range(50))
    assert (len(list(tmp_path.iterdir())) == 1) is not keep


# ---------------------------------------------------------------- answers


def test_answers_of_the_fake_model_are_its_definition():
    answer = FakeAnswers().find({"seed": 5, "position": 9, "count": 3, "stop": None})
    assert answer.ids == tuple(fake_token(5, 9 + i, VOCAB) for i in range(3))
    assert answer.text == "".join(f"t{token} " for token in answer.ids)
    assert answer.text_after(2) == f"t{answer.ids[2]} "
    stopped = FakeAnswers().find({"seed": 5, "position": 9, "count": 3, "stop": 1})
    assert (stopped.ids, stopped.text, stopped.reason) == (answer.ids[:2], f"t{answer.ids[0]} ", "stop")


def test_a_stop_string_is_where_it_first_comes():
    chance = random.Random(1)
    for _ in range(50):
        wanted = FakeMaterial().output(chance, 4, stops=True)
        answer = FakeAnswers().find(wanted.answer)
        assert len(answer.ids) == wanted.count
        assert word(answer.ids[-1]) == wanted.options["stop"]
        assert wanted.options["stop"] not in answer.text


def test_the_fake_model_has_one_tokenization_for_each_text(tmp_path):
    write_fake_model(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    ids = [0, 7, 77, 777, 7, 999]
    text = "".join(map(word, ids))
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids) == text


# ---------------------------------------------------------------- tally


def fault(kind: str, at: float, recovered_at: float | None = None) -> Fault:
    return Fault(kind, "kill", f"{kind}.service", 1, at, recovered_at)


def verdict(*moments: float, req: int = 1) -> Verdict:
    return Verdict(0, req, "generate", True, moments, 5, 0, frozenset())


def test_a_stall_counts_for_the_first_fault_within_it():
    tally = Tally()
    for one in (fault("executor", 10.0, 10.5), fault("storage", 11.0, 11.25)):
        tally.fault(one)
    tally.verdict(verdict(8.0, 9.0, 9.5, 12.5, 13.0))
    rows = {kind: row.summary() for (kind, _), row in tally.rows().items()}
    assert (rows["executor"]["stall_max_s"], rows["storage"]["stall_max_s"]) == (3.0, 0.5)
    assert (rows["executor"]["requests_hit"], rows["storage"]["requests_hit"]) == (1, 1)
    assert (rows["executor"]["recovery_max_s"], rows["storage"]["recovery_max_s"]) == (0.5, 0.25)
    assert tally.longest_stall == 3.0


def test_what_was_on_its_way_does_not_hide_the_cause():
    tally = Tally()
    tally.fault(fault("executor", 10.0))
    tally.fault(fault("storage", 12.0))
    tally.verdict(verdict(9.0, 10.03125, 13.0))
    rows = {kind: row.summary() for (kind, _), row in tally.rows().items()}
    assert (rows["executor"]["stall_max_s"], rows["storage"]["stall_max_s"]) == (2.96875, 0.0)


def test_requests_before_and_after_a_fault_are_not_hit():
    tally = Tally()
    tally.verdict(verdict(1.0, 2.0, 9.0))
    tally.fault(fault("executor", 10.0))
    tally.verdict(verdict(11.0, 12.0))
    assert tally.total().hit == 0
    assert tally.longest_stall == 1.0  # the last fault before it


def test_harm_counts_for_the_last_fault_and_once_a_request():
    tally = Tally()
    tally.violation(Violation(FAILED, "error", "", 0, 1, 5.0))
    tally.fault(fault("executor", 10.0))
    for harm in (LOST, LOST, DUPLICATED):
        tally.violation(Violation(harm, "", "", 0, 2, 11.0))
    tally.fault(fault("storage", 12.0))
    tally.violation(Violation(LOST, "", "", 0, 3, 12.5))
    rows = {kind: dict(row.harms) for (kind, _), row in tally.rows().items()}
    assert rows == {"before any fault": {FAILED: 1}, "executor": {LOST: 1, DUPLICATED: 1}, "storage": {LOST: 1}}
    assert (tally.harmed, tally.num_violations, tally.harm(LOST)) == (4, 5, 2)


def test_percentiles_are_values_that_occurred():
    values = [float(number) for number in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([], 0.99) == 0.0


def test_the_table_has_a_line_for_each_kind_and_the_sum():
    tally = Tally()
    for at, kind in enumerate(["executor", "storage", "executor"]):
        tally.fault(fault(kind, float(at), at + 0.5))
    lines = table(tally).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[0] for line in lines] == [HEADINGS[0], "executor", "storage", "total"]
    assert lines[1].split()[:6] == ["executor", "kill", "2", "2", "0.50", "0.50"]
    assert lines[3].split()[:3] == ["total", "3", "3"]
