"""A backend without a model: a token is a hash of (seed, position). Same ABI, same checks, no torch.

It honours lengths, pages and seeds but no sampling parameter that needs logits; where log-probabilities are asked for it reports
certainty (0.0). It claims host pages too: `host_cache_gib` at 64 bytes a token, and a microsecond to swap one.
`step_s`, in a process LLMOS_FAKE_STEP_MS (milliseconds), is how long a step lasts: as on a GPU the next one may be submitted meanwhile, and
begins when the one before is done. `check`, in a process
LLMOS_FAKE_CHECK=1, remembers what each page slot would hold and ends with an assertion when a row meets other tokens than its own.
LLMOS_FAKE_POISON=TOKEN kills the process whenever it computes that token, as a request might that hits a bug. LLMOS_FAKE_NAN=TOKEN[:N]
makes the numbers of a row that computes that token go bad, N times or always.
"""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path

import numpy as np

from llmos.codes import FinishReason
from llmos.config import ModelConfig
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import RowLogprobs, RowResult, StepPlan, TokenLogprobs
from llmos.protocol.prompt_logprobs import record_words
from llmos.services.executor import noise
from llmos.services.executor.backend import Capabilities, Limits, StepOutput, fitting_pages, with_defaults
from llmos.services.executor.fake_contents import PageContents
from llmos.services.executor.page_moves import read_moves
from llmos.services.executor.rows import Chunk, RowTable, Work
from llmos.services.executor.spec import CONFIG_FILE, limit_context, read_spec

DEFAULT_VOCAB = 32_000  # where the directory has no config.json
DEFAULT_CONTEXT = 8192
DEFAULT_PAGES = 4096
STEP_MS_VARIABLE = "LLMOS_FAKE_STEP_MS"
CHECK_VARIABLE = "LLMOS_FAKE_CHECK"
POISON_VARIABLE = "LLMOS_FAKE_POISON"
NAN_VARIABLE = "LLMOS_FAKE_NAN"
BYTES_PER_TOKEN = 64
POISONED_EXIT = 70
SWAP_US = 1.0


def fake_token(seed: int, position: int, vocab_size: int) -> int:
    """The token that the fake backend puts at `position` (from the start of the prompt) for a request with this seed."""
    return noise.stream_key(seed, position, noise.FAKE_DOMAIN) % vocab_size


