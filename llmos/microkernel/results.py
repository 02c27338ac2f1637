"""What an executor computes for a sequence beside its tokens: the vector of a text for an encoder, or the log-probabilities of a prompt
that asked for them.

States of `Sequence.result`: empty -> growing by records, each token's once and in order (or the vector at once) -> complete. It is kept
with the sequence, live and ended, and sent whole to who attaches. The journal gets it with the end, and nothing before: whatever took
pages or executor away has the prompt computed again, and what came already is dropped. Invariant: records have no gap; where one would
be, the sequence computes its prompt anew.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmos.codes import FinishReason
from llmos.microkernel.commit import Outcome
from llmos.microkernel.plan import InFlightStep
from llmos.microkernel.rows import RowTable
from llmos.microkernel.sequence import Sequence
from llmos.protocol.messages import RowResult
from llmos.protocol.prompt_logprobs import record_bytes, record_words


def lacks_result(seq: Sequence) -> bool:
    """Is there something to compute for it beside tokens?"""
    if seq.encodes:
        return not seq.result
    top = seq.params.prompt_logprobs
    return top is not None and len(seq.result) < seq.prompt_len * record_words(top)


def take_results(
    rows: RowTable,
    step: InFlightStep,
    results: tuple[RowResult, ...],
    failed: NDArray[np.int32],
    output_size: int,
    outcome: Outcome,
) -> None:
    """After the tokens of a step were committed: what its chunks gave, and who has ended with that."""
    came = {result.row: result for result in results}
    went_bad = set(failed[:, 0].tolist()) if len(failed) else set()
    for place in range(step.num_decodes, len(step.rows)):
        seq = step.seqs[place]
        if seq.reason is not None or not (seq.silent or lacks_result(seq)):
            continue
        row, stored = int(step.rows[place]), int(step.stored[place])
        holds_row = bool(rows.epoch[row] == step.epochs[place])
        if row in went_bad:
            if holds_row and seq.silent:
                _fail(seq, outcome)
        elif not _take(seq, came.get(row), stored, output_size, holds_row, outcome):
            if holds_row and seq not in outcome.recompute:
                outcome.recompute.append(seq)
        elif holds_row and seq.silent and stored >= len(seq.tokens):
            outcome.ended.append((seq, FinishReason.STOP if seq.encodes else FinishReason.LENGTH))


def _fail(seq: Sequence, outcome: Outcome) -> None:
    """Its numbers went bad, and no sample would tell."""
    outcome.bad.append(seq)
    if not seq.may_try_again():
        outcome.ended.append((seq, FinishReason.NUMERICAL_ERROR))


def _take(
    seq: Sequence, came: RowResult | None, stored: int, output_size: int, holds_row: bool, outcome: Outcome
) -> bool:
    """Add what came; False if something is missing. A text whose row is gone is computed again, whatever came."""
    if seq.encodes:
        if came is None or came.start or len(came.values) != 4 * output_size:
            return False
        if holds_row:
            _add(seq, 0, came.values, outcome)
        return True
    if not lacks_result(seq):
        return True
    top = seq.params.prompt_logprobs
    assert top is not None
    size = record_bytes(top)
    have = len(seq.result) * seq.result.itemsize // size
    upto = min(stored + 1, seq.prompt_len)
    if have >= upto:
        return True
    if came is None or not 0 <= came.start <= have or len(came.values) != (upto - came.start) * size:
        return False
    _add(seq, have, came.values[(have - came.start) * size :], outcome)
    return True


def _add(seq: Sequence, start: int, values: bytes, outcome: Outcome) -> None:
    seq.result.frombytes(values)
    outcome.results.append((seq, start, values))
