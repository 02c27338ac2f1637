"""From logits to tokens, for all sampling rows of a step at once.

Order for a row: penalties (repetition, then presence and frequency), logit bias, the grammar's mask, no stop tokens before `min_tokens`
(unless the grammar leaves nothing else), temperature, top-k, top-p over what top-k left, min-p, then the choice by `gumbel.choose`;
temperature 0 takes the largest logit (smallest id of equals). Tokens that tie with the last one that a filter keeps are kept too.
Log-probabilities are of the model's own logits.
Invariants: a row's token depends on its logits, its parameters, its tokens and its position only, never on its batch mates; a
row whose logits are not finite is reported and changes nothing for the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmos.protocol.messages import RowLogprobs, TokenLogprobs
from llmos.services.executor import gumbel
from llmos.services.executor.adjust import adjust_logits
from llmos.services.executor.grammars import Masks
from llmos.services.executor.rows import Ints, RowTable

Floats = npt.NDArray[np.float32]

# Candidates that top-k and top-p look at before they sort the whole vocabulary. A fixed number, so that no row's result
# depends on the settings of another.
_CANDIDATES = 256
_MIN_TEMPERATURE = 1e-30  # smaller ones would divide 0 by 0 in float32


@dataclass(frozen=True, slots=True)
class Sampled:
    """tokens[i] belongs to rows[i], at positions[i]; `failed` rows got none, and neither did `stuck` ones, whose grammars failed."""

    rows: Ints
    positions: Ints
    tokens: Ints
    failed: tuple[int, ...]
    logprobs: tuple[RowLogprobs, ...]
    stuck: tuple[int, ...] = ()


def sample(logits: Tensor, rows: Ints, table: RowTable, masks: Masks | None = None) -> Sampled:
    """Choose the next token of each of `rows`. logits: float32[rows, vocab], overwritten where a row failed. `masks`: what grammars
    allow; None if no row has one."""
    sampling = table.sampling
    finite = _finite(logits)
    if not finite.all():
        logits[~finite] = 0.0
    sound = finite.numpy().copy()
    special = np.flatnonzero(sampling.special[rows])
    processed = adjust_logits(logits, rows, special.tolist(), table, masks) if special.size else logits
    if special.size:
        finite &= processed.amax(1).isfinite()  # every token masked: nothing left to choose
        processed[~finite] = 0.0
    tokens = torch.zeros(len(rows), dtype=torch.int64)
    greedy = sampling.temperature[rows] == 0
    for pick, which in ((_greedy, np.flatnonzero(greedy)), (_random, np.flatnonzero(~greedy))):
        if which.size == len(rows):
            tokens = pick(processed, rows, table)
        elif which.size:
            index = torch.from_numpy(which)
            tokens[index] = pick(processed[index], rows[which], table)
    ok = finite.numpy()
    wanted = np.flatnonzero((sampling.logprobs[rows] >= 0) & ok)
    logprobs = _logprobs(logits, tokens, rows, wanted, table) if wanted.size else ()
    good = rows[ok]
    is_stuck = ~ok & sound & sampling.has_grammar[rows]
    failed, stuck = rows[~ok & ~is_stuck].tolist(), rows[is_stuck].tolist()
    return Sampled(good, table.length[good], tokens.numpy()[ok], tuple(failed), logprobs, tuple(stuck))


def _finite(logits: Tensor) -> Tensor:
    """bool[rows]: no NaN and no infinity in a row. Either makes the sum non-finite; one pass, no temporary."""
    return logits.sum(1).isfinite()


def _greedy(logits: Tensor, rows: Ints, table: RowTable) -> Tensor:
    return logits.argmax(1)


def _random(logits: Tensor, rows: Ints, table: RowTable) -> Tensor:
    """Tokens of rows with a temperature above 0: int64[rows]."""
    sampling = table.sampling
    keys = gumbel.stream_keys(sampling.seed[rows], table.length[rows])
    temperature = torch.from_numpy(np.maximum(sampling.temperature[rows], _MIN_TEMPERATURE))[:, None]
    scores = (logits - logits.amax(1, keepdim=True)).div_(
        temperature
    )  # the largest is 0: no overflow at small temperatures
    vocab_size = logits.shape[1]
    filtered = (sampling.top_k[rows] < vocab_size) | (sampling.top_p[rows] < 1.0)
    tokens = torch.empty(len(rows), dtype=torch.int64)
    if (wide := np.flatnonzero(~filtered)).size:
        chosen = scores[torch.from_numpy(wide)]
        floor = torch.from_numpy(sampling.log_min_p[rows[wide]])[:, None]
        chosen.masked_fill_(chosen < floor, float("-inf"))
        tokens[torch.from_numpy(wide)] = gumbel.choose(chosen, torch.arange(vocab_size), keys[wide])
    if (narrow := np.flatnonzero(filtered)).size:
        _sample_filtered(scores, narrow, rows, keys, table, tokens)
    return tokens


def _sample_filtered(
    scores: Tensor, which: Ints, rows: Ints, keys: npt.NDArray[np.uint64], table: RowTable, tokens: Tensor
) -> None:
    """Rows with top-k or top-p: look at the best candidates first, at the whole vocabulary for those whose set is larger."""
    for count in (min(_CANDIDATES, scores.shape[1]), scores.shape[1]):
        if not which.size:
            return
        index = torch.from_numpy(which)
        best, ids = torch.topk(scores[index], count, dim=1)
        kept, complete = _filter(scores[index], best, rows[which], table)
        done = complete | (count == scores.shape[1])
        if done.any():
            chosen = gumbel.choose(kept[done], ids[done], keys[which[done.numpy()]])
            tokens[index[done]] = ids[done].gather(1, chosen[:, None])[:, 0]
        which = which[~done.numpy()]


def _filter(scores: Tensor, best: Tensor, rows: Ints, table: RowTable) -> tuple[Tensor, Tensor]:
    """`best` (sorted, largest first) with -inf for what the filters drop, and whether no dropped or kept token was beyond `best`."""
    sampling = table.sampling
    count = best.shape[1]
    top_k = torch.from_numpy(np.minimum(sampling.top_k[rows], scores.shape[1]))[:, None]
    last = best.gather(1, top_k.clamp(max=count) - 1)  # of equal scores all are kept
    by_k = torch.where((best >= last) | (top_k > count), best, float("-inf"))
    limited = top_k[:, 0] <= count
    total = torch.where(limited, by_k.double().logsumexp(1), scores.double().logsumexp(1))
    share = (by_k.double() - total[:, None]).exp()
    before = share.cumsum(1) - share  # probability of everything more likely
    limit = np.where(sampling.top_p[rows] < 1.0, sampling.top_p[rows].astype(np.float64), np.inf)
    top_p = torch.from_numpy(limit)[:, None]
    inside = (before < top_p).sum(1, keepdim=True)  # how many are needed to reach top_p
    nucleus = by_k.gather(1, inside.clamp(min=1, max=count) - 1)
    floor = torch.from_numpy(sampling.log_min_p[rows])[:, None]
    kept = torch.where((by_k >= nucleus) & (by_k >= floor), by_k, float("-inf"))
    ended = best.new_tensor(float("-inf"))
    complete = (kept[:, -1] == ended) & (~limited | (by_k[:, -1] == ended))
    return kept, complete


def _logprobs(logits: Tensor, tokens: Tensor, rows: Ints, wanted: Ints, table: RowTable) -> tuple[RowLogprobs, ...]:
    """Natural log-probabilities of the raw logits for the rows that asked for them."""
    index = torch.from_numpy(wanted)
    raw = logits if len(wanted) == len(rows) else logits[index]
    total = raw.logsumexp(1, keepdim=True)
    own = (raw.gather(1, tokens[index][:, None]) - total)[:, 0].tolist()
    counts = table.sampling.logprobs[rows[wanted]].tolist()
    best, ids = torch.topk(raw, min(max(*counts, 1), raw.shape[1]), dim=1)
    best_lists, id_lists = (best - total).tolist(), ids.tolist()
    return tuple(
        RowLogprobs(row, position, TokenLogprobs(logprob, tuple(id_list[:count]), tuple(best_list[:count])))
        for row, position, logprob, count, id_list, best_list in zip(
            rows[wanted].tolist(), table.length[rows[wanted]].tolist(), own, counts, id_lists, best_lists
        )
    )
