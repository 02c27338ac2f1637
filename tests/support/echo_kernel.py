"""A microkernel without a model: it echoes. Output token i is token i, modulo their number, of what was there before the output, until
max_tokens. So the right answer to every request is known, and every stream's content is different.

It keeps the contract of the sequences and verbs (readers, open sequences, forks, jobs, waits), not their cost: there are no pages,
quotas or priorities. All of its switches are plain attributes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
from echo_sequence import MAX_CONTEXT, EchoSequence, explained, row_of, tenant_row, usage

from llmos.codes import FinishReason
from llmos.errors import InvalidRequest, LlmosError, NotFound, WrongState
from llmos.ports.aio import AsyncListener
from llmos.ports.core import Peer
from llmos.ports.endpoint import RunDir
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, pack_i32, unpack_i32
from llmos.protocol.failures import error_message

TENANT_LIMITS = ("weight", "max_pages", "guaranteed_pages", "max_running", "max_waiting", "tokens_per_s")


class EchoKernel:
    """`paused`: accepts and then waits. `silent`: does not even answer questions about sequences. `mute`: does everything and tells
    nobody. `fatal`: at the first message of this type it is as good as dead, after it did what it was asked if `fatal_is_done`.
    `tokens_per_step` for each sequence. `window`: a reader that is so far behind gets nothing more. `died`: the one whose
    place it takes; it knows what that one knew, but for who read what and who waits.
    """

    def __init__(self, run_dir: RunDir, died: EchoKernel | None = None) -> None:
        self.paused = False
        self.silent = False
        self.mute = False
        self.fatal: type[m.Message] | None = None
        self.fatal_is_done = True
        self.is_dead = False
        self.tokens_per_step = 3
        self.window = 4096
        self.seen: list[Any] = []
        self.controls: list[Any] = []
        self.sequences: dict[int, EchoSequence] = {}
        self.ended: dict[int, EchoSequence] = {}
        self.acked: dict[int, int] = {}
        self.tenants = {"alice": tenant_row("alice"), "bob": tenant_row("bob")}
        self._keys: dict[tuple[str, str | None], int] = {}  # (owner, client_request_id) -> rid
        self._waits: dict[int, list[tuple[Peer, int]]] = {}
        self._next_rid = 100
        if died is not None:
            self._recover(died)
        roles = frozenset({"gateway"})
        self.listener: AsyncListener[Any] = AsyncListener(run_dir, "kernel", Schema(m.ToKernel), roles)
        self.control: AsyncListener[Any] = AsyncListener(run_dir, "kernel-control", Schema(m.ToKernel), roles)
        self._handlers: dict[type, Callable[[Peer, Any], m.Message | None]] = {
            m.SeqSubmit: self._submit,
            m.SeqSpawn: self._spawn,
            m.SeqAppend: self._append,
            m.SeqContinue: self._continue,
            m.SeqAttach: self._attach,
            m.SeqDetach: self._detach,
            m.SeqCancel: self._cancel,
            m.SeqFinish: self._stop_string,
            m.SeqAck: self._ack,
        }

    def _recover(self, died: EchoKernel) -> None:
        self.sequences, self.ended, self._keys = died.sequences, died.ended, died._keys
        self.tenants, self._next_rid, self.paused, self.window = died.tenants, died._next_rid, died.paused, died.window
        self.tokens_per_step = died.tokens_per_step
        for seq in (*self.sequences.values(), *self.ended.values()):
            seq.reader, seq.last_reader, seq.acked = None, None, 0

    def _tell(self, listener: AsyncListener[Any], peer: Peer, message: m.Message) -> None:
        if not self.mute:
            listener.send(peer, message)

    async def run(self) -> None:
        while True:
            peer, message = await self.listener.receive()
            self.seen.append(message)
            self._serve(self.listener, peer, message)

    async def run_control(self) -> None:
        while True:
            peer, message = await self.control.receive()
            self.controls.append(message)
            self._serve(self.control, peer, message)

    async def run_steps(self) -> None:
        while True:
            await asyncio.sleep(0.001)
            if not self.paused and not self.is_dead:
                self.step()

    def step(self) -> None:
        """One token batch for all running sequences."""
        batches: dict[Peer, tuple[list[m.TokenEntry], list[m.SeqEnd]]] = {}
        results: dict[Peer | None, list[m.ResultEntry]] = {}
        for seq in list(self.sequences.values()):
            if not seq.generating or seq.suspended or any(rid in self.sequences for rid in seq.after):
                continue
            if not seq.sent and seq.result:
                results.setdefault(seq.reader, []).append(m.ResultEntry(seq.rid, 0, seq.result))
            limit = min(seq.limit, seq.acked + self.window) if seq.reader else seq.limit
            first, count = seq.sent, 0 if seq.second_at >= 0 else min(self.tokens_per_step, limit - seq.sent)
            entry = m.TokenEntry(seq.rid, first, seq.echo(count)) if count > 0 else None
            reader, end = seq.reader, None
            if seq.second_at >= 0 or seq.sent >= seq.limit:
                end = self._finish(seq, FinishReason.STOP if seq.second_at >= 0 else FinishReason.LENGTH)
            if reader is not None:
                entries, ends = batches.setdefault(reader, ([], []))
                entries += [entry] if entry else []
                ends += [end] if end else []
        for peer, (entries, ends) in batches.items():
            if entries or ends:
                found = tuple(results.get(peer, ()))
                self._tell(self.listener, peer, m.SeqTokens(tuple(entries), tuple(ends), b"", found))

    # ------------------------------------------------------------ sequences

    def _serve(self, listener: AsyncListener[Any], peer: Peer, message: Any) -> None:
        if self.fatal is not None and isinstance(message, self.fatal):
            self.fatal, self.mute = None, True
            self.is_dead = not self.fatal_is_done
        if self.is_dead:
            return
        try:
            handler = self._handlers.get(type(message))
            answer = handler(peer, message) if handler else self._verb(peer, message)
        except LlmosError as error:
            answer = error_message(error, getattr(message, "req", 0))
        if answer is not None and not (self.silent and type(message) in self._handlers):
            self._tell(listener, peer, answer)

    def _new(self, owner: str, model: str, tokens: list[int], is_open: bool, parent: int | None) -> EchoSequence:
        above = None if parent is None else self._known(parent, owner)
        self._next_rid += 1
        rid = self._next_rid
        seq = EchoSequence(rid, owner, model, tokens, is_open, above.job if above else rid, parent=parent)
        seq.prompt_len = len(tokens)
        if above:
            above.children.append(rid)
        self.sequences[rid] = seq
        return seq

    def _submit(self, peer: Peer, message: m.SeqSubmit) -> m.Message | None:
        if self.silent:
            return None
        if (rid := self._keys.get((message.owner, message.client_request_id))) is not None:
            return m.SeqAccepted(message.req, rid, existing=True)
        seq = self._new(message.owner, message.model, list(unpack_i32(message.prompt)), False, message.parent)
        self._remember(seq, message.client_request_id)
        seq.nice, seq.deadline_ms, seq.after = message.nice, message.deadline_ms, message.after
        seq.second_at = message.second_at
        seq.begin(message.params, peer)
        return m.SeqAccepted(message.req, seq.rid)

    def _spawn(self, peer: Peer, message: m.SeqSpawn) -> m.Message:
        if (rid := self._keys.get((message.owner, message.client_request_id))) is not None:
            return m.SeqAccepted(message.req, rid, existing=True)
        seq = self._new(message.owner, message.model, list(unpack_i32(message.prompt)), True, message.parent)
        seq.nice, seq.after = message.nice, message.after
        self._remember(seq, message.client_request_id)
        return m.SeqAccepted(message.req, seq.rid)

    def _remember(self, seq: EchoSequence, key: str | None) -> None:
        if key is not None:
            self._keys[seq.owner, key] = seq.rid

    def _append(self, peer: Peer, message: m.SeqAppend) -> m.Message:
        tokens = list(unpack_i32(message.tokens))
        if message.expect is not None:
            seq, end = self._known(message.rid, message.owner), message.expect + len(tokens)
            if seq.tokens[message.expect : end] == tokens:
                return m.SeqAppended(message.req, seq.rid, end)
            _check_length(seq, message.expect)
        seq = self._resting(message)
        seq.tokens += tokens
        seq.prompt_len, seq.end = len(seq.tokens), None
        return m.SeqAppended(message.req, seq.rid, len(seq.tokens))

    def _continue(self, peer: Peer, message: m.SeqContinue) -> m.Message:
        if message.expect is not None:
            seq = self._known(message.rid, message.owner)
            if (seq.generating or (seq.end and seq.sent)) and seq.prompt_len == message.expect:
                return self._attach(peer, m.SeqAttach(message.req, message.rid, message.owner))
            _check_length(seq, message.expect)
        seq = self._resting(message)
        seq.begin(message.params, peer)
        seq.deadline_ms = message.deadline_ms
        return m.SeqAttached(message.req, seq.rid, seq.model, seq.prompt_len, seq.params, b"")

    def _attach(self, peer: Peer, message: m.SeqAttach) -> m.Message:
        seq = self._known(message.rid, message.owner)
        if seq.generating:
            if seq.reader not in (None, peer):  # of two clients of one gateway only that gateway knows
                self._tell(self.listener, seq.reader, m.SeqReplaced(seq.rid))
            seq.reader = peer
        elif seq.end is None:
            raise WrongState(f"sequence {seq.rid} has no output yet", field="rid", rid=seq.rid)
        else:
            seq.last_reader = peer
        output = pack_i32(seq.tokens[seq.prompt_len :])
        end = None if seq.generating else seq.end
        result = seq.result if seq.sent or end else b""
        return m.SeqAttached(message.req, seq.rid, seq.model, seq.prompt_len, seq.params, output, end, result)

    def _detach(self, peer: Peer, message: m.SeqDetach) -> None:
        if (seq := self._read_by(peer, message.rid)) is not None:
            seq.reader = None

    def _cancel(self, peer: Peer, message: m.SeqCancel) -> None:
        if (seq := self._read_by(peer, message.rid)) is not None:
            self._tell_end(seq, FinishReason(message.reason))

    def _stop_string(self, peer: Peer, message: m.SeqFinish) -> None:
        seq = self.sequences.get(message.rid)
        if seq is None or peer != (seq.reader if seq.generating else seq.last_reader):
            return
        del seq.tokens[seq.prompt_len + message.upto :]
        if seq.generating:
            self._tell_end(seq, FinishReason.STOP)
        elif seq.end is not None:
            seq.end = m.SeqEnd(seq.rid, FinishReason.STOP, usage(seq.prompt_len, seq.sent))

    def _ack(self, peer: Peer, message: m.SeqAck) -> None:
        self.acked[message.rid] = message.upto
        if (seq := self._read_by(peer, message.rid)) is not None:
            seq.acked = max(seq.acked, message.upto)

    def _read_by(self, peer: Peer, rid: int) -> EchoSequence | None:
        seq = self.sequences.get(rid)
        return seq if seq is not None and seq.reader == peer else None

    def _known(self, rid: int, owner: str | None) -> EchoSequence:
        """Live or ended; a foreign one answers like an unknown one."""
        seq = self.sequences.get(rid) or self.ended.get(rid)
        if seq is None or owner not in (None, seq.owner):
            raise NotFound(f"no sequence {rid}", field="rid", rid=rid)
        return seq

    def _live(self, rid: int, owner: str | None) -> EchoSequence:
        seq = self._known(rid, owner)
        if seq.reason:
            raise WrongState(
                f"sequence {rid} has ended ({FinishReason(seq.reason).name.lower()})", field="rid", rid=rid
            )
        return seq

    def _resting(self, message: m.SeqAppend | m.SeqContinue) -> EchoSequence:
        seq = self._live(message.rid, message.owner)
        if not seq.is_open or seq.generating:
            raise WrongState(
                f"sequence {seq.rid} is {'generating' if seq.is_open else 'not open'}", field="rid", rid=seq.rid
            )
        if seq.model != message.model:
            raise InvalidRequest(f"sequence {seq.rid} is of model {seq.model}", field="model", rid=seq.rid)
        return seq

    def _finish(self, seq: EchoSequence, reason: FinishReason, whole: bool = False) -> m.SeqEnd | None:
        """End the output, and the sequence too if it is not open or `whole`."""
        if seq.generating:
            seq.end = m.SeqEnd(seq.rid, reason, usage(seq.prompt_len, seq.sent))
        seq.generating, seq.last_reader, seq.reader = False, seq.reader, None
        if whole or not seq.is_open:
            seq.reason = reason
            self.ended[seq.rid] = self.sequences.pop(seq.rid)
            for peer, req in self._waits.pop(seq.rid, ()):
                self._tell(self.control, peer, _waited(req, seq))
        return seq.end

    def _tell_end(self, seq: EchoSequence, reason: FinishReason, whole: bool = False) -> None:
        reader = seq.reader
        end = self._finish(seq, reason, whole)
        if reader is not None and end is not None:
            self._tell(self.listener, reader, m.SeqTokens((), (end,)))

    # ------------------------------------------------------------ verbs

    def _verb(self, peer: Peer, message: Any) -> m.Message | None:
        if isinstance(message, m.PsGet):
            mine = (seq for seq in self.sequences.values() if message.owner in (None, seq.owner))
            return m.PsReply(message.req, tuple(map(row_of, mine)))
        if isinstance(message, m.Kill):
            return self._kill(message)
        if isinstance(message, m.Wait):
            return self._wait(peer, message)
        if isinstance(message, m.TenantSet):
            given = {name: getattr(message, name) for name in TENANT_LIMITS if getattr(message, name) is not None}
            row = self.tenants.get(message.tenant, tenant_row(message.tenant))
            self.tenants[message.tenant] = msgspec.structs.replace(row, **given)
            return m.TenantsReply(message.req, (self.tenants[message.tenant],))
        if isinstance(message, m.TenantsGet):
            rows = tuple(row for name, row in self.tenants.items() if message.owner in (None, name))
            return m.TenantsReply(message.req, rows)
        if isinstance(message, m.StatusGet):
            lane = m.LaneStatus("echo", 1, True, 16, 64, 60, 2, 1, 3, 9, 27, 0, 8, 16, 0, "float32", "cpu", MAX_CONTEXT)
            service = m.ServiceStatus("microkernel", 3, 4321, 0, 61_000.0, "fine")
            return m.StatusReply(message.req, "0.1.0", 61_000.0, (lane,), (service,))
        if isinstance(message, m.MeasuresGet):
            return m.MeasuresReply(message.req, ())
        if isinstance(message, m.ModelsGet):
            row = m.ModelRow("echo", "/models/echo", "ab" * 32, "EchoForCausalLM", "serving", 1_234_567)
            return m.ModelsReply(message.req, (row,))
        if isinstance(message, m.RecordWrite):
            return m.RecordWritten(message.req, "/state/flight-1.rec", 7, 350)
        if isinstance(message, m.RestartService):
            return m.Done(message.req, 0)
        if isinstance(message, m.Stat | m.Explain):
            seq = self._known(message.rid, message.owner)
            return (
                self._stat(message.req, seq)
                if isinstance(message, m.Stat)
                else explained(seq.rid, message.req, seq.nice)
            )
        return self._change(message)

    def _change(self, message: Any) -> m.Message:
        """A verb on one live sequence."""
        seq = self._live(message.rid, message.owner)
        if isinstance(message, m.Fork):
            return m.Forked(message.req, tuple(self._fork(seq) for _ in range(message.count)))
        if isinstance(message, m.Close):
            if not seq.is_open:
                raise WrongState(f"sequence {seq.rid} is not open", field="rid", rid=seq.rid)
            self._tell_end(seq, FinishReason.CLOSED, whole=True)
        elif isinstance(message, m.Nice):
            seq.nice = message.nice
        elif isinstance(message, m.Deadline):
            if not seq.generating:
                raise WrongState(f"sequence {seq.rid} is not generating", field="rid", rid=seq.rid)
            seq.deadline_ms = message.deadline_ms
        elif isinstance(message, m.After):
            if seq.rid in message.after:
                raise InvalidRequest("after: it would wait for itself", field="after", rid=seq.rid)
            seq.after = message.after
        elif isinstance(message, m.Suspend):
            seq.suspended, seq.pages = True, message.pages
        else:
            assert isinstance(message, m.Resume), message
            seq.suspended = False
        return m.Done(message.req, seq.rid)

    def _fork(self, seq: EchoSequence) -> int:
        child = self._new(seq.owner, seq.model, list(seq.tokens), seq.is_open, seq.rid)
        self.sequences[child.rid] = replace(
            seq, rid=child.rid, tokens=child.tokens, parent=seq.rid, reader=None, children=[], acked=0
        )
        return child.rid

    def _kill(self, message: m.Kill) -> m.Message:
        if message.rid is not None:
            chosen = [self._live(message.rid, message.owner)]
        else:
            job = None if message.job is None else self._known(message.job, message.owner).job
            wanted = ((message.owner, "owner"), (message.tenant, "owner"), (job, "job"), (message.model, "model"))
            chosen = [
                seq
                for seq in self.sequences.values()
                if all(value in (None, getattr(seq, name)) for value, name in wanted)
            ]
        for seq in chosen:
            self._tell_end(seq, FinishReason.KILLED, whole=True)
        return m.Killed(message.req, tuple(seq.rid for seq in chosen))

    def _wait(self, peer: Peer, message: m.Wait) -> m.Message | None:
        seq = self._known(message.rid, message.owner)
        if seq.reason:
            return _waited(message.req, seq)
        self._waits.setdefault(seq.rid, []).append((peer, message.req))
        return None

    def _stat(self, req: int, seq: EchoSequence) -> m.Stats:
        everybody = [*self.sequences.values(), *self.ended.values()]
        members = [other for other in everybody if other.job == seq.job]
        live = sum(not other.reason for other in members)
        job = m.JobRow(seq.job, len(members), live, 3 * live, sum(len(other.tokens) for other in members))
        return m.Stats(
            req,
            row_of(seq),
            job,
            len(seq.tokens),
            seq.parent,
            seq.after,
            len(seq.children),
            seq.deadline_ms,
            seq.reason,
            usage(seq.prompt_len, seq.sent),
        )


def _check_length(seq: EchoSequence, expect: int) -> None:
    if len(seq.tokens) != expect:
        raise WrongState(f"sequence {seq.rid} has {len(seq.tokens)} tokens, not {expect}", field="rid", rid=seq.rid)


def _waited(req: int, seq: EchoSequence) -> m.Waited:
    used = seq.end.usage if seq.end is not None else usage(len(seq.tokens))
    return m.Waited(req, seq.rid, seq.reason, used)
