"""`PlanDriver` plays the microkernel for one backend: pages, chunked prefill, decode, preemption by recompute, copy-on-write,
swapping. For tests only."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass, field

from llmos.protocol.codec import pack_i32, unpack_i32
from llmos.protocol.messages import RowAdd, StepPlan, TokenLogprobs
from llmos.protocol.params import SamplingParams


@dataclass(eq=False)
class Seq:
    """A sequence as the driver sees it. Without a row it may hold pages that it enters with, or host pages while swapped out."""

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    row: int | None = None
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    host_pages: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    failed: int | None = None

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def done(self) -> bool:
        return self.failed is not None or len(self.output) >= self.max_tokens


class PlanDriver:
    """Adds sequences, steps them, checks the addresses of all results. `chunk`: most prefill tokens per row and step."""

    def __init__(self, backend, *, chunk: int = 1_000_000) -> None:
        self.backend = backend
        self.chunk = chunk
        self.page_size = backend.capabilities.page_size
        # Last freed, first used: stale contents are met at once.
        self.free_pages = list(range(backend.capabilities.num_pages))
        self.free_host_pages = list(range(backend.capabilities.host_pages))
        self.free_rows = list(range(backend.capabilities.max_rows))
        self._forget_moves()
        self.seqs: list[Seq] = []
        self.frees: list[int] = []
        self.last_decode: list[int] = []
        self.step_numbers = itertools.count(1)
        self.same_decode_plans = 0

    def add(self, prompt: list[int], max_tokens: int, *, prefix_of: Seq | None = None, **params) -> Seq:
        """A new sequence; `prefix_of` shares that sequence's full pages, as the prefix cache does."""
        seq = Seq(list(prompt), SamplingParams(**{"temperature": 0.0, "seed": 0} | params), max_tokens, list(prompt))
        if prefix_of is not None:
            num_pages = _common(prefix_of, seq) // self.page_size
            self._enter_with(seq, prefix_of.pages[:num_pages], num_pages * self.page_size)
        self.seqs.append(seq)
        return seq

    def fork(self, parent: Seq, max_tokens: int, *, prompt: list[int] | None = None, **params) -> Seq:
        """A copy of `parent`, or a sequence that goes on from it as far as `prompt` is alike; the last page is copied if partial."""
        child = self.add(prompt or parent.prompt, max_tokens, **params)
        child.tokens = list(prompt or parent.tokens)
        shared = _common(parent, child)
        pages = parent.pages[: shared // self.page_size]
        if shared % self.page_size:
            source, target = parent.pages[len(pages)], self.free_pages.pop()
            self.copies += (source, target)
            pages.append(target)
        self._enter_with(child, pages, shared)
        return child

    def release(self, seq: Seq) -> None:
        """End or preempt: the row and the pages are free at the next step."""
        self._take_row(seq)
        self._let_go(seq)
        seq.computed = 0

    def swap_out(self, seq: Seq) -> None:
        """The sequence loses its row, and its pages move to the host at the next step."""
        self._take_row(seq)
        seq.host_pages = [self.free_host_pages.pop() for _ in seq.pages]
        self.out += [page for pair in zip(seq.pages, seq.host_pages) for page in pair]
        self._let_go(seq)

    def swap_in(self, seq: Seq) -> None:
        """Its pages come back, to others than before, and it goes on, at the next step."""
        seq.pages = [self.free_pages.pop() for _ in seq.host_pages]
        self.back += [page for pair in zip(seq.host_pages, seq.pages) for page in pair]
        self.returned += seq.host_pages
        seq.host_pages = []

    def step(self) -> None:
        """One plan and its result."""
        plan, expected = self._plan()
        output = self.backend.execute(plan)
        self.free_host_pages += self.returned  # not before: a plan swaps out before it swaps in
        self._forget_moves()
        by_row = {seq.row: seq for seq in self.seqs if seq.row is not None}
        for row, reason in _triples(output.failed, 2):
            by_row[row].failed = reason
            expected.remove(row)
        for row, position, token in _triples(output.samples, 3):
            assert position == len(by_row[row].tokens), "position is the next one"
            by_row[row].tokens.append(token)
            expected.remove(row)
        assert not expected, f"rows without a result: {expected}"
        for entry in output.logprobs:
            assert entry.position == len(by_row[entry.row].tokens) - 1
            by_row[entry.row].logprobs.append(entry.logprobs)
        for seq in [seq for seq in self.seqs if seq.row is not None and seq.done]:
            self.release(seq)

    def run(self) -> None:
        """Until all are done but those that are swapped out."""
        while any(not seq.done and not seq.host_pages for seq in self.seqs):
            self.step()

    def _enter_with(self, seq: Seq, pages: list[int], num_tokens: int) -> None:
        seq.pages, seq.computed = list(pages), num_tokens

    def _take_row(self, seq: Seq) -> None:
        assert seq.row is not None
        self.frees.append(seq.row)
        self.free_rows.append(seq.row)
        seq.row = None

    def _let_go(self, seq: Seq) -> None:
        used_by_others = {page for other in self.seqs if other is not seq for page in other.pages}
        self.free_pages.extend(page for page in seq.pages if page not in used_by_others)
        seq.pages = []

    def _forget_moves(self) -> None:
        self.out, self.back, self.copies, self.returned = [], [], [], []

    def _plan(self) -> tuple[StepPlan, set[int]]:
        frees, self.frees = self.frees, []
        entering = [seq for seq in self.seqs if seq.row is None and not seq.done and not seq.host_pages]
        adds = [self._add_row(seq) for seq in entering[: len(self.free_rows)]]
        appends, prefill, decode = array("i"), array("i"), []
        for seq in [seq for seq in self.seqs if seq.row is not None]:
            left = len(seq.tokens) - seq.computed
            length = min(left, self.chunk)
            while len(seq.pages) * self.page_size < seq.computed + length:
                appends.extend((seq.row, len(seq.pages), self.free_pages[-1]))
                seq.pages.append(self.free_pages.pop())
            if left == 1 and seq.computed >= len(seq.prompt):
                decode.append(seq.row)
            else:
                prefill.extend((seq.row, seq.computed, length, int(length == left)))
            seq.computed += length
        same = decode == self.last_decode and not frees
        self.same_decode_plans += same
        self.last_decode = decode
        expected = set(decode) | {row for row, _, _, sample in _triples(prefill.tobytes(), 4) if sample}
        blob = None if same else pack_i32(decode)
        step = next(self.step_numbers)
        moves = (pack_i32(pairs) for pairs in (self.out, self.back, self.copies))
        plan = StepPlan(1, step, pack_i32(frees), tuple(adds), appends.tobytes(), prefill.tobytes(), blob, *moves)
        return plan, expected

    def _add_row(self, seq: Seq) -> RowAdd:
        seq.row = self.free_rows.pop()
        return RowAdd(seq.row, 7, pack_i32(seq.tokens), len(seq.prompt), seq.computed, pack_i32(seq.pages), seq.params)


def _common(parent: Seq, child: Seq) -> int:
    """Tokens that the parent has computed and the child need not."""
    pairs = zip(parent.tokens[: parent.computed], child.tokens[:-1])
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(parent.computed, len(child.tokens) - 1))


def _triples(blob: bytes, width: int) -> list[tuple[int, ...]]:
    values = unpack_i32(blob).tolist()
    return [tuple(values[i : i + width]) for i in range(0, len(values), width)]
