"""Kernel, executors, gateways and storage wired together, in virtual time. Every message passes the codec, as on a wire.

What arrives is compared with the ledger at once: tokens at gap-free offsets at whoever reads, with the values that are known beforehand;
one end per turn, at its reader; nothing to anybody about a sequence that it does not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from kernel_world import VOCAB, FakeExecutor

from llmos.codes import FinishReason
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.outbox import Send
from llmos.microkernel.scheduler import Scheduler
from llmos.microkernel.sender import Sender
from llmos.microkernel.tenants import TenantLimits
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, encode, unpack_i64
from simulation.journal import Journal
from simulation.ledger import Known, Ledger, Problem
from simulation.mirror import Mirror
from simulation.setup import Setup

GATES = ("g1", "g2", "g3")
SUPERVISOR = Sender(1, "supervisor", "supervisor")
_to_kernel: Schema[Any] = Schema(m.ToKernel)
_from_kernel: Schema[Any] = Schema(m.FromKernel)


class Storage:
    """Keeps tenants' limits over the lives of the microkernel; `peer` is 0 while it is not there."""

    def __init__(self, stored: Iterable[tuple[str, TenantLimits]]) -> None:
        self.table = dict(stored)
        self.peer = 0
        self.synced = False
        self.asked: list[tuple[int, int]] = []  # (the microkernel's number, who wants to know)


