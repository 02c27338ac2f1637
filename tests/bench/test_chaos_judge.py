"""The checker of histories: what is right passes, and each planted fault is reported as what it is."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from chaos.answers import Answer
from chaos.judge import Judge
from chaos.output import CHANGED, DUPLICATED, FAILED, LOST, check_ids

IDS = (11, 12, 13, 14, 15, 16)
PIECES = tuple(f"t{token} " for token in IDS)
ANSWER = Answer(IDS, "".join(PIECES), "length", PIECES)
STOPPED = Answer(IDS[:4], "".join(PIECES[:3]), "stop", PIECES[:3])
WITHOUT_PIECES = Answer(IDS, ANSWER.text, "length")


class Book:
    def find(self, address):
        return {"right": ANSWER, "stopped": STOPPED, "whole": WITHOUT_PIECES}[address["name"]]


class Court:
    """A judge and what it said."""

    def __init__(self) -> None:
        self.violations, self.verdicts = [], []
        self.judge = Judge(Book(), self.violations.append, self.verdicts.append)
        self._clock = itertools.count(100)

    def tell(self, event: str, *, req: int = 1, client: int = 0, **content) -> Court:
        self.judge.feed(client, {"t": float(next(self._clock)), "req": req, "event": event, **content})
        return self

    def ask(self, verb: str = "generate", *, answer: str | None = "right", **content) -> Court:
        address = None if answer is None else {"name": answer}
        return self.tell("ask", verb=verb, answer=address, **content)

    def tokens(self, offset: int, ids, text: str | None = None, **content) -> Court:
        text = "".join(f"t{token} " for token in ids) if text is None else text
        return self.tell("tokens", offset=offset, ids=list(ids), text=text, **content)

    def end(self, ids: int = 6, text: str = ANSWER.text, reason: str = "length", **content) -> Court:
        return self.tell("end", reason=reason, ids=ids, text=text, **content)

    @property
    def said(self) -> list[tuple[str, str]]:
        return [(found.harm, found.what) for found in self.violations]


def a_good_stream() -> Court:
    return Court().ask().tell("accepted", rid=7).tokens(0, IDS[:2]).tokens(2, IDS[2:]).end()


# ---------------------------------------------------------------- what is right


def test_a_good_stream_passes():
    court = a_good_stream()
    assert court.said == []
    (verdict,) = court.verdicts
    assert (verdict.client, verdict.req, verdict.verb, verdict.accepted, verdict.tokens) == (0, 1, "generate", True, 6)
    assert verdict.moments == (100.0, 101.0, 102.0, 103.0, 104.0)
    assert verdict.harms == frozenset()
    assert court.judge.num_open == 0


def test_text_may_lag_behind_tokens():
    court = (
        Court().ask().tokens(0, IDS[:3], "").tokens(3, IDS[3:], ANSWER.text[:9]).tokens(6, (), ANSWER.text[9:]).end()
    )
    assert court.said == []


def test_a_stop_string_ends_early_and_is_not_part_of_the_text():
    court = Court().ask(answer="stopped").tokens(0, IDS[:4], STOPPED.text).end(4, STOPPED.text, "stop")
    assert court.said == []


def test_a_reader_from_the_middle():
    court = Court().ask("attach", start=4, rid=7).tokens(4, IDS[4:]).end(2, "t15 t16 ")
    assert court.said == []


def test_a_reader_from_the_middle_whose_text_is_known_as_a_whole_only():
    assert Court().ask("attach", answer="whole", start=4).tokens(4, IDS[4:]).end(2, "t15 t16 ").said == []
    wrong = Court().ask("attach", answer="whole", start=4).tokens(4, IDS[4:], "t15 t17 ").end(2, "t15 t17 ")
    assert wrong.said == [(CHANGED, "text mismatch")]


def test_a_refusal_before_acceptance_is_asked_again():
    court = Court().ask().tell("refused", error="Unavailable", message="").tokens(0, IDS).end()
    assert court.said == []
    assert court.verdicts[0].refusals == 1


def test_a_reader_that_was_told_so_may_be_replaced():
    court = Court().ask().tokens(0, IDS[:2]).tell("handover").tell("error", error="WrongState", message="")
    assert court.said == []


def test_leaving_on_purpose_needs_no_end():
    assert Court().ask("attach").tokens(0, IDS[:2]).tell("left").said == []


def test_an_output_without_a_known_answer_is_checked_for_gaps_and_ends():
    assert Court().ask(answer=None).tokens(0, (1, 2)).tokens(2, (3,)).end(3, "t1 t2 t3 ").said == []
    assert Court().ask(answer=None).tokens(0, (1, 2)).tokens(3, (3,)).end(3, "t1 t2 t3 ").said == [
        (LOST, "missing tokens")
    ]


# ---------------------------------------------------------------- planted faults: tokens


@pytest.mark.parametrize(
    ("pieces", "harm", "what"),
    [
        ([(0, IDS[:2]), (3, IDS[3:])], LOST, "missing tokens"),  # the offsets show it
        ([(0, IDS[:2]), (2, IDS[3:])], LOST, "missing tokens"),  # they do not
        ([(0, IDS[:5])], LOST, "missing tokens"),  # the last one
        ([], LOST, "missing tokens"),
        ([(0, IDS[:3]), (2, IDS[2:])], DUPLICATED, "tokens again"),
        ([(0, IDS[:3]), (3, IDS[2:])], DUPLICATED, "tokens again"),
        ([(0, IDS), (0, IDS)], DUPLICATED, "tokens again"),
        ([(0, IDS), (6, IDS)], DUPLICATED, "tokens again"),
        ([(0, (*IDS, 99))], DUPLICATED, "extra tokens"),
        ([(0, (11, 12, 99, 14, 15, 16))], CHANGED, "changed tokens"),
        ([(0, IDS[:3]), (2, (99, *IDS[3:]))], CHANGED, "changed tokens"),  # came again, and otherwise
        ([(0, IDS[:3]), (5, IDS[3:])], CHANGED, "wrong offset"),
        ([(1, IDS)], CHANGED, "wrong offset"),
    ],
)
def test_planted_in_the_tokens(pieces, harm, what):
    court = Court().ask()
    for offset, ids in pieces:
        court.tokens(offset, ids)
    flat = [token for _, ids in pieces for token in ids]
    court.end(len(flat), "".join(f"t{token} " for token in flat))
    assert court.said == [(harm, what)]
    assert court.verdicts[0].harms == {harm}


def test_a_part_of_a_stream_is_checked_too():
    assert check_ids(0, [(0, [11, 12])], ANSWER, whole=False) == []
    assert check_ids(0, [(0, [11, 13, 14])], ANSWER, whole=False) == [(LOST, "missing tokens", "1 at offset 1")]
    assert check_ids(0, [(0, [11, 12, 77])], ANSWER, whole=False)[0][:2] == (CHANGED, "changed tokens")
    assert check_ids(2, [(2, [13, 14])], ANSWER, whole=False) == []


def test_every_single_missing_repeated_or_replaced_token_is_named():
    for place in range(len(IDS)):
        ids = list(IDS)
        missing = ids[:place] + ids[place + 1 :]
        again = [*ids[:place], ids[place], *ids[place:]]
        changed = [*ids[:place], 99, *ids[place + 1 :]]
        assert [found[0] for found in check_ids(0, [(0, missing)], ANSWER, whole=True)] == [LOST]
        assert [found[0] for found in check_ids(0, [(0, again)], ANSWER, whole=True)] == [DUPLICATED]
        assert [found[0] for found in check_ids(0, [(0, changed)], ANSWER, whole=True)] == [CHANGED]


# ---------------------------------------------------------------- planted faults: ends


def test_two_ends():
    assert a_good_stream().end().said == [(DUPLICATED, "two ends")]
    assert a_good_stream().tell("error", error="Unavailable", message="").said == [(DUPLICATED, "two ends")]


def test_a_token_after_the_end():
    assert a_good_stream().tokens(6, (99,)).said == [(DUPLICATED, "tokens after the end")]


def test_no_end():
    court = Court().ask().tokens(0, IDS[:2])
    court.judge.finish(500.0)
    assert court.said == [(LOST, "no end")]
    assert court.verdicts[0].moments[-1] == 500.0
    gave_up = Court().ask().tokens(0, IDS[:2]).tell("gave_up", message="nothing for 45 s")
    assert gave_up.said == [(LOST, "no end")]


def test_never_accepted():
    court = Court().ask().tell("refused", error="Unavailable", message="").tell("gave_up", message="refused for 45 s")
    assert court.said == [(FAILED, "never accepted")]
    asked = Court().ask()
    asked.judge.finish(500.0)
    assert asked.said == [(FAILED, "never accepted")]


def test_clients_that_were_cut_off_prove_nothing():
    court = Court().ask().tokens(0, IDS[:2])
    court.judge.finish(500.0, interrupted=True)
    assert court.said == []


@pytest.mark.parametrize(
    ("error", "harm", "what"),
    [("Unavailable", FAILED, "error"), ("WrongState", FAILED, "error"), ("NotFound", LOST, "unknown sequence")],
)
def test_an_error_after_acceptance(error, harm, what):
    court = Court().ask().tell("accepted", rid=7).tokens(0, IDS[:2]).tell("error", error=error, message="why")
    assert court.said == [(harm, what)]


def test_a_refusal_after_tokens_is_a_failure():
    court = Court().ask().tokens(0, IDS[:2]).tell("refused", error="Unavailable", message="")
    assert court.said == [(FAILED, "refused after tokens")]


def test_an_ending_that_nobody_asked_for():
    court = Court().ask().tokens(0, IDS[:2]).end(2, "t11 t12 ", "killed")
    assert court.said == [(FAILED, "wrong ending")]


# ---------------------------------------------------------------- planted faults: text


@pytest.mark.parametrize("text", ["t11 t12 t13 t14 t15 ", ANSWER.text + "t16 ", ANSWER.text.replace("t13", "t31"), ""])
def test_text_that_does_not_belong_to_the_tokens(text):
    assert Court().ask().tokens(0, IDS, text).end(6, text).said == [(CHANGED, "text mismatch")]


def test_the_text_at_the_end_must_be_what_was_streamed():
    court = Court().ask(answer=None).tokens(0, (1, 2)).end(2, "t1 t3 ")
    assert court.said == [(CHANGED, "text mismatch")]


def test_the_end_must_count_what_was_streamed():
    assert Court().ask().tokens(0, IDS).end(5).said == [(CHANGED, "count mismatch")]


# ---------------------------------------------------------------- numbers and replies


def test_one_request_makes_one_sequence():
    court = Court().ask(key="k").tell("accepted", rid=7).tell("accepted", rid=8)
    assert court.said == [(DUPLICATED, "two sequences")]


def test_the_same_request_under_the_same_key_makes_one_sequence():
    court = Court().ask(key="k").tell("accepted", rid=7).tokens(0, IDS).end()
    court.tell("ask", req=2, verb="generate", key="k").tell("accepted", req=2, rid=7)
    assert court.said == []
    court.tell("ask", req=3, verb="generate", key="k").tell("accepted", req=3, rid=9)
    assert court.said == [(DUPLICATED, "two sequences")]


def test_a_number_is_never_used_again():
    court = Court().ask(key="a").tell("accepted", rid=7).tokens(0, IDS).end()
    court.tell("ask", client=1, verb="spawn", key="b").tell("reply", client=1, value={"rid": 7})
    assert court.said == [(CHANGED, "number used again")]


def test_a_reply_must_be_the_expected_one():
    append = Court().ask("append", answer=None, expect={"num_tokens": 9})
    assert append.tell("reply", value={"num_tokens": 9}).said == []
    wrong = Court().ask("append", answer=None, expect={"num_tokens": 9}).tell("reply", value={"num_tokens": 10})
    assert wrong.said == [(CHANGED, "wrong reply")]
    wait = Court().ask("wait", answer=None, expect={"reason": "length", "output_tokens": 6})
    assert wait.tell("reply", value={"reason": "executor_lost", "output_tokens": 2}).said == [(FAILED, "wrong ending")]


def test_the_checker_does_not_know_the_sdk():
    code = "import sys, chaos.judge, chaos.history; print([n for n in sys.modules if n.startswith(('llmos.client', 'zmq'))])"
    bench = Path(__file__).parents[2] / "bench"
    done = subprocess.run([sys.executable, "-c", code], cwd=bench, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
