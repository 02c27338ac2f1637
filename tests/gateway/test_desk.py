"""Turns at the tokenizer after one that died."""

from __future__ import annotations

from llmos.services.gateway.desk import TURN_S, Desk


class World:
    """Requests that are busy until they are taken out of `busy`."""

    def __init__(self) -> None:
        self.desk = Desk()
        self.busy: set[int] = set()

    def turns(self, now: float = 0.0) -> list[int]:
        found = []
        while (number := self.desk.next(self.busy.__contains__, now)) is not None:
            found.append(number)
        return found

    def lose(self, *strikes: tuple[int, int]) -> None:
        """The tokenizer dies; these want to talk to the next one, which is there at once."""
        self.desk.close()
        for number, count in strikes:
            assert not self.desk.admit(number, count)
        self.desk.open()


def test_before_there_is_a_tokenizer_everybody_waits() -> None:
    world = World()
    assert not world.desk.admit(1, 0)
    assert world.turns() == []
    world.desk.open()
    assert world.turns() == [1]


def test_while_nobody_waits_everybody_talks() -> None:
    world = World()
    world.desk.open()
    world.busy = {1, 2}
    assert world.desk.admit(1, 0)
    assert world.desk.admit(2, 0)
    assert world.turns() == []


def test_after_a_death_they_talk_one_at_a_time_in_their_order() -> None:
    world = World()
    world.busy = {1, 2, 3}
    world.lose((3, 0), (1, 1), (2, 1))
    assert world.turns() == [1]
    assert world.turns() == []
    world.busy.remove(1)
    assert world.turns() == [2]
    assert not world.desk.admit(4, 0)  # a newcomer
    assert not world.desk.admit(4, 0)
    world.busy -= {2, 3}
    assert world.turns() == [3, 4]
    assert world.desk.admit(5, 0)


def test_those_that_more_tokenizers_died_of_come_last() -> None:
    world = World()
    world.busy = {1, 2, 3, 4}
    world.lose((1, 2), (2, 1), (3, 0))
    assert world.turns() == [2]
    assert not world.desk.admit(4, 0)
    turns = [2]
    for _ in range(3):
        world.busy.remove(turns[-1])
        turns += world.turns()
    assert turns == [2, 3, 4, 1]


def test_a_turn_has_an_end() -> None:
    world = World()
    world.busy = {1, 2}
    world.lose((1, 1), (2, 1))
    assert world.turns(7.0) == [1]
    assert world.turns(7.0 + TURN_S - 0.01) == []
    assert world.turns(7.0 + TURN_S) == [2]


def test_a_death_forgets_who_waited_and_whose_turn_it_was() -> None:
    world = World()
    world.busy = {1, 2, 3}
    world.lose((1, 1), (2, 1))
    assert world.turns() == [1]
    world.lose((3, 1))
    assert world.turns() == [3]
    world.busy.clear()
    assert world.turns() == []
    assert world.desk.admit(1, 0)
