"""A whole llmos in one thread: the real microkernel, a fake executor with the real ABI, gateways that remember what they got.

Virtual time, no sockets. The fake executor keeps KV as "which token was written where" and checks every read, so that a page
that was handed out too early, a wrong page table or a wrong position shows at once. Its token is a hash of (seed, position).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from llmos.microkernel.kernel import Kernel
from llmos.microkernel.limits import KernelLimits, SchedulerLimits
from llmos.microkernel.outbox import Send
from llmos.microkernel.sender import Sender
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, encode, pack_i32, unpack_i32, unpack_i64
from llmos.protocol.params import SamplingParams
from llmos.protocol.prompt_logprobs import record_words

VOCAB = 1000
GATEWAY = Sender(1, "gateway", "gateway")
CONTROL = Sender(3, "gateway", "gateway")
SUPERVISOR = Sender(4, "supervisor", "supervisor")
STORAGE = Sender(5, "storage", "storage")
_to_kernel = Schema(m.ToKernel)
_from_kernel = Schema(m.FromKernel)


@lru_cache(1 << 17)
def token_at(seed: int, position: int) -> int:
    """The fake executor's answer; what every stream must therefore be is known beforehand."""
    digest = hashlib.blake2b(b"%d %d" % (seed, position), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCAB


def params(**changes: object) -> SamplingParams:
    complete = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 7}
    return SamplingParams(**(complete | changes))


@dataclass
class Row:
    """A sequence in the executor. `chain[i]`: hash of its first i + 1 tokens; `slots[i]`: where the KV of token i belongs."""

    rid: int
    tokens: array
    pages: array
    computed: int
    seed: int
    failed: bool = False
    second_at: int = -1
    prompt_len: int = 0
    top: int | None = None
    chain: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    hashed: int = 0
    slots: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