class FakeBackend:
    """Executes plans by hashing."""

    window = 2

    def __init__(
        self, limits: Limits, *, vocab_size: int = DEFAULT_VOCAB, max_context: int = DEFAULT_CONTEXT,
        num_pages: int = DEFAULT_PAGES, page_size: int = 16, host_pages: int = 0, step_s: float = 0.0, check: bool = False,
        poison: int | None = None, nan: int | None = None, nan_times: int = -1,
    ) -> None:  # fmt: skip
        context = min(max_context, num_pages * page_size)
        self.capabilities = Capabilities(
            num_pages, page_size, limits.max_rows, limits.max_step_tokens, context, vocab_size, "none", "fake", host_pages,
            SWAP_US if host_pages else 0.0,
        )  # fmt: skip
        self.description = f"fake model, {vocab_size} tokens"
        self.step_s = step_s
        self.rows = RowTable(limits.max_rows, context, page_size, num_pages)
        self.poison, self.nan, self.nan_left = poison, nan, nan_times
        self.contents = PageContents(num_pages, page_size, host_pages) if check else None
        self._in_flight: deque[tuple[float, StepOutput]] = deque()  # when it is done, and what it gives

    @classmethod
    def open(cls, model: ModelConfig, directory: Path, limits: Limits) -> FakeBackend:
        """Vocabulary and context of the model directory, if there is one."""
        model = with_defaults(model)
        vocab_size, context = DEFAULT_VOCAB, model.max_context or DEFAULT_CONTEXT
        if (directory / CONFIG_FILE).exists():
            spec = read_spec(directory)
            vocab_size, context = spec.vocab_size, limit_context(spec, model.max_context)
        nan, _, times = os.environ.get(NAN_VARIABLE, "").partition(":")
        gib, page_bytes = model.host_cache_gib, model.page_size * BYTES_PER_TOKEN
        return cls(
            limits, vocab_size=vocab_size, max_context=context, num_pages=model.num_pages or DEFAULT_PAGES,
            page_size=model.page_size, host_pages=fitting_pages("host_cache_gib", gib, page_bytes) if gib else 0,
            step_s=float(os.environ.get(STEP_MS_VARIABLE, "0")) / 1000, check=os.environ.get(CHECK_VARIABLE) == "1",
            poison=int(poison) if (poison := os.environ.get(POISON_VARIABLE)) else None,
            nan=int(nan) if nan else None, nan_times=int(times or -1),
        )  # fmt: skip

    def reset(self) -> None:
        self._in_flight.clear()
        self.rows.clear()
        if self.contents is not None:
            self.contents.clear()

    def _touching(self, work: Work, token: int) -> list[int]:
        """Rows that compute that token in this step."""
        tokens, newest = self.rows.tokens, self.rows.length - 1
        decoding = [row for row in work.decode.tolist() if tokens[row, newest[row]] == token]
        return decoding + [chunk.row for chunk in work.chunks if token in tokens[chunk.row, chunk.start : chunk.end]]

    def _going_bad(self, work: Work) -> list[int]:
        """Rows whose numbers go bad in this step."""
        if self.nan is None or not self.nan_left:
            return []
        rows = self._touching(work, self.nan)
        self.nan_left -= bool(rows)
        self.rows.failed[rows] = True
        return rows

    def submit(self, plan: StepPlan) -> None:
        begins = max(time.monotonic(), self._in_flight[-1][0] if self._in_flight else 0.0)
        self._in_flight.append((begins + self.step_s, self._compute(plan)))

    def done(self, timeout_s: float) -> bool:
        left = self._in_flight[0][0] - time.monotonic()
        if left > 0:
            time.sleep(min(left, timeout_s))
        return left <= timeout_s

    def collect(self) -> StepOutput:
        ends, output = self._in_flight.popleft()
        if (left := ends - time.monotonic()) > 0:
            time.sleep(left)
        return output

    def execute(self, plan: StepPlan) -> StepOutput:
        """One step, from its plan to its result."""
        self.submit(plan)
        return self.collect()

    def _compute(self, plan: StepPlan) -> StepOutput:
        moves = read_moves(plan, self.capabilities.num_pages, self.capabilities.host_pages)
        work = self.rows.apply(plan)
        if self.poison is not None and self._touching(work, self.poison):
            os._exit(POISONED_EXIT)
        if self.contents is not None:
            self.contents.move(moves)
            self.contents.enter([add.row for add in plan.row_adds], work, self.rows)
            self.contents.compute(work, self.rows)
        self.rows.computed_to(work)
        bad = self._going_bad(work)
        asked = [*work.decode.tolist(), *(chunk.row for chunk in work.chunks if chunk.sample)]
        sampling = [row for row in asked if row not in bad] if bad else asked
        rows = np.array(sampling, dtype=np.int64)
        positions = self.rows.length[rows].tolist()
        seeds = self.rows.sampling.seed[rows].tolist()
        vocab_size = self.capabilities.vocab_size
        tokens = [fake_token(seed, position, vocab_size) for seed, position in zip(seeds, positions)]
        self.rows.append(rows, np.array(tokens, dtype=np.int64))
        logprobs = tuple(
            RowLogprobs(row, position, _certain(token, self.rows.sampling.logprobs[row]))
            for row, position, token in zip(sampling, positions, tokens)
            if self.rows.sampling.logprobs[row] >= 0
        )
        results = tuple(fake_records(self.rows, chunk) for chunk in work.chunks if _is_scored(self.rows, chunk, bad))
        samples = pack_i32(value for entry in zip(sampling, positions, tokens) for value in entry)
        failed = pack_i32(value for row in (*work.skipped, *bad) for value in (row, FinishReason.NUMERICAL_ERROR))
        return StepOutput(samples, logprobs, failed, results)


def _certain(token: int, count: int) -> TokenLogprobs:
    return TokenLogprobs(0.0, (token,), (0.0,)) if count else TokenLogprobs(0.0)


def _is_scored(rows: RowTable, chunk: Chunk, bad: list[int]) -> bool:
    """Did the row ask for its prompt's log-probabilities, and does the chunk make some known?"""
    wanted = rows.param(chunk.row).prompt_logprobs is not None and chunk.row not in bad
    return wanted and (chunk.start == 0 or chunk.start + 1 < rows.prompt_len[chunk.row])


def fake_records(rows: RowTable, chunk: Chunk) -> RowResult:
    """Certainty for each token of the prompt; of the first one nothing is known."""
    top = rows.param(chunk.row).prompt_logprobs or 0
    start = chunk.start + 1 if chunk.start else 0
    tokens = rows.tokens[chunk.row, start : min(chunk.end + 1, int(rows.prompt_len[chunk.row]))]
    words = np.full((len(tokens), record_words(top)), -1, "<i4")
    words[:, 0] = tokens
    floats = words.view("<f4")
    floats[:, [1, *range(2 + top, words.shape[1])]] = np.where(start + np.arange(len(tokens)) > 0, 0.0, np.nan)[:, None]
    return RowResult(chunk.row, start, words.tobytes())
