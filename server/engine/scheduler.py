"""Scheduler: which sequences run in the next step, with which blocks and slots. Never imports torch.

One rule: a sequence has `done` and `len(ids)`; a step spends a token budget moving `done` up. Prefill, chunked prefill,
decode, recompute after preemption and soft prompts are all that rule.

    waiting --admit--> running --advance--> finished     blocks run out: the youngest of the tenant that was served most
       fair queue of tenants                             goes back to waiting
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count

from adapters_store.digest import Digest

from ..errors import AdapterdError, GenerationError
from ..requests import Event, FinishReason, Request
from ..tenancy.fairness import FairQueue
from .budget import StepBudget
from .checks import Checks
from .pages import Pages, chain_seed
from .plan import Fill, Plan, Row, Sample, Sequence
from .prefill import Prefill, backlog_of
from .prefixes import Prefixes, SharedPrefix, owner_of
from .residency import Residency
from .results import NOT_FINITE, add_scores, append, prompt_event, scores_event, token_event
from .slots import Slots
from .speculation import Speculation, may_speculate

VIRTUAL = -1  # the id of a position that has no token: a prefix or soft prompt


@dataclass(frozen=True)
class SchedulerLimits:
    max_batch_tokens: int
    max_running: int
    max_waiting: int
    max_total_tokens: int  # virtual + prompt + new, per request
    patience: int = 64  # admissions that may overtake a request waiting for an adapter slot
    prefetch: int = 8  # adapters being loaded, or loaded and waiting, at once
    max_prefill_tokens: int = 0  # per prompt, of a step in which others stream; 0 = as many as the step takes
    speculate: int = 0  # tokens guessed ahead per greedy sequence
    #: Prompts' positions are computed in another order of sums than generated ones. Neither may then stand for the other: a
    #: generated block is no part of a later prompt, and what is computed again after a preemption is cut where the prompt ends.
    splits_prompts: bool = False


class _Outcome(Enum):
    ADMITTED = auto()
    BLOCKED = auto()  # it waits for something else than its turn; others may start
    NO_ROOM = auto()  # nobody may start before it


class Scheduler:
    """Owns waiting and running sequences. Invariant: every submitted request gets exactly one finishing event."""

    def __init__(
        self,
        pages: Pages,
        residency: Residency,
        limits: SchedulerLimits,
        base: Digest,
        eos: Collection[int],
    ) -> None:
        self.pages = pages
        self.residency = residency
        self.limits = limits
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.running: dict[Sequence, None] = {}  # in order of admission
        self._base = base
        self._eos = frozenset(eos)
        self._prefixes = Prefixes(pages, limits.splits_prompts)
        self._slots = Slots(residency, limits.patience, limits.prefetch)
        self._checks = Checks(residency, limits.max_total_tokens)
        self._by_id: dict[str, Sequence] = {}
        self._numbers = count(1)
        self._outbox: list[Event] = []
        self._prefill = Prefill(limits.max_batch_tokens, limits.max_prefill_tokens)
        self._speculation = Speculation(limits.speculate)

    # -- what comes in -------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running and not self._outbox

    def submit(self, request: Request) -> None:
        """Queue a request; how many may queue is the engine's business.

        Raises: ValidationError when it can never fit, QuotaError when its tenant's policy never lets it.
        """
        self._checks.request(request)
        seed = chain_seed(request.tenant, self._base, *request.adapters)
        prompt = list(request.prompt)
        sequence = Sequence(request, request.adapters, seed, 0, prompt, len(prompt), tenant=request.tenant)
        sequence.number = next(self._numbers)
        self._by_id[request.id] = sequence
        self._prefill.came(request.tenant)
        self.waiting.add(sequence, request.tenant, request.policy, ready=not self._blocked(sequence))

    def cancel(self, request_id: str) -> None:
        """End a request wherever it is. Unknown ids are ignored: it may just have finished."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._finish(sequence, Event(request_id, finish=FinishReason.CANCELLED))

    def fail(self, request_id: str, error: AdapterdError) -> None:
        if request_id in self._by_id:
            self._finish(self._by_id[request_id], Event(request_id, finish=FinishReason.ERROR, error=error))

    def fail_sequence(self, sequence: Sequence, error: AdapterdError) -> None:
        """End a running sequence that broke a step. A broken prefix takes along everyone who waits for it."""
        if sequence.request is not None:
            self.fail(sequence.request.id, error)
            return
        self._leave(sequence)
        self._prefixes.drop(sequence.seed)
        for waiting in [s for s in self.waiting if s.seed == sequence.seed]:
            self.fail_sequence(waiting, error)

    def fail_adapter(self, digest: Digest, error: AdapterdError) -> None:
        """An adapter could not be loaded: whoever waits for it is told so."""
        self._slots.failed(digest)
        for sequence in [s for s in self.waiting if digest in s.adapters]:
            self.fail_sequence(sequence, error)

    def warm(self, digest: Digest, tenant: str = "default") -> None:
        """Make an adapter resident although no request waits for it; it stays in line until a slot is free."""
        self._slots.warm(digest, tenant)

    def awaits(self, digest: Digest) -> bool:
        """Whether a request that waits names an adapter."""
        return any(digest in sequence.adapters for sequence in self.waiting)

    def forget(self, digest: Digest) -> None:
        """Drop the shared prefixes of an adapter; running sequences keep their blocks."""
        self._prefixes.forget(digest)

    def take_events(self) -> list[Event]:
        events, self._outbox = self._outbox, []
        return events

    # -- one step ------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The next step. Admits, finds blocks, preempts where there are none."""
        plan = Plan()
        self._slots.place_warm(plan)
        self._admit(plan)
        budget = self._prefill.budget(self.running)
        prompts = [sequence for sequence in self.running if sequence.remaining > 1]
        # Decode before prefill: a long prompt must not delay tokens of sequences that already stream.
        for sequence in [sequence for sequence in self.running if sequence.remaining <= 1]:
            self._add_row(sequence, budget.room(sequence), plan, budget)
        self._add_prompts([sequence for sequence in prompts if sequence in self.running], plan, budget)
        self._speculate(budget)
        plan.rows = list(budget.rows.values())
        self._slots.loads(self.waiting.in_turn(), plan)  # last: a plan that is never returned must have promised no load
        return plan

    def _add_prompts(self, prompts: list[Sequence], plan: Plan, budget: StepBudget) -> None:
        """In order of admission, as far as each one's tenant has room."""
        rooms = self._prefill.rooms(prompts, budget.extra, self.waiting.weight)
        for sequence in prompts:
            room = min(budget.room(sequence), rooms[sequence.tenant])
            if self._add_row(sequence, room, plan, budget):
                rooms[sequence.tenant] -= room

    def _add_row(self, sequence: Sequence, positions: int, plan: Plan, budget: StepBudget) -> bool:
        """Plan so many positions of a sequence, if there are blocks for them; not of one preempted in the meantime."""
        if sequence not in self.running or positions <= 0:
            return False
        if self.limits.splits_prompts and sequence.done < sequence.prompt_end:
            positions = min(positions, sequence.prompt_end - sequence.done)
        if not self._reserve(sequence, sequence.done + positions, plan, budget):
            return False
        budget.add(Row(sequence, sequence.done, positions))
        return True

    def _speculate(self, budget: StepBudget) -> None:
        """Let greedy rows verify guesses with what is left of the step. Takes blocks only if they are free."""
        if not self.limits.speculate:
            return
        for sequence, row in list(budget.rows.items()):
            if not may_speculate(sequence):
                continue
            room = min(budget.extra, sequence.sampling.max_new_tokens - sequence.generated - 1)
            draft = self._speculation.guess(sequence, room) if room > 0 else ()
            if draft and (draft := draft[: self._free_room(sequence, len(draft))]):
                budget.add(Row(sequence, row.start, 1 + len(draft), draft))

    def _free_room(self, sequence: Sequence, count: int) -> int:
        """Positions behind its next one, at most `count`, for which it has or gets blocks without anybody's loss."""
        need = self.pages.blocks_for(len(sequence.ids) + count) - len(sequence.blocks)
        if need > 0 and (blocks := self.pages.allocate(need, owner_of(sequence))) is not None:
            sequence.blocks += blocks
        return max(0, min(count, len(sequence.blocks) * self.pages.block_size - len(sequence.ids)))

    # -- admission -----------------------------------------------------------------------------------------------

    def _admit(self, plan: Plan) -> None:
        """The head of the tenant with the least counter, again and again; if there is no room for it, there is for nobody."""
        backlog = backlog_of(self.running)
        self.waiting.hold(self._prefill.floods(backlog))
        if len(self.running) < self.limits.max_running:
            self.waiting.wake(self._blocked)
        while len(self.running) < self.limits.max_running and (sequence := self.waiting.head()) is not None:
            try:
                outcome = self._try_admit(sequence, plan)
            except AdapterdError as error:
                self.fail_sequence(sequence, error)
                continue
            if outcome is _Outcome.NO_ROOM:
                return
            if outcome is _Outcome.BLOCKED:
                self.waiting.park(sequence)
            else:
                backlog[sequence.tenant] += sequence.remaining
                self.waiting.hold(self._prefill.floods(backlog))

    def _blocked(self, sequence: Sequence) -> bool:
        """Whether it waits for something that no turn gives it."""
        prefix = self._prefixes.get(sequence.seed)
        return self._slots.blocked(sequence) or (prefix is not None and not prefix.ready)

    def _try_admit(self, sequence: Sequence, plan: Plan) -> _Outcome:
        if not self._slots.loaded(sequence):
            return _Outcome.BLOCKED
        if not self._slots.resident(sequence):
            self._checks.together(sequence)
            if not self._slots.place(sequence, plan):
                return _Outcome.BLOCKED
        elif self._slots.held_back(sequence):
            return _Outcome.BLOCKED
        prefix = None
        if virtual := self._checks.virtual(sequence):
            prefix = self._prefixes.use(sequence.seed) or self._begin_prefix(sequence, virtual, plan)
            if prefix is None:
                return _Outcome.NO_ROOM
            if not prefix.ready:
                return _Outcome.BLOCKED
        return self._start(sequence, prefix, plan)

    def _begin_prefix(self, sequence: Sequence, virtual: int, plan: Plan) -> SharedPrefix | None:
        """Give the adapter's prefix its blocks: filled from stored K/V, or computed by a sequence of its own."""
        owner = owner_of(sequence)
        blocks = self._prefixes.allocate(self.pages.blocks_for(virtual), owner)
        if blocks is None:
            return None
        digest = next(d for d in sequence.adapters if self.residency.facts(d).virtual)
        facts = self.residency.facts(digest)
        ids = list(facts.ids) or [VIRTUAL] * virtual
        prefix = SharedPrefix(blocks, virtual, sequence.adapters, not facts.embedded, facts.shift, ids, owner)
        self._prefixes.begin(sequence.seed, prefix)
        if not facts.embedded:
            plan.changes.append(Fill(digest, tuple(blocks)))
            return prefix
        build = Sequence(None, sequence.adapters, sequence.seed, virtual, list(ids), virtual, blocks=blocks)
        build.tenant, prefix.unpaid = sequence.tenant, virtual
        self._join(build)
        return prefix

    def _start(self, sequence: Sequence, prefix: SharedPrefix | None, plan: Plan) -> _Outcome:
        """Give the sequence its shared blocks and let it run.

        It pays when it first starts, for what is neither shared nor cached, and for a prefix that was computed for it. Not
        when that is begun: its tenant would lose its turn to one whose prefix takes the very same blocks, and so on. Nor
        again after a preemption: charges without progress would let two tenants preempt each other for ever.
        """
        cached = self._checks.may_start_from_cache(sequence)
        if not self._prefixes.attach(sequence, prefix, plan, cached=cached, spare=bool(self.running)):
            return _Outcome.NO_ROOM
        unpaid = self._prefixes.settle(sequence.seed)
        first = not sequence.admitted_at
        if first:
            sequence.admitted_at = time.monotonic()
            sequence.cached = max(0, sequence.done - sequence.virtual)
            sequence.charged = sequence.prompt_end - sequence.done
        self._join(sequence)
        self.waiting.admit(sequence, sequence.charged + unpaid if first else 0)
        self._slots.admitted(sequence)
        return _Outcome.ADMITTED

    def _join(self, sequence: Sequence) -> None:
        self._slots.acquire(sequence)
        self.running[sequence] = None

    # -- preemption ----------------------------------------------------------------------------------------------

    def _reserve(self, sequence: Sequence, positions: int, plan: Plan, budget: StepBudget) -> bool:
        """Blocks for the first `positions` positions; preempts until there are enough."""
        need = self.pages.blocks_for(positions) - len(sequence.blocks)
        while need > 0:
            blocks = self._prefixes.allocate(need, owner_of(sequence))
            if blocks is not None:
                sequence.blocks += blocks
                break
            victim = self._victim()
            self._preempt(victim)
            budget.drop(victim)
            plan.preempted += 1
            if victim is sequence:
                return False
        return True

    def _victim(self) -> Sequence:
        """The youngest of the tenants with the largest counter; first of all prefixes that nobody waits for any more."""
        return max(reversed(self.running), key=self._served)  # the first of equals

    def _served(self, sequence: Sequence) -> float:
        counter = self.waiting.counter(sequence.tenant)
        return math.inf if counter is None else counter

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting, to be recomputed: its tokens are kept, its K/V is not."""
        self._leave(sequence)
        if sequence.request is None:
            self._prefixes.drop(sequence.seed)
        else:
            self.waiting.put_back(sequence)

    def _leave(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self._slots.release(sequence)
        if sequence.request is not None:  # a prefix's blocks belong to its entry
            self._prefixes.release(sequence)

    # -- results -------------------------------------------------------------------------------------------------

    def advance(self, rows: list[Row], samples: Mapping[Sequence, Sample]) -> None:
        """Book one step's results: `samples` has one entry for each row with `samples` or prompt scores."""
        for row in rows:
            sequence, request = row.sequence, row.sequence.request
            if request is not None and request.id not in self._by_id:
                continue  # cancelled while the step ran
            sequence.done += row.count - len(row.draft)
            if request is None:
                self._prefix_advanced(sequence)
            elif (sample := samples.get(sequence)) is None:
                continue
            elif request.task == "generate":
                self._sampled(sequence, request, sample, row)
            else:
                self._scored(sequence, request, sample, row)

    def _prefix_advanced(self, build: Sequence) -> None:
        if build.remaining == 0 and build in self.running:
            self._leave(build)
            self._prefixes.complete(build.seed)

    def _sampled(self, sequence: Sequence, request: Request, sample: Sample, row: Row) -> None:
        if sample.prompt:
            self._outbox.append(prompt_event(sequence, request, sample))
        if not row.samples:
            return
        if sample.token is None:
            self.fail(request.id, GenerationError(NOT_FINITE))
            return
        self._speculation.learn(sequence, len(row.draft), len(sample.more))
        tokens, finish = append(sequence, (sample.token, *sample.more), self._eos)
        self.waiting.generated(sequence, len(tokens))
        # Published only now: what led to a finite token may be shared, what led to NaN never is, nor is a wrong guess.
        self._prefixes.publish(sequence)
        event = token_event(sequence, request, tokens, finish)
        if finish is None:
            self._outbox.append(event)
        else:
            self._finish(sequence, event)

    def _scored(self, sequence: Sequence, request: Request, sample: Sample, row: Row) -> None:
        """Collect a chunk's scores; the last chunk's complete the request."""
        if sample.scores is None:
            self.fail(request.id, GenerationError(NOT_FINITE))
            return
        add_scores(sequence, sample.scores, row)
        if row.samples:
            self._prefixes.publish(sequence)
            self._finish(sequence, scores_event(sequence, request))

    def _finish(self, sequence: Sequence, event: Event) -> None:
        """What its prompt was charged for and never got is given back."""
        del self._by_id[event.request_id]
        event = event._replace(computed_tokens=sequence.computed)
        left = sequence.prompt_end - max(sequence.done, sequence.reached)
        if sequence in self.running:
            self._leave(sequence)
        else:
            unpaid = self._prefixes.settle(sequence.seed)  # whoever asks for a prefix and goes has it all the same
            self.waiting.charge(sequence.tenant, unpaid)
        self._slots.ended(sequence)
        self.waiting.remove(sequence, unserved=max(0, min(sequence.charged, left)))
        self._outbox.append(event)

    # -- invariants ----------------------------------------------------------------------------------------------

    def check_idle(self) -> None:
        """Raises: RuntimeError when blocks, pins or counters are held although nothing runs."""
        self.pages.check()
        if self.pages.used != self._prefixes.held:
            raise RuntimeError(f"{self.pages.used} KV blocks are held, the shared prefixes account for {self._prefixes.held}")
        if not self.residency.idle:
            raise RuntimeError("an adapter is pinned although nothing runs")
        if self.waiting.tenants:
            raise RuntimeError(f"{self.waiting.tenants} tenants' counters are kept although nothing waits or runs")