class FakeExecutor:
    """Executes plans in order; `kv[page, slot]` is a hash of all tokens up to the one that was written there."""

    def __init__(
        self, generation: int, num_pages: int, page_size: int, host_pages: int = 0, output_size: int = 0
    ) -> None:
        self.output_size = output_size
        self.loses_results = False
        self.generation = generation
        self.page_size = page_size
        self.kv = np.zeros((num_pages, page_size), np.int64)  # 0: nothing was written there
        self.host = np.zeros((host_pages, page_size), np.int64)
        self.pages_copied = 0
        self.rows: dict[int, Row] = {}
        self.decode: list[int] = []
        self.inbox: deque[m.StepPlan] = deque()
        self.computed_tokens = 0
        self.fail_rows: dict[int, int] = {}  # rid -> reason; each fails `fail_times`, twice if that says nothing
        self.fail_times: dict[int, int] = {}
        self._flat = self.kv.reshape(-1)
        self._in_page = np.arange(page_size)

    def run_one(self) -> m.StepResult:
        plan = self.inbox.popleft()
        for row in unpack_i32(plan.row_frees):
            del self.rows[row]
        self._copy(plan)
        for add in plan.row_adds:
            assert add.row not in self.rows, f"row {add.row} added twice"
            assert add.params.seed is not None
            row = Row(
                add.rid, unpack_i32(add.tokens), unpack_i32(add.pages), add.num_computed, add.params.seed,
                second_at=add.second_at, prompt_len=add.prompt_len, top=add.params.prompt_logprobs,
            )  # fmt: skip
            self.rows[add.row] = row
            self._lay_out(row)
        appends = unpack_i32(plan.page_appends)
        for number, index, page in zip(appends[0::3], appends[1::3], appends[2::3]):
            row = self.rows[number]
            assert len(row.pages) == index
            row.pages.append(page)
            self._lay_out(row)
        if plan.decode is not None:
            self.decode = list(unpack_i32(plan.decode))
        samples: list[int] = []
        failed: list[int] = []
        results: list[m.RowResult] = []
        for number in self.decode:
            self._compute(self.rows[number], len(self.rows[number].tokens) - 1, 1)
            self._sample(number, samples, failed)
        prefill = unpack_i32(plan.prefill)
        for number, start, length, sample in zip(prefill[0::4], prefill[1::4], prefill[2::4], prefill[3::4]):
            self._compute(self.rows[number], start, length)
            if sample:
                self._sample(number, samples, failed)
            self._give(number, start, start + length, results, failed)
        if self.loses_results:
            results = []
        return m.StepResult(self.generation, plan.step, pack_i32(samples), (), pack_i32(failed), 10, 0, tuple(results))

    def _give(self, number: int, start: int, end: int, results: list[m.RowResult], failed: list[int]) -> None:
        """What a prefill gives beside tokens."""
        row = self.rows[number]
        if row.second_at >= 0:
            assert (start, end) == (0, len(row.tokens)), "a text is computed whole"
            if self._fails(row):
                failed += (number, 6)
            elif not row.failed:
                results.append(m.RowResult(number, 0, vector_of(row.tokens, row.second_at, self.output_size)))
        elif row.top is not None and not row.failed:
            first = start + 1 if start else 0
            if first < min(end + 1, row.prompt_len):
                records = records_of(row.tokens[: row.prompt_len], row.top)[first : end + 1]
                results.append(m.RowResult(number, first, records.tobytes()))

    def _copy(self, plan: m.StepPlan) -> None:
        """Page contents, in the order of the contract; within one kind all reads come before all writes."""
        for blob, source, target in (
            (plan.swap_out, self.kv, self.host),
            (plan.swap_in, self.host, self.kv),
            (plan.copies, self.kv, self.kv),
        ):
            if blob:
                pairs = np.frombuffer(blob, "<i4").reshape(-1, 2)
                assert len(set(pairs[:, 1].tolist())) == len(pairs), "two copies into one page"
                target[pairs[:, 1]] = source[pairs[:, 0]]
                self.pages_copied += len(pairs)

    def _lay_out(self, row: Row) -> None:
        row.slots = (np.asarray(row.pages)[:, None] * self.page_size + self._in_page).reshape(-1)

    def _compute(self, row: Row, start: int, length: int) -> None:
        if row.failed:
            return  # as the ABI says: nothing more comes from a failed row until it is freed
        assert start == row.computed, f"rid {row.rid}: computes from {start}, has {row.computed}"
        end = start + length
        assert end <= len(row.tokens)
        _hash(row, end)
        self._read(row, start)
        slots = row.slots[start:end]
        assert len(slots) == length, f"rid {row.rid}: {len(row.pages)} pages do not hold {end} tokens"
        self._flat[slots] = row.chain[start:end]
        row.computed = end
        self.computed_tokens += length

    def _read(self, row: Row, upto: int) -> None:
        """Every earlier slot must hold what this row's own prefix put there (or an equal prefix of another sequence)."""
        right = self._flat[row.slots[:upto]] == row.chain[:upto]
        if not right.all():
            position = int(right.argmin())
            page = row.pages[position // self.page_size]
            raise AssertionError(f"rid {row.rid}: page {page} does not hold position {position}")

    def _fails(self, row: Row) -> bool:
        """Is it this row's turn to fail?"""
        if row.rid not in self.fail_rows:
            return False
        self.fail_times[row.rid] = self.fail_times.get(row.rid, 2) - 1
        if not self.fail_times[row.rid]:
            del self.fail_rows[row.rid], self.fail_times[row.rid]
        row.failed = True
        return True

    def _sample(self, number: int, samples: list[int], failed: list[int]) -> None:
        row = self.rows[number]
        if row.failed:
            return
        reason = self.fail_rows.get(row.rid)
        if self._fails(row):
            failed += (number, int(reason))
            return
        token = token_at(row.seed, len(row.tokens))
        samples += (number, len(row.tokens), token)
        row.tokens.append(token)


def vector_of(tokens: array, second_at: int, size: int) -> bytes:
    """What the fake executor makes of a text."""
    return pack_i32([hash((tuple(tokens), second_at, index)) & 0xFFFFFF for index in range(size)])


def records_of(tokens: array, top: int) -> np.ndarray:
    """What the fake executor says of a prompt: int32[n, words], each a function of the tokens up to its own."""
    words = np.zeros((len(tokens), record_words(top)), "<i4")
    for position in range(len(tokens)):
        words[position] = hash(tuple(tokens[: position + 1])) & 0xFFFFFF
    words[:, 0] = tokens
    return words


def _hash(row: Row, end: int) -> None:
    """Have the chain for the first `end` tokens. Hashes of tuples of integers are the same in every process."""
    if end > len(row.chain):
        longer = np.zeros(max(32, 2 * end), np.int64)
        longer[: len(row.chain)] = row.chain
        row.chain = longer
    prefix = int(row.chain[row.hashed - 1]) if row.hashed else 1
    for position in range(row.hashed, end):
        prefix = hash((prefix, row.tokens[position]))
        row.chain[position] = prefix
    row.hashed = max(row.hashed, end)


@dataclass
class Stream:
    """What one gateway saw of one sequence."""

    prompt: list[int]
    params: SamplingParams
    ids: list[int] = field(default_factory=list)
    end: m.SeqEnd | None = None
    result: bytes = b""
    repeated: int = 0  # bytes of the result that came again
    inherited: int = 0  # a fork's first tokens were sampled with its parent's seed

    def take_result(self, start: int, values: bytes) -> None:
        size = 4 * record_words(self.params.prompt_logprobs or 0)
        known = len(self.result) - start * size
        assert known >= 0, f"a gap before {start}"
        assert self.result[start * size :][: len(values)] == values[:known]
        self.repeated += min(known, len(values))
        self.result += values[known:]

    def expected(self, count: int) -> list[int]:
        """What the output must be; `count` tokens."""
        assert self.params.seed is not None
        own = range(self.inherited, count)
        return self.ids[: self.inherited] + [token_at(self.params.seed, len(self.prompt) + i) for i in own]


class World:
    """Kernel, executor and gateway wired together."""

    vocab_size = VOCAB

    def __init__(
        self, num_pages: int = 64, page_size: int = 4, *, max_rows: int = 8, max_step_tokens: int = 32,
        steps_in_flight: int = 2, prefix_cache: bool = True, window: int = 10**6, max_context: int = 4096,
        ageing_s: float = 30.0, host_pages: int = 0, swap_us: float = 1.0, max_waiting: int = 1000,
        policy: str = "fair", share_prefixes: bool = False, retention_s: float = 600.0, idle_timeout_s: float = 3600.0,
        target_step_s: float = 0.0, output_size: int = 0,
    ) -> None:  # fmt: skip
        scheduling = SchedulerLimits(
            max_rows=max_rows, max_step_tokens=max_step_tokens, steps_in_flight=steps_in_flight,
            client_window_tokens=window, prefix_cache=prefix_cache, share_prefixes=share_prefixes, policy=policy,
            ageing_s=ageing_s, target_step_s=target_step_s,
        )  # fmt: skip
        self.now = 0.0
        self.limits = KernelLimits(max_waiting, retention_s, idle_timeout_s)
        self.kernel = Kernel(self.limits, scheduling, ("demo",), 1, self.now)
        self.host_shape = (host_pages, swap_us)
        self.output_size = output_size
        self.streams: dict[int, Stream] = {}
        self.replies: list[m.Message] = []
        self.executor: FakeExecutor | None = None
        self.executor_peer = 100
        self.shape = (num_pages, page_size, max_rows, max_step_tokens, max_context)
        self.plans: list[m.StepPlan] = []
        self._pending_submits: dict[int, Stream] = {}
        self._req = 0

    def start_executor(self) -> None:
        self.executor_peer += 1
        num_pages, page_size, max_rows, max_step_tokens, max_context = self.shape
        ready = m.ExecutorReady(
            "demo", num_pages, page_size, max_rows, max_step_tokens, max_context, self.vocab_size, "float32", "fake",
            *self.host_shape, self.output_size,
        )  # fmt: skip
        self.send(self._executor_sender(), ready)

    def make_executor(self, generation: int):
        """Who executes plans in this generation."""
        return FakeExecutor(generation, *self.shape[:2], self.host_shape[0], self.output_size)

    def row_add(self, rid: int) -> m.RowAdd:
        """How a sequence last entered the executor."""
        return next(add for plan in reversed(self.plans) for add in plan.row_adds if add.rid == rid)

    def kill_executor(self) -> None:
        self.executor = None
        self.send(SUPERVISOR, m.ServiceDown("executor", "executor.demo", 1))

    def submit(
        self,
        prompt: list[int],
        *,
        owner: str = "alice",
        nice: int = 0,
        deadline_ms: float | None = None,
        parent: int | None = None,
        after: tuple[int, ...] = (),
        second_at: int = -1,
        **sampling: object,
    ) -> int:
        """Submit and return the rid; raises AssertionError if it was refused."""
        self._req += 1
        stream = Stream(prompt, params(**sampling))
        self._pending_submits[self._req] = stream
        message = m.SeqSubmit(
            self._req, "demo", pack_i32(prompt), stream.params, owner, None, nice, deadline_ms, parent, after, second_at
        )
        self.send(GATEWAY, message)
        assert self._req not in self._pending_submits, f"refused: {self.replies[-1]}"
        return max(self.streams)

    def spawn(self, prompt: list[int], *, owner: str = "alice", **options: object) -> int:
        """An open sequence; raises AssertionError if it was refused."""
        self._req += 1
        self._pending_submits[self._req] = Stream(prompt, params())
        self.send(GATEWAY, m.SeqSpawn(self._req, "demo", pack_i32(prompt), owner, **options))
        assert self._req not in self._pending_submits, f"refused: {self.replies[-1]}"
        return max(self.streams)

    def append(self, rid: int, tokens: list[int]) -> None:
        """More input for an open sequence; raises AssertionError if it was refused."""
        answer = self.ask(m.SeqAppend(self._next(), rid, "demo", pack_i32(tokens)), GATEWAY)
        assert isinstance(answer, m.SeqAppended), answer
        stream = self.streams[rid]
        stream.prompt, stream.ids = [*stream.prompt, *stream.ids, *tokens], []
        assert answer.num_tokens == len(stream.prompt)

    def continue_(self, rid: int, *, deadline_ms: float | None = None, **sampling: object) -> None:
        """A turn of an open sequence; raises AssertionError if it was refused."""
        chosen = params(**sampling)
        stream = self.streams[rid]
        before = stream.prompt, stream.ids, stream.end, stream.params
        stream.prompt, stream.ids, stream.end, stream.params = [*stream.prompt, *stream.ids], [], None, chosen
        answer = self.ask(m.SeqContinue(self._next(), rid, "demo", chosen, deadline_ms), GATEWAY)
        if not isinstance(answer, m.SeqAttached):
            stream.prompt, stream.ids, stream.end, stream.params = before
        assert isinstance(answer, m.SeqAttached), answer
        assert answer.prompt_tokens == len(stream.prompt)

    def fork(self, rid: int, count: int = 1) -> tuple[int, ...]:
        """Children of a live sequence; what they got so far is what the parent got. They have no reader yet."""
        answer = self.ask(m.Fork(self._next(), rid, count))
        assert isinstance(answer, m.Forked), answer
        for child in answer.rids:
            seq, parent = self.kernel.state.sequences[child], self.streams[rid]
            output = list(seq.tokens[seq.prompt_len :])
            prompt = list(seq.tokens[: seq.prompt_len])
            self.streams[child] = Stream(prompt, seq.params, output, inherited=len(output))
            assert output == parent.ids[: len(output)] or not seq.generating
        return answer.rids

    def attach(self, rid: int) -> None:
        """Read a sequence from the start of its output."""
        answer = self.ask(m.SeqAttach(self._next(), rid), GATEWAY)
        assert isinstance(answer, m.SeqAttached), answer
        stream = self.streams[rid]
        ids = list(unpack_i32(answer.output))
        assert ids[: len(stream.ids)] == stream.ids
        stream.ids = ids
        stream.take_result(0, answer.result)
        if answer.end is not None:
            stream.end = answer.end

    def ask(self, message: m.Message, sender: Sender = CONTROL) -> m.Message:
        """The answer to a request."""
        count = len(self.replies)
        self.send(sender, message)
        answers = [reply for reply in self.replies[count:] if getattr(reply, "req", None) == message.req]
        assert len(answers) == 1, f"{message}: {answers}"
        return answers[0]

    def _next(self) -> int:
        self._req += 1
        return self._req

    def send(self, sender: Sender, message: m.Message) -> None:
        """A message on its way into the kernel passes the codec, like on a wire."""
        self._deliver(self.kernel.handle(sender, _to_kernel.decode(encode(message)), self.now))
        self._deliver(self.kernel.tick(self.now))

    def step(self) -> bool:
        """The executor finishes one plan. False if it has none."""
        if self.executor is None or not self.executor.inbox:
            return False
        self.now += 0.01
        self.send(self._executor_sender(), self.executor.run_one())
        self.kernel.check()
        return True

    def run(self, most_steps: int = 100_000) -> int:
        """Until nothing is left to do; returns the number of steps."""
        for count in range(most_steps):
            if not self.step():
                return count
        raise AssertionError("does not come to rest")

    def _executor_sender(self) -> Sender:
        return Sender(self.executor_peer, "executor", "executor.demo")

    def _deliver(self, sends: list[Send]) -> None:
        for send in sends:
            message = _from_kernel.decode(encode(send.message))
            if isinstance(message, m.ExecutorWelcome):
                self.executor = self.make_executor(message.generation)
            elif isinstance(message, m.StepPlan):
                self.plans.append(message)
                if self.executor is not None and send.peer == self.executor_peer:
                    self.executor.inbox.append(message)
            elif isinstance(message, m.SeqAccepted):
                self.streams[message.rid] = self._pending_submits.pop(message.req)
            elif isinstance(message, m.SeqTokens):
                self._tokens(message)
            else:
                self.replies.append(message)

    def _tokens(self, message: m.SeqTokens) -> None:
        for result in message.results:
            stream = self.streams[result.rid]
            assert stream.end is None
            stream.take_result(result.start, result.values)
        values = unpack_i64(message.columns)
        columns = [m.TokenEntry(*triple[:2], triple[2:]) for triple in zip(values[0::3], values[1::3], values[2::3])]
        for entry in (*message.entries, *columns):
            stream = self.streams[entry.rid]
            assert stream.end is None, f"rid {entry.rid}: token after its end"
            assert entry.offset == len(stream.ids), (
                f"rid {entry.rid}: offset {entry.offset}, expected {len(stream.ids)}"
            )
            stream.ids += entry.ids
        for end in message.ends:
            assert self.streams[end.rid].end is None, f"rid {end.rid} ended twice"
            self.streams[end.rid].end = end
