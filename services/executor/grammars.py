"""What grammars allow the rows of a step, worked out in threads while the forward pass runs. Imports no torch.

    masks = grammars.begin(rows, table)      before the forward pass; None if none of `rows` has a grammar: then nothing is done
    sample(..., masks.wait())                behind it

A row's state is a fold over its grammar and its output (services/grammar/follow.py): what was followed for a row is only kept to save
time, under the very parameters that the row was added with, and built anew whenever those are not there. So there is nothing to tell
it when rows are freed, preempted, swapped, forked or computed by another executor.
Invariants: a grammar that can not be followed, or takes longer than `PATIENCE_S`, is the matter of its row alone; the vocabulary is
read when the first grammar comes, so that an executor without any pays nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmos.errors import LlmosError
from llmos.protocol.params import SamplingParams

if TYPE_CHECKING:
    from llmos.services.executor.rows import Ints, RowTable
    from llmos.services.grammar.follow import Follower

log = logging.getLogger(__name__)

PATIENCE_S = 1.0  # beyond the forward pass; a mask takes well below a millisecond
_FIRST_PATIENCE_S = 30.0  # the first time the vocabulary has to be read
_THREADS = 4
Words = npt.NDArray[np.int32]


class Masks:
    """What may come next: for each row int32 words, 32 tokens each, lowest bit first. A row whose grammar failed has none."""

    def __init__(self, words: dict[int, Words]) -> None:
        self._words = words

    def of(self, row: int) -> Words | None:
        return self._words.get(row)

    def stacked(self) -> tuple[list[int], Words]:
        """(rows, their words int32[rows, words]) for backends that want all of them in one piece."""
        return list(self._words), np.stack(list(self._words.values())) if self._words else np.zeros((0, 0), np.int32)


class PendingMasks:
    def __init__(self, jobs: dict[int, Future[Words | None]], patience_s: float, on_late: Callable[[], None]) -> None:
        self._jobs = jobs
        self._patience_s = patience_s
        self._on_late = on_late

    def wait(self) -> Masks:
        late = wait(self._jobs.values(), self._patience_s).not_done
        if late:
            log.error("%d grammars took longer than %.1f s for one token: given up", len(late), self._patience_s)
            self._on_late()
        done = {row: _result(job) for row, job in self._jobs.items() if job not in late}
        return Masks({row: words for row, words in done.items() if words is not None})


def _result(job: Future[Words | None]) -> Words | None:
    """None also if the library broke down over it, which may be the grammar's doing: that must not be everybody's end."""
    if (problem := job.exception()) is not None:
        log.error("a grammar broke down", exc_info=problem)
        return None
    return job.result()


class Grammars:
    """`load` gives the vocabulary; what it raises concerns the rows that need it."""

    def __init__(self, load: Callable[[], Any], vocab_size: int) -> None:
        self._load = cache(load)
        self._num_words = (vocab_size + 31) // 32
        self._followed: dict[int, tuple[SamplingParams, _Row]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._is_ready = False

    @classmethod
    def of_model(cls, directory: Path, vocab_size: int) -> Grammars:
        def load() -> Any:
            from llmos.services.grammar.vocabulary import load_vocabulary

            return load_vocabulary(directory, vocab_size)

        return cls(load, vocab_size)

    def begin(self, rows: Ints, table: RowTable) -> PendingMasks | None:
        """Start on the masks of those of `rows` that have a grammar and sample now."""
        wanted = rows[table.sampling.has_grammar[rows]].tolist()
        if not wanted:
            return None
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        self._forget(table)
        jobs = {}
        for row in wanted:
            output = table.tokens[row, table.prompt_len[row] : table.length[row]].tolist()
            jobs[row] = self._threads.submit(self._row(row, table.param(row)).next, output)
        patience_s = PATIENCE_S if self._is_ready else _FIRST_PATIENCE_S
        self._is_ready = True
        return PendingMasks(jobs, patience_s, self._give_up)

    def _row(self, row: int, params: SamplingParams) -> _Row:
        known = self._followed.get(row)
        if known is None or known[0] is not params:
            known = self._followed[row] = (params, _Row(self._load, params, self._num_words))
        return known[1]

    def _forget(self, table: RowTable) -> None:
        """Rows that were freed meanwhile, or given to others."""
        for row, (params, _) in list(self._followed.items()):
            if table.params[row] is not params:
                del self._followed[row]

    def _give_up(self) -> None:
        """A thread can not be stopped: leave those that hang alone, and take others."""
        assert self._threads is not None
        self._threads.shutdown(wait=False)
        self._threads = None


class _Row:
    """One row's grammar. Its first call makes the follower, in a thread too."""

    def __init__(self, load: Callable[[], Any], params: SamplingParams, num_words: int) -> None:
        self._load = load
        self._params = params
        self._num_words = num_words
        self._follower: Follower | None = None

    def next(self, output: list[int]) -> Words | None:
        """What may follow `output`; None: nothing."""
        try:
            if self._follower is None:
                self._follower = self._begin()
            follower = self._follower
            follower.follow(output)
            words = np.empty(self._num_words, dtype=np.int32)
            if follower.fill(words):
                return words if len(output) >= self._params.min_tokens else follower.without_stops(words)
            log.warning("a grammar allows nothing after %d tokens: %s", len(output), follower.problem or "dead end")
        except (LlmosError, ValueError) as error:
            log.warning("a grammar can not be followed: %s", error)
        return None

    def _begin(self) -> Follower:
        from llmos.services.grammar.follow import Follower  # needs the library, which only executors with grammars load

        grammar = self._params.grammar
        assert grammar is not None
        return Follower(self._load(), grammar, self._params.stop_token_ids)