class World:
    """See the module docstring. `now` is virtual seconds."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.now = 0.0
        self.kernel = Kernel(setup.kernel_limits, setup.scheduler_limits, setup.models, 1, self.now)
        self.ledger = Ledger(setup.retention_s)
        self.storage = Storage(setup.stored)
        self._peers = len(GATES) + 10
        self.gates = {name: Sender(10 + index, "gateway", name) for index, name in enumerate(GATES)}
        self.mirrors: dict[str, Mirror] = {}
        self.shapes = {model: (setup.num_pages, setup.host_pages) for model in setup.models}
        self.charged: dict[tuple[str, str], list[float]] = {}
        self.replies: list[tuple[int, m.Message]] = []
        self.replaced: list[tuple[int, int]] = []  # (gateway, rid)
        self.ends: dict[int, tuple[int, m.SeqEnd]] = {}  # of this event: rid -> gateway and end
        self.waits: dict[tuple[int, int], Known] = {}  # (gateway, its req) -> of what
        self.last_req = 0
        self.asking = 0  # the gateway whose question storage is about to be asked
        self.starting: str = ""  # the model whose executor is about to be welcomed
        self.journal = Journal(self.kernel, self.now)

    # ------------------------------------------------------------ peers

    def new_peer(self) -> int:
        self._peers += 1
        return self._peers

    def scheduler(self, model: str) -> Scheduler | None:
        return self.kernel.state.lanes[model].scheduler

    def executor_sender(self, model: str) -> Sender:
        return Sender(self.mirrors[model].peer, "executor", f"executor.{model}")

    def start_executor(self, model: str) -> None:
        """A new executor process registers, whether or not there was one."""
        sender = Sender(self.new_peer(), "executor", f"executor.{model}")
        setup, (num_pages, host_pages) = self.setup, self.shapes[model]
        ready = m.ExecutorReady(
            model, num_pages, setup.page_size, setup.max_rows, setup.max_step_tokens, setup.max_context, VOCAB, "float32",
            "fake", host_pages, setup.swap_us,
        )  # fmt: skip
        self.mirrors.pop(model, None)
        self.starting = model
        self.send(sender, ready)
        assert model in self.mirrors, "the executor was not welcomed"

    # ------------------------------------------------------------ messages

    def next_req(self) -> int:
        self.last_req += 1
        return self.last_req

    def send(self, sender: Sender, message: m.Message) -> None:
        self.deliver(self.kernel.handle(sender, _to_kernel.decode(encode(message)), self.now))

    def tick(self) -> None:
        self.deliver(self.kernel.tick(self.now))

    def deliver(self, sends: list[Send]) -> None:
        self.journal.take()  # what happened is written down before anybody hears of it
        for send in sends:
            self._receive(send.peer, _from_kernel.decode(encode(send.message)))

    def _receive(self, peer: int, message: m.Message) -> None:
        if isinstance(message, m.SeqTokens):
            self._tokens(peer, message)
        elif isinstance(message, m.StepPlan):
            model = next(model for model, mirror in self.mirrors.items() if mirror.peer == peer)
            self.mirrors[model].issued(message, self.now, self.charged)
            self.mirrors[model].executor.inbox.append(message)
        elif isinstance(message, m.ExecutorWelcome):
            self._welcome(peer, message.generation)
        elif isinstance(message, m.SeqReplaced):
            self.replaced.append((peer, message.rid))
        elif isinstance(message, m.Waited):
            self._waited(peer, message)
        elif isinstance(message, (m.TenantStore, m.ModelState, m.ModelsGet)):
            self._stored(peer, message)
        else:
            self.replies.append((peer, message))

    def _welcome(self, peer: int, generation: int) -> None:
        model = self.starting
        scheduler = self.scheduler(model)
        assert scheduler is not None
        executor = FakeExecutor(generation, self.shapes[model][0], self.setup.page_size, self.shapes[model][1])
        self.mirrors[model] = Mirror(self.setup, self.ledger, executor, peer, model, scheduler)

    def _stored(self, peer: int, message: m.Message) -> None:
        assert peer == self.storage.peer, "a message to a storage service that is not there"
        if isinstance(message, m.TenantStore):
            row = message.tenant
            values = {name: getattr(row, name) for name in asdict(TenantLimits())}
            self.storage.table[row.tenant] = TenantLimits(**values)
        elif isinstance(message, m.ModelsGet):
            self.storage.asked.append((message.req, self.asking))

    def _waited(self, peer: int, message: m.Waited) -> None:
        known = self.waits.pop((peer, message.req))  # KeyError: answered twice, or never asked
        assert message.rid == known.rid
        record = self.kernel.state.ended[known.rid]
        assert message.reason == record.reason
        if known.last_end is not None:
            assert message.usage == known.last_end.usage

    # ------------------------------------------------------------ streams

    def _tokens(self, peer: int, message: m.SeqTokens) -> None:
        assert any(gate.peer == peer for gate in self.gates.values()), "tokens for a gateway that is gone"
        values = unpack_i64(message.columns)
        for rid, offset, token in zip(values[0::3], values[1::3], values[2::3]):
            self._token(peer, rid, offset, token)
        for entry in message.entries:
            assert entry.logprobs is not None
            assert len(entry.logprobs) == len(entry.ids)
            for index, token in enumerate(entry.ids):
                self._token(peer, entry.rid, entry.offset + index, token)
        for end in message.ends:
            known = self.ledger.by_rid[end.rid]
            assert known.reader == peer, f"{known.label}: its end went to {peer}, {known.reader} reads it"
            assert end.rid not in self.ends, f"{known.label}: two ends of one turn"
            self.ends[end.rid] = (peer, end)

    def _token(self, peer: int, rid: int, offset: int, token: int) -> None:
        known = self.ledger.by_rid[rid]
        assert known.reader == peer, f"{known.label}: a token went to {peer}, {known.reader} reads it"
        assert rid not in self.ends, f"{known.label}: a token after its end"
        assert offset == known.read, f"{known.label}: offset {offset}, expected {known.read}"
        assert offset < len(known.output), f"{known.label}: {offset + 1} tokens, it ends with {len(known.output)}"
        assert token == known.output[offset], (
            f"{known.label}: token {token} at {offset}, expected {known.output[offset]}"
        )
        known.read += 1

    # ------------------------------------------------------------ requests

    def ask(
        self, sender: Sender, message: Any, must: set[Problem], may: set[Problem] = frozenset()
    ) -> m.Message | None:
        """The answer to a request, or None if it was refused. Refused it is, by one of `must`, if there is any, else by one of `may`
        at most. A refusal changes nothing."""
        watch = bool(must or may) or message.req % 8 == 0
        before = self.digest() if watch else None
        count = len(self.replies)
        self.send(sender, message)
        answers = [answer for peer, answer in self.replies[count:] if peer == sender.peer]
        assert len(answers) == len(self.replies) - count <= 1, f"{message}: answered by {self.replies[count:]}"
        if not answers and isinstance(message, m.Wait):
            return message
        [answer] = answers
        assert answer.req == message.req
        if not isinstance(answer, m.Error):
            assert not must, f"{message}: not refused, though {must}"
            return answer
        assert (answer.code, answer.field) in must | may, f"{message}: {answer}; expected {must | may}"
        if before is not None:
            assert self.digest() == before, f"{message}: refused, but something changed"
        return None

    def tell(self, sender: Sender, message: m.Message, must: set[Problem] = frozenset()) -> None:
        """A message without `req`: silence, or an error."""
        before = self.digest() if must else None
        count = len(self.replies)
        self.send(sender, message)
        found = [(answer.code, answer.field) for _, answer in self.replies[count:]]
        if must:
            assert len(found) == 1, f"{message}: {self.replies[count:]}"
            assert found[0] in must
            assert self.digest() == before, f"{message}: refused, but something changed"
        else:
            assert not found, f"{message}: {self.replies[count:]}"

    def digest(self) -> list[Any]:
        """All that a refused request must leave as it is."""
        state = self.kernel.state
        found: list[Any] = [dict(state.tenant_limits), list(state.ended), state.storage, len(self.waits)]
        for seq in state.sequences.values():
            found.append(
                (
                    seq.rid, seq.reader, len(seq.tokens), seq.prompt_len, seq.max_len, seq.params, seq.nice, seq.deadline,
                    seq.state, seq.generating, seq.wants_prefill, tuple(seq.waits_for), seq.heir_of, tuple(seq.heirs), seq.row,
                    tuple(seq.page_table), tuple(seq.host_pages), seq.kept_tokens, seq.num_pending, seq.num_void, seq.forks,
                    seq.acked, seq.preemptions, seq.suspensions, seq.swaps, seq.started_at, seq.turn_at, seq.end,
                    seq.job.sequences, len(seq.job.members),
                )
            )  # fmt: skip
        for lane in state.lanes.values():
            found += [(lane.generation, lane.executor)]
            found += [(each.name, each.limits, each.pages, each.running, each.waiting, each.tokens, each.counter)
                      for each in lane.tenants.all if each.pages or each.running or each.waiting]  # fmt: skip
            if lane.scheduler is not None:
                pool = lane.scheduler.pool
                found += [
                    [seq.rid for seq in lane.scheduler.queue],
                    list(lane.scheduler.rows.order),
                    len(lane.scheduler.in_flight),
                ]
                found += [pool.refs.tobytes(), pool.num_free, pool.num_cached, lane.scheduler.residents.host.num_free]
        return found

    def lost_executor(self, model: str) -> dict[int, FinishReason]:
        """What ends with the executor of a model."""
        return {known.rid: FinishReason.EXECUTOR_LOST for known in self.ledger.live.values() if known.model == model}

    def recover(self) -> None:
        """Another microkernel process, from the journal of the one that died."""
        kernel = Kernel(self.setup.kernel_limits, self.setup.scheduler_limits, self.setup.models, 2, self.now)
        kernel.state.refusal = self.kernel.state.refusal
        self.journal.recover(kernel, self.now)
        self.kernel, self.journal = kernel, Journal(kernel, self.now)
