"""Who reads what: a request that leaves must not take the reader from one that comes."""

from __future__ import annotations

import pytest

from llmos.codes import FinishReason
from llmos.protocol import messages as m
from llmos.services.gateway.readers import Readers
from llmos.services.gateway.requests import Outbox
from llmos.services.gateway.streams import Stream

DETACH = m.SeqDetach(70)
CANCEL = m.SeqCancel(70, FinishReason.CANCELLED)


def stream(number: int) -> Stream:
    made = Stream(number, b"client", number, "", m.SeqAttach(number, 70))
    made.submit(0.0, Outbox())
    return made


@pytest.mark.parametrize("message", [DETACH, CANCEL])
def test_the_only_reader_leaves_at_once(message: m.SeqDetach | m.SeqCancel) -> None:
    readers, kernel, one = Readers(), [], stream(1)
    readers.begins(one)
    readers.leaves(message, kernel)
    readers.forget(one, kernel)
    assert kernel == [message]
    assert readers.get(70) is None


@pytest.mark.parametrize("message", [DETACH, CANCEL])
def test_who_leaves_while_another_asks_says_nothing_if_that_one_gets_it(message: m.SeqDetach | m.SeqCancel) -> None:
    readers, kernel, one, two = Readers(), [], stream(1), stream(2)
    readers.begins(one)
    readers.asks(two)
    readers.leaves(message, kernel)
    readers.forget(one, kernel)
    readers.answered(two, kernel, is_granted=True)
    assert readers.begins(two) is None
    assert kernel == []
    assert readers.get(70) is two


@pytest.mark.parametrize("message", [DETACH, CANCEL])
def test_who_leaves_while_others_ask_speaks_when_all_were_refused(message: m.SeqDetach | m.SeqCancel) -> None:
    readers, kernel, one, two, three = Readers(), [], stream(1), stream(2), stream(3)
    readers.begins(one)
    readers.asks(two)
    readers.asks(two)
    readers.asks(three)
    readers.leaves(message, kernel)
    readers.forget(one, kernel)
    readers.answered(two, kernel, is_granted=False)
    assert kernel == []
    readers.answered(three, kernel, is_granted=False)
    assert kernel == [message]
    readers.asks(two)
    readers.answered(two, kernel, is_granted=False)
    assert kernel == [message]


def test_who_asks_and_is_over_before_the_answer_counts_as_refused() -> None:
    readers, kernel, one, two = Readers(), [], stream(1), stream(2)
    readers.begins(one)
    readers.asks(two)
    readers.leaves(DETACH, kernel)
    readers.forget(one, kernel)
    readers.forget(two, kernel)
    assert kernel == [DETACH]


def test_what_was_kept_is_void_when_the_sequence_ends_or_goes_elsewhere() -> None:
    readers, kernel, one = Readers(), [], stream(1)
    readers.begins(one)
    two = stream(2)
    readers.asks(two)
    readers.leaves(DETACH, kernel)
    readers.forget(one, kernel)
    assert readers.stops(70) is None
    readers.answered(two, kernel, is_granted=False)
    assert kernel == []


def test_a_takeover_names_the_older_reader_and_forgetting_it_does_no_harm() -> None:
    readers, kernel, one, two = Readers(), [], stream(1), stream(2)
    readers.begins(one)
    assert readers.begins(one) is None
    assert readers.begins(two) is one
    readers.forget(one, kernel)
    assert readers.get(70) is two
    assert readers.stops(70) is two
    assert readers.get(70) is None


def test_clear_forgets_everything() -> None:
    readers, kernel = Readers(), []
    readers.begins(stream(1))
    readers.asks(stream(2))
    readers.leaves(DETACH, kernel)
    readers.clear()
    assert readers.get(70) is None
    readers.leaves(DETACH, kernel)
    assert kernel == [DETACH]
