"""Bugs to plant in the microkernel, one at a time: if a suite of tests does not notice, it is worth little.

A bug is data: a file of the package, a text that occurs exactly once in it, what to put in its place, and what that breaks. planting.py
plants one in a copy of the package and runs tests against it. A refactoring that changes one of these texts moves the bug along with it
(tests/microkernel/test_planted_bugs.py says which).
"""

# ruff: noqa: E501 - exact lines of the sources, as they stand there

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """`file` in llmos/microkernel. `breaks`: what goes wrong, and the bug's name."""

    file: str
    breaks: str
    old: str
    new: str


BUGS = (
    # ------------------------------------------------------------ pages.py
    Bug("pages.py", "quarantine ends with the next step that completes",
        "            self._quarantined[page] = after_step\n            self._quarantine.append((after_step, page))",
        "            self._quarantined[page] = 0\n            self._quarantine.append((0, page))"),
    Bug("pages.py", "an old quarantine entry ends a newer quarantine",
        "if self._quarantined.get(page) != released_at or self.refs[page]:", "if self.refs[page]:"),
    Bug("pages.py", "the prefix cache is not told of an evicted page",
        "        self._known.difference_update(pages)\n        for page in pages:\n            self._on_evict(page)\n",
        "        self._known.difference_update(pages)\n"),
    Bug("pages.py", "the most recently used cached page is evicted first", "self._cached.popitem(last=False)", "self._cached.popitem()"),
    Bug("pages.py", "a page that is written in place stays in the prefix cache",
        "            self._known.discard(page)\n            self._on_evict(page)\n\n    def grant",
        "            pass\n\n    def grant"),
    Bug("pages.py", "a prefix hit does not take a reference", "                del self._cached[page]\n        self.refs[page] += 1",
        "                del self._cached[page]\n                self.refs[page] += 1"),
    Bug("pages.py", "long page tables are released in the wrong order", "held[counts == 0][::-1].tolist()", "held[counts == 0].tolist()"),
    Bug("pages.py", "a page goes back when one of its two holders lets go", "                if self.refs[page] == 0:\n                    freed",
        "                if self.refs[page] <= 1:\n                    freed"),
    # ------------------------------------------------------------ holdings.py
    Bug("holdings.py", "a page with two holders is written without a copy", "self.pool.refs[seq.page_table[place]] > 1 else None",
        "self.pool.refs[seq.page_table[place]] > 2 else None"),
    Bug("holdings.py", "copies go from the new page to the old one", "self.copies.copy(source, target)", "self.copies.copy(target, source)"),
    Bug("holdings.py", "the page that was copied is never let go", '        self._let_go(seq, array("i", [source]), self.last_step + 1)\n', ""),
    Bug("holdings.py", "a page that is being swapped out is granted in the same step", "        seq.swaps += 1\n        self._release(seq, self.last_step + 1)",
        "        seq.swaps += 1\n        self._release(seq, self.last_step)"),
    Bug("holdings.py", "host pages are kept after swapping in", "        self.host.release(seq.host_pages)\n        seq.host_pages = array(\"i\")\n\n    def release",
        "        seq.host_pages = array(\"i\")\n\n    def release"),
    Bug("holdings.py", "tokens whose pages were given back still count as computed", "        seq.kept_tokens = 0\n        self._release(seq, self._last_use)",
        "        self._release(seq, self._last_use)"),
    Bug("holdings.py", "a page from which a copy is ordered is granted in the same step", "return self.last_step + bool(self.copies)", "return self.last_step"),
    Bug("holdings.py", "pages are taken from tenants within their guarantee",
        "if seq is not spare and (other is tenant or (not own_only and other.pages > other.limits.guaranteed_pages)):",
        "if seq is not spare and (other is tenant or not own_only):"),
    Bug("holdings.py", "who is over its quota takes pages from others",
        "if seq is not spare and (other is tenant or (not own_only and other.pages > other.limits.guaranteed_pages)):",
        "if seq is not spare and (other is tenant or other.pages > other.limits.guaranteed_pages):"),
    Bug("holdings.py", "guarantees do not count when pages are granted", "return self.pool.available - self.tenants.reserved_for_others(tenant)",
        "return self.pool.available"),
    Bug("holdings.py", "a shared page counts again for each that shares it", "(self._payers.share if self.pool.refs[page] else self._payers.take)", "self._payers.take"),
    Bug("holdings.py", "a fork shares pages that the parent still writes", "child.page_table = parent.page_table[: self.pages_for(num_tokens)]",
        "child.page_table = parent.page_table[:]"),
    Bug("holdings.py", "a fork takes no references", "        self.pool.share_used(child.page_table)\n", ""),
    Bug("holdings.py", "trimming gives back the partly filled page too", "        kept = self.pages_for(num_tokens)\n        self._let_go",
        "        kept = num_tokens // self.page_size\n        self._let_go"),
    Bug("holdings.py", "swapped pages are copied back into the wrong pages", "self.copies.swap_in(seq.host_pages, seq.page_table[: len(seq.host_pages)])",
        "self.copies.swap_in(seq.host_pages, seq.page_table[-len(seq.host_pages) :])"),
    # ------------------------------------------------------------ payers.py
    Bug("payers.py", "a page that its tenant let go of still counts for it", "elif int(refs[page]) - sum(guests.values()) == 1:", "elif int(refs[page]) - sum(guests.values()) == 0:"),
    Bug("payers.py", "the tenant that lets go of a page that others hold keeps paying", "                tenant.pages -= 1\n", ""),
    # ------------------------------------------------------------ host_pages.py
    Bug("host_pages.py", "a host page is granted while the plan that reads it is not issued", "self._given_back.extend(pages)", "self._free.extend(pages)"),
    # ------------------------------------------------------------ residents.py
    Bug("residents.py", "a cut turn keeps the page of its newest token", "seq.kept_tokens = min(seq.kept_tokens, len(seq.tokens) - 1)",
        "seq.kept_tokens = min(seq.kept_tokens, len(seq.tokens))"),
    Bug("residents.py", "a cut turn keeps the keys of pages that will be written anew", "        del seq.page_hashes[len(seq.tokens) // self.page_size :]\n", ""),
    Bug("residents.py", "pages are trusted though a token is missing", "        else:\n            self.holdings.release(seq)\n\n    def reclaim", "\n    def reclaim"),
    Bug("residents.py", "heirs are not woken", "                self._inherit(parent, child)\n            self.wake(child, now)", "                self._inherit(parent, child)"),
    Bug("residents.py", "a sequence that leaves the machine forgets its heirs",
        "            self.leave_queue(seq, now)\n        self.bequeath(seq, now)\n", "            self.leave_queue(seq, now)\n"),
    Bug("residents.py", "an heir gets credit for what was not computed", "self.holdings.fork(parent, child, min(self._computed(parent), len(child.tokens) - 1))",
        "self.holdings.fork(parent, child, len(child.tokens) - 1)"),
    Bug("residents.py", "swapping out on suspension does not ask for room", "if self.holdings.pages_for(seq.kept_tokens) <= self.host.num_free:", "if self.host.num_pages:"),
    Bug("residents.py", "suspension keeps the pages that it was told to drop", "        elif pages is PageFate.DROP:\n            self.holdings.release(seq)\n", ""),
    Bug("residents.py", "a new nice value does not move a waiting sequence", "            self.queue.remove(seq)\n            self.queue.push(seq, self.tenants.get(seq.owner), now)\n", "            pass\n"),
    Bug("residents.py", "a sequence that is to wait for others stays in the queue", "        if seq.state in QUEUED and seq.held_back:\n            self._block(seq, now)\n", "        return\n"),
    Bug("residents.py", "tokens on their way are forgotten when the row is lost", "seq.num_pending = int(self.rows.pending[row])", "seq.num_pending = 0"),
    Bug("residents.py", "who leaves its row still counts as running", "        self.tenants.get(seq.owner).running -= 1\n", ""),
    Bug("residents.py", "a tenant that comes back from idling is not lifted", "        self.tenants.arrive(tenant)\n", "        tenant.waiting += 1\n"),
    Bug("residents.py", "time that limits cost is booked as queue", "seq.timeline.shift(tenant.limited_s(now) - seq.limited_from, Cause.QUEUE, Cause.QUOTA)", "pass"),
    Bug("residents.py", "missed deadlines are not counted", "self.counters.deadline_misses += 1", "pass"),
    Bug("residents.py", "running sequences are preempted without counting", "        seq.preemptions += 1\n        self.counters.preemptions += 1\n", ""),
    # ------------------------------------------------------------ intake.py
    Bug("intake.py", "no page for the first token that it will generate", "residents.holdings.pages_for(len(seq.tokens) + (seq.generating and not seq.silent))", "residents.holdings.pages_for(len(seq.tokens))"),
    Bug("intake.py", "cached pages that are shared count as free", "if not over_quota and need.taken + reserve <= residents.holdings.grantable(tenant):",
        "if not over_quota and need.fresh + reserve <= residents.holdings.grantable(tenant):"),
    Bug("intake.py", "admission ignores what runs already", "running = residents.working_set.reserve(residents.rows)", "running = 0"),
    Bug("intake.py", "the page quota does not hold for starts", "over_quota = tenant.pages + need.charged > tenant.limits.max_pages", "over_quota = False"),
    Bug("indexing.py", "every tenant finds every tenant's pages", 'return b"" if self._shared else seq.owner.encode()', 'return b""'),
    Bug("indexing.py", "tenants do not find each other's pages though sharing is on",
        'return b"" if self._shared else seq.owner.encode()', "return seq.owner.encode()"),
    Bug("intake.py", "a prefix hit leaves no token to compute", "usable = (len(seq.tokens) - 1) // residents.page_size", "usable = len(seq.tokens) // residents.page_size"),
    Bug("intake.py", "starts though its next token is on its way", "        if seq.num_pending:\n", "        if seq.num_pending > 1:\n"),
    Bug("intake.py", "limits of running sequences and of rates do not hold for starts", "if not tenant.may_start(now):", "if tenant is None:"),
    Bug("intake.py", "pages at the host are not copied back", "            holdings.swap_in(seq)\n", "            self.residents.host.release(seq.host_pages)\n            seq.host_pages = seq.host_pages[:0]\n"),
    Bug("intake.py", "input that is cached is taken beyond quota and guarantees", "if self._may_share(tenant, need.shared):", "if need:"),
    Bug("intake.py", "a sequence that waits for pages is overtaken by smaller ones", "blocked |= start is Start.NO_PAGES", "blocked = False"),
    # ------------------------------------------------------------ runqueue.py
    Bug("runqueue.py", "nobody ages", "if now - since < self.ageing_s:", "if since <= now:"),
    Bug("runqueue.py", "a preempted sequence that can not start holds up all others", "            if seq.owner not in owners:\n                owners.add(seq.owner)\n", "            if not owners:\n                owners.add(seq.owner)\n"),
    Bug("runqueue.py", "preempted sequences go on newest first", "self._preempted.move_to_end(seq.rid, last=False)", "self._preempted.move_to_end(seq.rid)"),
    Bug("runqueue.py", "a renewed place in the queue does not invalidate the old one", "            if self._order.get(rid) == order:", "            if rid in self._order:"),
    # ------------------------------------------------------------ tenants.py
    Bug("tenants.py", "virtual counters stand still", "self.counter += tokens / self.limits.weight", "self.counter += 0.0"),
    Bug("tenants.py", "weights do not count", "self.counter += tokens / self.limits.weight", "self.counter += tokens"),
    Bug("tenants.py", "a burst of ten seconds", "self._rate_from = max(self._rate_from, now - 1.0)", "self._rate_from = max(self._rate_from, now - 10.0)"),
    Bug("tenants.py", "idling saves credit up", "self.counter = max(self.counter, counter)", "pass"),
    Bug("tenants.py", "stored guarantees do not count until their tenant comes", "        for name in names:\n            self.get(name)\n", "        return\n"),
    Bug("tenants.py", "a tenant's own guarantee is reserved against itself", "for other in self.all if other is not tenant)\n\n    def guaranteed_to_others",
        "for other in self.all)\n\n    def guaranteed_to_others"),
    # ------------------------------------------------------------ pacing.py
    Bug("pacing.py", "prompts may make a step as long as they like", "return min(budget, max(least, affordable))", "return budget"),
    Bug("pacing.py", "swapping out does not ask for room at the host", "if not self.swap_s or num_pages > host_free or", "if not self.swap_s or"),
    Bug("pacing.py", "swapping is chosen where recomputing is cheaper", "return PageFate.DROP if 0 < num_tokens * self.prefill_s < there_and_back_s else PageFate.SWAP", "return PageFate.SWAP"),
    Bug("pacing.py", "preemptions do not make admission careful", "self._horizon = min(_MAX_HORIZON, max(self._page_size, 2 * self._horizon))", "pass"),
    # ------------------------------------------------------------ jobs.py
    Bug("jobs.py", "circles of sequences that wait for each other are accepted", "            if rid == one.rid:\n                return True", "            if rid == one.rid:\n                return False"),
    Bug("jobs.py", "those that waited are not woken", "else [each for each in followers if not each.waits_for]", "else []"),
    Bug("jobs.py", "those that waited for a killed sequence go on", "frozenset({FinishReason.STOP, FinishReason.LENGTH, FinishReason.CLOSED})", "frozenset({FinishReason.STOP, FinishReason.LENGTH, FinishReason.CLOSED, FinishReason.KILLED})"),
    Bug("jobs.py", "whom it waited for before still counts", "        for rid in seq.waits_for:\n            del self._followers[rid][seq.rid]\n        seq.waits_for = {", "        seq.waits_for = {"),
    # ------------------------------------------------------------ state.py
    Bug("state.py", "a reader that is replaced is not told", "self.outbox.send(seq.reader, m.SeqReplaced(seq.rid))", "pass"),
    Bug("state.py", "who stops reading is told that it was replaced", "if seq.reader not in (NOBODY, reader) and reader != NOBODY:", "if seq.reader not in (NOBODY, reader):"),
    Bug("state.py", "a Wait of a gateway that is gone is answered", "[(other, req) for other, req in waiting if other != peer]", "[(other, req) for other, req in waiting]"),
    Bug("state.py", "busy open sequences count as idle", "            if seq.has_work or seq.held_back:\n                self._idle", "            if seq.generating:\n                self._idle"),
    Bug("state.py", "who reads an orphan does not save it", "            self._orphans.drop(seq.rid)\n        scheduler", "        scheduler"),
    Bug("state.py", "seeds repeat", "        self._seeds += 1\n        digest", "        digest"),
    Bug("state.py", "tokens behind a stop string stay in the record", "            del seq.tokens[seq.prompt_len + num_output :]\n", "            pass\n"),
    Bug("state.py", "an open sequence that is used grows idle all the same", "        self.touch(seq, now)\n\n    def refit", "\n    def refit"),
    Bug("state.py", "what does not fit a smaller executor waits for ever", "            elif len(seq.tokens) >= most:\n                self.end_output(seq, FinishReason.LENGTH, now)\n", "            elif len(seq.tokens) >= most:\n                pass\n"),
    # ------------------------------------------------------------ kernel.py, expiry.py
    Bug("kernel.py", "a deadline that was taken back still ends its sequence", "if seq is not None and seq.deadline == moment and", "if seq is not None and"),
    Bug("kernel.py", "a deadline ends a sequence that has begun", "seq.deadline == moment and seq.started_at is None and seq.generating:", "seq.deadline == moment and seq.generating:"),
    Bug("kernel.py", "everybody may send everything", "if sender.role not in roles:", "if not roles:"),
    Bug("expiry.py", "a touch does not renew the time", "        self._touched[key] = now\n        self._touched.move_to_end(key)", "        self._touched.setdefault(key, now)"),
    # ------------------------------------------------------------ verbs
    Bug("sequence_verbs.py", "a client acknowledges what was never sent", "seq.acked = max(seq.acked, min(message.upto, seq.num_output))", "seq.acked = max(seq.acked, message.upto)"),
    Bug("sequence_verbs.py", "any gateway may cancel any sequence", "if seq is not None and seq.generating and seq.reader == sender.peer else None", "if seq is not None and seq.generating else None"),
    Bug("sequence_verbs.py", "a sequence that generates can be continued", "    if seq.generating:\n        raise WrongState(f\"sequence {rid} is generating\"", "    if seq.num_pending > 99:\n        raise WrongState(f\"sequence {rid} is generating\""),
    Bug("sequence_verbs.py", "the same request twice makes two sequences", "    known = state.requested(message.owner, message.client_request_id)", "    known = None"),
    Bug("control_verbs.py", "siblings get the same seed", "seed=(seed + parent.forks * _SEED_STEP) & _SEED_MASK", "seed=(seed + _SEED_STEP) & _SEED_MASK"),
    Bug("control_verbs.py", "a selector kills sequences of others", "            message.owner in (None, seq.owner)\n            and message.tenant", "            message.owner != \"\"\n            and message.tenant"),
    Bug("control_verbs.py", "what a sequence waits for can be changed when it has begun", "if seq.started_at is not None or seq.kept_tokens or seq.row != NO_ROW:", "if seq.row != NO_ROW:"),
    Bug("scheduler.py", "pages with bad numbers are found in the prefix cache", "            self.residents.void(seq)\n", ""),
    Bug("commit.py", "bad numbers are tried again and again", "            if not seq.may_try_again():\n", "            if not seq.may_try_again() and False:\n"),
    Bug("service_verbs.py", "storage is not told of new limits", "    if state.storage != NOBODY:\n        _store(state, name, limits)\n\n\ndef", "\n\ndef"),
    Bug("service_verbs.py", "stored limits overwrite newer ones", "state.tenant_limits = stored | state.tenant_limits", "state.tenant_limits = state.tenant_limits | stored"),
    # ------------------------------------------------------------ sequence.py, report.py, policy.py, lane.py
    Bug("sequence.py", "a stop token counts one token too early", "if token in self.stop_ids and self.num_output > self.params.least_output:", "if token in self.stop_ids and self.num_output >= self.params.least_output:"),
    Bug("sequence.py", "acknowledgements of the last turn count for the next", "self.reader, self.acked, self.end = reader, 0, None", "self.reader, self.end = reader, None"),
    Bug("sequence.py", "tokens of a turn that is over count for the next", "        self.num_void = self.num_pending\n", ""),
    Bug("sequence.py", "explain says preempted for swapped", "SeqState.SWAPPED: Cause.SWAPPED,", "SeqState.SWAPPED: Cause.PREEMPTED,"),
    Bug("report.py", "explain counts the wait that goes on as queue", "        spent[Cause.QUOTA] += limited\n", ""),
    Bug("policy.py", "the best class is preempted first", "return (priority_class(seq.nice), seq.rid)", "return (-priority_class(seq.nice), seq.rid)"),
    Bug("policy.py", "deadlines do not order the queue", "return (_NO_DEADLINE if seq.deadline is None else seq.deadline, seq.job.rid, seq.rid)", "return (seq.job.rid, seq.rid)"),
    Bug("policy.py", "the tenant that got most is served next", "return (tenant.counter, tenant.index)", "return (-tenant.counter, tenant.index)"),
    Bug("lane.py", "results of an earlier executor count", "if scheduler is None or self._is_condemned or is_old or result.step != expected:", "if scheduler is None or self._is_condemned or result.step != expected:"),
    Bug("lane.py", "results count in any order", "if scheduler is None or self._is_condemned or is_old or result.step != expected:", "if scheduler is None or self._is_condemned or is_old or expected is None:"),
    Bug("lane.py", "a sequence may want pages that are guaranteed to others", "executor.num_pages - self.tenants.guaranteed_to_others(tenant))", "executor.num_pages)"),
    Bug("lane.py", "host pages of a dead executor are kept", 'seq.page_table, seq.host_pages, seq.kept_tokens = array("i"), array("i"), 0', 'seq.page_table, seq.kept_tokens = array("i"), 0'),
    # ------------------------------------------------------------ recovery.py
    Bug("recovery.py", "after a crash, whom a sequence waits for is forgotten if it came later", "after = [alive[rid][0] for rid in fold.after[seq.rid] if rid in alive]", "after = [alive[rid][0] for rid in fold.after[seq.rid] if rid in alive and rid < seq.rid]"),
    Bug("recovery.py", "after a crash, records are kept in the wrong order", "sorted(ended, key=lambda seq: now if seq.ended_at is None else seq.ended_at)", "ended"),
    Bug("recovery.py", "after a crash, a deadline ends what had begun", "                    seq.started_at = seq.turn_at\n", "                    pass\n"),
    Bug("recovery.py", "after a crash, forks do not wait for what their parents wait for", "self._enter(child, self.after.get(parent.rid, ()), suspended=False)", "self._enter(child, (), suspended=False)"),
    # ------------------------------------------------------------ scheduler.py, commit.py, rows.py, prefix.py, plan.py, outbox.py
    Bug("scheduler.py", "the window of a client that does not read is ignored", "        ready &= ~behind\n", ""),
    Bug("growth.py", "a running sequence grows one page beyond its quota",
        "over_quota = tenant.pages >= tenant.limits.max_pages", "over_quota = tenant.pages > tenant.limits.max_pages"),
    Bug("growth.py", "all rows grow at once beyond a quota",
        "if tenant.pages + count > tenant.limits.max_pages:", "if tenant.pages > tenant.limits.max_pages:"),
    Bug("growth.py", "all rows grow at once on pages that are guaranteed to others",
        "return len(growers.tables) + self._tenants.reserved() <= self._holdings.pool.available",
        "return len(growers.tables) <= self._holdings.pool.available"),
    Bug("growth.py", "pages are told to the executor one place too early",
        "        places += 1\n        appends[:, 2] = pages\n", "        appends[:, 2] = pages\n"),
    Bug("growth.py", "the best sequence is preempted, not the worst",
        "return max(candidates, key=self._residents.policy.preemption_rank)",
        "return min(candidates, key=self._residents.policy.preemption_rank)"),
    Bug("scheduler.py", "pages come back before their step is done", "        self.pool.complete(step.step)\n", "        self.pool.complete(step.step + 1)\n"),
    Bug("scheduler.py", "a sequence samples as it gets its row though its client is behind", "if samples and count == remaining and not", "if False and not"),
    Bug("commit.py", "a token counts at any position", "if token is not None and position == len(seq.tokens):", "if token is not None:"),
    Bug("commit.py", "late tokens of a turn that is over count", "            if seq.num_void:\n", "            if seq.num_void > 99:\n"),
    Bug("commit.py", "token ids are not checked", "for row, position, token in samples.tolist() if 0 <= token < vocab_size}", "for row, position, token in samples.tolist()}"),
    Bug("rows.py", "tokens go to the first reader for ever", "            self.reader[row] = seq.reader\n", "            self.reader[row] = self.reader[row] or seq.reader\n"),
    Bug("prefix.py", "equal pages behind different beginnings are one",
        "previous = blake2b(previous + content[start : start + width], digest_size=_KEY_BYTES).digest()",
        "previous = blake2b(content[start : start + width], digest_size=_KEY_BYTES).digest()"),
    Bug("indexing.py", "pages are indexed before their newest token is computed",
        "self._index(row, (int(rows.known[row]) - 1) // self._prefix.page_size)",
        "self._index(row, int(rows.known[row]) // self._prefix.page_size)"),
    Bug("steady.py", "the fast path goes on when somebody comes or goes",
        "if self.version != rows.version or self.index >= self.num_plans:", "if self.index >= self.num_plans:"),
    Bug("steady.py", "the fast path plans one step too many",
        "self.num_plans = int((np.minimum(rows.max_len, rows.unread)[held] - self.first).min())",
        "self.num_plans = int((np.minimum(rows.max_len, rows.unread)[held] - self.first).min()) + 1"),
    Bug("steady.py", "the fast path overlooks stop tokens",
        "if not rows.stop_ids.isdisjoint(listed):", "if not listed:"),
    Bug("steady.py", "the fast path takes any token id",
        'if sampled.tobytes() != samples.tobytes() or np.maximum.reduce(tokens.view("<u4")) >= vocab_size:',
        "if sampled.tobytes() != samples.tobytes():"),
    Bug("residents.py", "the fast path is not told that a turn is to end earlier",
        "            self.rows.max_len[seq.row] = max_len\n            self.rows.version += 1\n",
        "            self.rows.max_len[seq.row] = max_len\n"),
    Bug("plan.py", "a changed set of rows of the same size is not told", "same = last_decode is not None and equal(self.decode, last_decode)", "same = last_decode is not None and len(self.decode) == len(last_decode)"),
    Bug("outbox.py", "every gateway gets every token", "chosen = rest & (outcome.readers == peer)", "chosen = rest"),
)  # fmt: skip

SURVIVORS: dict[str, str] = {}  # the name of a bug that nobody notices: why that is so
