"""Commit one step's result to its sequences: a token counts only if it is exactly the next one of its sequence.

The usual case (everything that was asked came, nobody left meanwhile) is a handful of vector operations, and fewer if it was foreseen
(steady.py); anything else takes the careful path, row by row. Invariant: whatever an executor sends, a sequence's committed tokens are
positions 0..k-1, each written once; what did not come or does not fit makes its sequence recompute, never the microkernel fail.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmos.codes import FinishReason, SeqState
from llmos.microkernel.plan import EMPTY, InFlightStep, append_each, equal
from llmos.microkernel.rows import Ints, RowTable
from llmos.microkernel.sequence import Sequence


@dataclass(slots=True)
class Outcome:
    """What a step committed: columns of equal length, one entry per token, and the sequences that need attention.

    `rows` and `positions` are where the executor sampled; `offsets` count from the start of the output. `ended`: sequences with the
    reason why. `recompute`: a token or a result is missing. `bad`: numbers of these went bad, so what their pages hold is not to be trusted
    by anybody; they compute it again, or are among `ended`. `results`: what is new beside tokens, and from which token on (results.py).
    Arrays are valid until the next step is committed. `batches`: if they are there already, the columns for each reader as on the wire,
    and `everything` all of them.
    """

    rows: Ints = field(default_factory=lambda: EMPTY)
    positions: Ints = field(default_factory=lambda: EMPTY)
    tokens: Ints = field(default_factory=lambda: EMPTY)
    rids: Ints = field(default_factory=lambda: EMPTY)
    offsets: Ints = field(default_factory=lambda: EMPTY)
    readers: Ints = field(default_factory=lambda: EMPTY)
    seqs: list[Sequence] = field(default_factory=list)
    ended: list[tuple[Sequence, FinishReason]] = field(default_factory=list)
    recompute: list[Sequence] = field(default_factory=list)
    bad: list[Sequence] = field(default_factory=list)
    results: list[tuple[Sequence, int, bytes]] = field(default_factory=list)
    everything: bytes = b""
    batches: list[tuple[int, bytes]] | None = None


def commit_step(
    rows: RowTable, step: InFlightStep, samples: NDArray[np.int32], failed: NDArray[np.int32], vocab_size: int
) -> Outcome:
    """Append the step's tokens to their sequences. See `Scheduler.complete` for the shapes."""
    if step.steady is not None and not len(failed):
        outcome = step.steady.commit(rows, step.index, samples, vocab_size)
        if outcome is not None:
            return outcome
    return _commit_any(rows, step, samples.astype(np.int64), failed, vocab_size)


def _commit_any(
    rows: RowTable, step: InFlightStep, samples: Ints, failed: NDArray[np.int32], vocab_size: int
) -> Outcome:
    sampling = len(step.rows) - step.num_silent
    asked, positions, epochs = step.rows[:sampling], step.stored[:sampling], step.epochs[:sampling]
    seqs = step.seqs[:sampling] if step.num_silent else step.seqs
    as_asked = (
        not len(failed)
        and len(samples) == len(asked)
        and equal(samples[:, 0], asked)
        and equal(samples[:, 1], positions)
        and equal(rows.epoch[asked], epochs)
        and equal(rows.known[asked], positions)
        and (not len(samples) or (samples[:, 2].min() >= 0 and samples[:, 2].max() < vocab_size))
    )
    if as_asked:
        offsets = positions - rows.prompt_len[asked]
        outcome = Outcome(asked, positions, samples[:, 2], rows.rid[asked], offsets, rows.reader[asked], seqs)
        _append(rows, outcome, step.logs if len(step.logs) == sampling else step.logs[:sampling])
        return outcome
    return _careful(rows, (asked, positions, epochs, seqs), samples, failed, vocab_size)


def _append(rows: RowTable, outcome: Outcome, logs: list[array[int]]) -> None:
    """Commit tokens of sequences that all still hold the rows they were sampled in."""
    held, tokens = outcome.rows, outcome.tokens
    rows.known[held] += 1
    rows.pending[held] -= 1
    listed = tokens.tolist()
    append_each(logs, listed)
    known = rows.known[held]
    ends = known >= rows.max_len[held]
    if not rows.stop_ids.isdisjoint(listed):
        ends |= rows.hits_stop(held, tokens, known)
    if not ends.any():
        return
    for place in np.flatnonzero(ends).tolist():
        _note_end(outcome, outcome.seqs[place], int(tokens[place]))


def _note_end(outcome: Outcome, seq: Sequence, token: int) -> None:
    reason = seq.ends_with(token)
    if reason is not None:
        outcome.ended.append((seq, reason))


def _careful(
    rows: RowTable,
    asked: tuple[Ints, Ints, Ints, list[Sequence]],
    samples: Ints,
    failed: NDArray[np.int32],
    vocab_size: int,
) -> Outcome:
    """Row by row: late results of sequences that left their row, failed rows, missing and impossible tokens."""
    came = {(row, position): token for row, position, token in samples.tolist() if 0 <= token < vocab_size}
    went_bad = dict(failed.tolist())
    outcome = Outcome()
    committed: list[tuple[int, int, int]] = []
    for row, position, epoch, seq in zip(asked[0].tolist(), asked[1].tolist(), asked[2].tolist(), asked[3]):
        holds_row = rows.epoch[row] == epoch
        if holds_row:
            rows.pending[row] -= 1
        else:
            seq.num_pending -= 1
            if seq.num_void:
                seq.num_void -= 1
                continue
        if seq.state is SeqState.FINISHED:
            continue
        token = came.get((row, position))
        if token is not None and position == len(seq.tokens):
            seq.tokens.append(token)
            if holds_row:
                rows.known[row] += 1
            committed.append((row, position, token))
            outcome.seqs.append(seq)
            _note_end(outcome, seq, token)
        elif row in went_bad and holds_row and _is_stuck(seq, went_bad[row]):
            outcome.ended.append((seq, FinishReason.GRAMMAR_FAILED))
        elif row in went_bad and holds_row:
            # An executor may only say that a row's numbers went bad; whatever other reason it gives is taken as that.
            outcome.bad.append(seq)
            if not seq.may_try_again():
                outcome.ended.append((seq, FinishReason.NUMERICAL_ERROR))
        else:
            outcome.recompute.append(seq)
    if committed:
        outcome.rows, outcome.positions, outcome.tokens = np.array(committed, np.int64).T
        places = [(seq.rid, seq.prompt_len, seq.reader) for seq in outcome.seqs]
        outcome.rids, prompt_lens, outcome.readers = np.array(places, np.int64).T
        outcome.offsets = outcome.positions - prompt_lens
    return outcome


def _is_stuck(seq: Sequence, reason: int) -> bool:
    """Did its grammar come to where nothing goes on? Every executor would find the same."""
    return reason == FinishReason.GRAMMAR_FAILED and seq.params.grammar is not None
