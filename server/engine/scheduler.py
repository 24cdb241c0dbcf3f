"""Scheduler: which sequences run in the next step, with which blocks and slots. Never imports torch.

One rule: a sequence has `done` and `len(ids)`; a step spends a token budget moving `done` up. Prefill, chunked prefill,
decode, recompute after preemption and soft prompts are all that rule.

    waiting --admit--> running --advance--> finished          blocks run out: the youngest goes back to waiting
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from adapters_store.digest import Digest

from ..errors import AdapterdError, GenerationError, ValidationError
from ..requests import Event, FinishReason, Request, Token
from .budget import StepBudget
from .pages import Pages, chain_key, chain_seed
from .plan import Copy, Evict, Fill, Plan, Put, Row, Sample, Sequence
from .residency import Residency
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


@dataclass(eq=False)
class _SharedPrefix:
    """Read-only blocks that start every sequence of one tenant and adapter (or composition)."""

    blocks: list[int]
    length: int
    adapters: tuple[Digest, ...]
    ready: bool
    shift: int  # of the text behind it; see Sequence
    ids: list[int]  # [length], VIRTUAL where a position has no token


class _Admission(Enum):
    ADMITTED = auto()
    PASS = auto()  # cannot start yet; others may
    STOP = auto()  # nothing behind it may start either


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
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}  # in order of admission
        self._base = base
        self._eos = frozenset(eos)
        self._prefixes: OrderedDict[bytes, _SharedPrefix] = OrderedDict()  # least recently used first
        self._by_id: dict[str, Sequence] = {}
        self._warming: dict[Digest, None] = {}
        self._outbox: list[Event] = []
        self._speculation = Speculation(limits.speculate)

    # -- what comes in -------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running and not self._outbox

    def submit(self, request: Request) -> None:
        """Queue a request; how many may queue is the engine's business. Raises: ValidationError when it can never fit."""
        self._check_length(request, virtual=0)
        if len(request.adapters) > self.residency.capacity:
            raise ValidationError(
                f"`compose` needs {len(request.adapters)} adapter slots at once, this server has {self.residency.capacity}"
            )
        seed = chain_seed(request.tenant, self._base, *request.adapters)
        sequence = Sequence(request, request.adapters, seed, 0, list(request.prompt), len(request.prompt))
        self._by_id[request.id] = sequence
        self.waiting.append(sequence)

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
        self._drop_prefix(sequence.seed)
        for waiting in [s for s in self.waiting if s.seed == sequence.seed and s.request]:
            self.fail_sequence(waiting, error)

    def fail_adapter(self, digest: Digest, error: AdapterdError) -> None:
        """An adapter could not be loaded: whoever waits for it is told so."""
        self._warming.pop(digest, None)
        for sequence in [s for s in self.waiting if digest in s.adapters]:
            self.fail_sequence(sequence, error)

    def warm(self, digest: Digest) -> None:
        """Make an adapter resident although no request waits for it; it stays in line until a slot is free."""
        self._warming[digest] = None

    def forget(self, digest: Digest) -> None:
        """Drop the shared prefixes of an adapter; running sequences keep their blocks."""
        for seed in [seed for seed, prefix in self._prefixes.items() if digest in prefix.adapters and prefix.ready]:
            self._drop_prefix(seed)

    def take_events(self) -> list[Event]:
        events, self._outbox = self._outbox, []
        return events

    # -- one step ------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The next step. Admits, finds blocks, preempts where there are none."""
        plan = Plan()
        self._warm(plan)
        self._admit(plan)
        # Each prompt has its share of the step, so that many who wait are not served at the pace of one.
        prompts = sum(1 for sequence in self.running if sequence.remaining > 1)
        budget = StepBudget(self.limits.max_batch_tokens, self.limits.max_prefill_tokens * max(1, prompts))
        # Decode before prefill: a long prompt must not delay tokens of sequences that already stream.
        for sequence in sorted(self.running, key=lambda s: s.remaining > 1):
            if sequence not in self.running:
                continue  # preempted while an earlier one looked for blocks
            count = budget.room(sequence)
            if count > 0 and self._reserve(sequence, sequence.done + count, plan, budget):
                budget.add(Row(sequence, sequence.done, count))
        self._speculate(budget)
        plan.rows = list(budget.rows.values())
        self._request_loads(plan)  # last, because a plan that is never returned must have promised no load
        return plan

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
        if need > 0 and (blocks := self.pages.allocate(need)) is not None:
            sequence.blocks += blocks
        return max(0, min(count, len(sequence.blocks) * self.pages.block_size - len(sequence.ids)))

    def advance(self, rows: list[Row], samples: Mapping[Sequence, Sample]) -> None:
        """Book one step's results: `samples` has one entry for each row with `samples` or prompt scores."""
        for row in rows:
            sequence = row.sequence
            if sequence.request is not None and sequence.request.id not in self._by_id:
                continue  # cancelled while the step ran
            sequence.done += row.count - len(row.draft)
            if sequence.request is None:
                self._prefix_advanced(sequence)
                continue
            sample = samples.get(sequence)
            if sample is None:
                continue
            if sequence.request.task == "generate":
                self._sampled(sequence, sample, row)
            else:
                self._scored(sequence, sequence.request, sample, row)

    # -- admission -----------------------------------------------------------------------------------------------

    def _admit(self, plan: Plan) -> None:
        passed: list[Sequence] = []
        while self.waiting and len(self.running) < self.limits.max_running:
            sequence = self.waiting.popleft()
            outcome = self._try_admit(sequence, plan)
            if outcome is not _Admission.ADMITTED and self._is_known(sequence):
                passed.append(sequence)
            if outcome is _Admission.STOP:
                break
        self.waiting.extendleft(reversed(passed))

    def _try_admit(self, sequence: Sequence, plan: Plan) -> _Admission:
        placed = self._place_adapters(sequence, plan)
        if placed is not _Admission.ADMITTED:
            return placed
        try:
            virtual = self._virtual(sequence)
        except AdapterdError as error:
            self.fail_sequence(sequence, error)
            return _Admission.PASS
        prefix = None
        if virtual:
            prefix = self._prefixes.get(sequence.seed)
            if prefix is None:
                return self._begin_prefix(sequence, virtual, plan)
            if not prefix.ready:
                return _Admission.PASS
            self._prefixes.move_to_end(sequence.seed)
        return self._start(sequence, prefix, plan)

    def _warm(self, plan: Plan) -> None:
        for digest in list(self._warming):
            if self.residency.is_resident(digest) or self._place(digest, (), plan):
                del self._warming[digest]

    def _place_adapters(self, sequence: Sequence, plan: Plan) -> _Admission:
        if not all(self.residency.is_available(d) for d in sequence.adapters):
            return _Admission.PASS
        missing = [d for d in sequence.adapters if not self.residency.is_resident(d)]
        if missing and not self._fit_together(sequence):
            return _Admission.PASS
        for digest in missing:
            if not self._place(digest, sequence.adapters, plan):
                sequence.passed += 1
                return _Admission.STOP if sequence.passed > self.limits.patience else _Admission.PASS
        placed = all(self.residency.is_resident(d) for d in sequence.adapters)  # one may have gone for another
        return _Admission.ADMITTED if placed else _Admission.PASS

    def _fit_together(self, sequence: Sequence) -> bool:
        """Ends a sequence whose adapters are more than the device's memory for adapters; each alone is not."""
        budget = self.residency.budget
        if budget is None or len(sequence.adapters) < 2 or (needed := self.residency.needed(sequence.adapters)) <= budget:
            return True
        what = f"`compose` needs {needed} bytes of device memory for its adapters"
        self.fail_sequence(sequence, ValidationError(f"{what}, this server has {budget}"))
        return False

    def _place(self, digest: Digest, keep: Collection[Digest], plan: Plan) -> bool:
        """Move a loaded adapter into slots, if it is loaded and some are free or can be freed."""
        if not self.residency.is_available(digest):
            return False
        placement = self.residency.place(digest, keep)
        if placement is None:
            return False
        plan.changes += [Evict(victim, slots) for victim, slots in placement.evicted]
        plan.changes.append(Put(digest, placement.slots))
        return True

    def _virtual(self, sequence: Sequence) -> int:
        """Prefix positions of a sequence whose adapters are resident. Raises: ValidationError if it cannot be run."""
        lengths = [self.residency.facts(d).virtual for d in sequence.adapters]
        if sum(1 for n in lengths if n) > 1:
            raise ValidationError("`compose` takes at most one adapter with a prefix or soft prompt")
        if any(self.residency.facts(d).tasks for d in sequence.adapters):
            raise ValidationError("`task_id` is required: the adapter has a prompt per task")
        pools = [pool for d in sequence.adapters for pool in self.residency.facts(d).pools]
        if len(pools) != len(set(pools)):
            raise ValidationError("`compose` cannot apply two adapters of one family and size to one request")
        if sequence.request is not None:
            self._check_length(sequence.request, sum(lengths))
            if sequence.request.task == "classify" and self._head_reads(sequence) is None:
                raise ValidationError("`adapter_id` must name an adapter with a head to classify with")
        return sum(lengths)

    def _head_reads(self, sequence: Sequence) -> Literal[None, "last", "every"]:
        """Which positions of the text the head among the sequence's resident adapters reads; None without one."""
        return next((facts.head for d in sequence.adapters if (facts := self.residency.facts(d)).head), None)

    def _reads_every_position(self, sequence: Sequence, request: Request) -> bool:
        """Whether all of the text must be computed: the states behind a mean or a token's label are in no cache."""
        if request.task == "embed":
            return request.pooling == "mean"
        return request.task == "classify" and self._head_reads(sequence) == "every"

    def _begin_prefix(self, sequence: Sequence, virtual: int, plan: Plan) -> _Admission:
        """Give the adapter's prefix its blocks: filled from stored K/V, or computed by a sequence of its own."""
        blocks = self._allocate(self.pages.blocks_for(virtual))
        if blocks is None:
            return _Admission.STOP
        owner = next(d for d in sequence.adapters if self.residency.facts(d).virtual)
        facts = self.residency.facts(owner)
        ids = list(facts.ids) or [VIRTUAL] * virtual
        prefix = _SharedPrefix(blocks, virtual, sequence.adapters, not facts.embedded, facts.shift, ids)
        self._prefixes[sequence.seed] = prefix
        if not facts.embedded:
            plan.changes.append(Fill(owner, tuple(blocks)))
            return self._start(sequence, prefix, plan)
        build = Sequence(None, sequence.adapters, sequence.seed, virtual, list(ids), virtual, blocks=blocks)
        self._join(build)
        return _Admission.PASS

    def _start(self, sequence: Sequence, prefix: _SharedPrefix | None, plan: Plan) -> _Admission:
        """Give the sequence its shared blocks and let it run."""
        if prefix is not None and not sequence.virtual:
            sequence.virtual = prefix.length
            sequence.shift = prefix.shift
            sequence.ids = prefix.ids + sequence.ids
            sequence.prompt_end += prefix.length
        size = self.pages.block_size
        shared = prefix.length // size if prefix else 0
        matched = self._match(sequence, shared)
        own = self.pages.blocks_for(len(sequence.ids) + 1) - shared - len(matched)
        if self.running and own > self.pages.available:
            self.pages.release(matched)
            return _Admission.STOP
        sequence.done = (shared + len(matched)) * size
        if prefix is not None:
            for block in prefix.blocks[:shared]:
                self.pages.hold(block)
            sequence.blocks = prefix.blocks[:shared] + matched
            if sequence.done < prefix.length and not self._copy_tail(sequence, prefix, plan):
                self._release_blocks(sequence)
                return _Admission.STOP
        else:
            sequence.blocks = matched
        sequence.published = shared + len(matched)
        if not sequence.admitted_at:
            sequence.admitted_at = time.monotonic()
            sequence.cached = sequence.done - sequence.virtual if matched else 0
        self._join(sequence)
        return _Admission.ADMITTED

    def _copy_tail(self, sequence: Sequence, prefix: _SharedPrefix, plan: Plan) -> bool:
        """The prefix ends inside a block: the sequence gets that block as its own copy, to write on behind it."""
        source = prefix.blocks[-1]
        self.pages.hold(source)  # finding a block may drop this very prefix
        tail = self._allocate(1)
        self.pages.release([source])  # changes are applied in order, so whoever gets it next comes after the copy
        if tail is None:
            return False
        plan.changes.append(Copy(source, tail[0]))
        sequence.blocks += tail
        sequence.done = prefix.length
        return True

    def _match(self, sequence: Sequence, shared: int) -> list[int]:
        """Cached blocks behind the shared prefix; at least one position is always left to compute."""
        request = sequence.request
        if request is None or request.sampling.prompt_logprobs or self._reads_every_position(sequence, request):
            return []
        full = (len(sequence.ids) - 1) // self.pages.block_size
        self._extend_keys(sequence, full)
        return self.pages.match(sequence.keys[shared:full])

    def _join(self, sequence: Sequence) -> None:
        self.residency.acquire(sequence.adapters)
        slots: dict[str, int] = {}
        for digest in sequence.adapters:
            slots |= self.residency.slots(digest)
        sequence.slots = slots
        self.running[sequence] = None

    def _request_loads(self, plan: Plan) -> None:
        """Have the next few adapters loaded, in the order in which they are waited for."""
        wanted = dict.fromkeys([*self._warming, *(d for s in self.waiting for d in s.adapters)])
        for digest in self.residency.loaded_only:
            if digest not in wanted:
                self.residency.forget(digest)
        for digest in wanted:
            if self.residency.in_flight >= self.limits.prefetch:
                return
            if self.residency.want(digest):
                plan.loads.append(digest)

    # -- blocks --------------------------------------------------------------------------------------------------

    def _reserve(self, sequence: Sequence, positions: int, plan: Plan, budget: StepBudget) -> bool:
        """Blocks for the first `positions` positions; preempts the youngest until there are enough."""
        need = self.pages.blocks_for(positions) - len(sequence.blocks)
        while need > 0:
            blocks = self._allocate(need)
            if blocks is not None:
                sequence.blocks += blocks
                break
            victim = next(reversed(self.running))
            self._preempt(victim)
            budget.drop(victim)
            plan.preempted += 1
            if victim is sequence:
                return False
        return True

    def _allocate(self, count: int) -> list[int] | None:
        """Blocks, at the price of idle shared prefixes if need be."""
        while self.pages.available < count:
            seed = next((s for s, p in self._prefixes.items() if p.ready), None)
            if seed is None:
                return None
            self._drop_prefix(seed)
        return self.pages.allocate(count)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting, to be recomputed: its tokens are kept, its K/V is not."""
        self._leave(sequence)
        if sequence.request is None:
            self._drop_prefix(sequence.seed)
        else:
            self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self.residency.release(sequence.adapters)
        sequence.slots = {}
        if sequence.request is not None:  # a prefix's blocks belong to its entry
            self._release_blocks(sequence)

    def _release_blocks(self, sequence: Sequence) -> None:
        self.pages.release(sequence.blocks)
        sequence.blocks = []
        sequence.published = sequence.done = 0

    def _drop_prefix(self, seed: bytes) -> None:
        prefix = self._prefixes.pop(seed, None)
        if prefix is not None:
            self.pages.release(prefix.blocks)

    def _publish_blocks(self, sequence: Sequence) -> None:
        full = sequence.done // self.pages.block_size
        if full > sequence.published:
            self._extend_keys(sequence, full)
            for index in range(sequence.published, full):
                self.pages.publish(sequence.blocks[index], sequence.keys[index])
            sequence.published = full

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        size = self.pages.block_size
        while len(sequence.keys) < count:
            start = len(sequence.keys) * size
            previous = sequence.keys[-1] if sequence.keys else sequence.seed
            sequence.keys.append(chain_key(previous, sequence.ids[start : start + size]))

    # -- results -------------------------------------------------------------------------------------------------

    def _prefix_advanced(self, build: Sequence) -> None:
        if build.remaining == 0 and build in self.running:
            self._leave(build)
            self._prefixes[build.seed].ready = True

    def _sampled(self, sequence: Sequence, sample: Sample, row: Row) -> None:
        request = sequence.request
        if request is None:
            return
        if sample.prompt:
            sequence.scored += len(sample.prompt)
            self._outbox.append(Event(request.id, prompt=sample.prompt))
        if not row.samples:
            return
        if sample.token is None:
            error = GenerationError("the adapter produced values that are not finite")
            self.fail(request.id, error)
            return
        self._speculation.learn(sequence, len(row.draft), len(sample.more))
        tokens, finish = self._append(sequence, (sample.token, *sample.more))
        # Published only now: what led to a finite token may be shared, what led to NaN never is, nor is a wrong guess.
        self._publish_blocks(sequence)
        event = self._token_event(sequence, request, tokens, finish)
        if finish is None:
            self._outbox.append(event)
        else:
            self._finish(sequence, event)

    def _append(self, sequence: Sequence, tokens: tuple[Token, ...]) -> tuple[tuple[Token, ...], FinishReason | None]:
        """Take tokens up to the one that ends the sequence, if one does; the last one taken is still to be computed."""
        taken: list[Token] = []
        finish = None
        for token in tokens:
            sequence.ids.append(token.id)
            taken.append(token)
            finish = self._finish_reason(sequence, token)
            if finish is not None:
                break
        sequence.done = len(sequence.ids) - 1
        return tuple(taken), finish

    def _scored(self, sequence: Sequence, request: Request, sample: Sample, row: Row) -> None:
        """Collect a chunk's scores; the last chunk's complete the request."""
        if sample.scores is None:
            self.fail(request.id, GenerationError("the adapter produced values that are not finite"))
            return
        if row.start == sequence.virtual:
            sequence.scores.clear()  # it was preempted and starts again
        sequence.scores += sample.scores
        if row.samples:
            self._publish_blocks(sequence)
            event = Event(
                request.id,
                finish=FinishReason.SCORED,
                cached_tokens=sequence.cached,
                queue_seconds=sequence.admitted_at - request.arrival,
                scores=tuple(sequence.scores),
            )
            self._finish(sequence, event)

    def _token_event(
        self, sequence: Sequence, request: Request, tokens: tuple[Token, ...], finish: FinishReason | None
    ) -> Event:
        first = not sequence.started
        sequence.started = True
        return Event(
            request.id,
            tokens=tokens,
            finish=finish,
            cached_tokens=sequence.cached,
            queue_seconds=sequence.admitted_at - request.arrival if first else None,
        )

    def _finish_reason(self, sequence: Sequence, token: Token) -> FinishReason | None:
        sampling = sequence.sampling
        if token.id in self._eos and not sampling.ignore_eos:
            return FinishReason.EOS
        if sequence.generated >= sampling.max_new_tokens:
            return FinishReason.LENGTH
        return None

    def _finish(self, sequence: Sequence, event: Event) -> None:
        del self._by_id[event.request_id]
        if sequence in self.running:
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._outbox.append(event)

    # -- invariants ----------------------------------------------------------------------------------------------

    def check_idle(self) -> None:
        """Raises: RuntimeError when blocks or pins are held although nothing runs."""
        self.pages.check()
        held = {block for prefix in self._prefixes.values() for block in prefix.blocks}
        if self.pages.used != len(held):
            raise RuntimeError(f"{self.pages.used} KV blocks are held, the shared prefixes account for {len(held)}")
        if not self.residency.idle:
            raise RuntimeError("an adapter is pinned although nothing runs")

    def _is_known(self, sequence: Sequence) -> bool:
        return sequence.request is not None and sequence.request.id in self._by_id

    def _check_length(self, request: Request, virtual: int) -> None:
        given, new = len(request.prompt) + virtual, request.sampling.max_new_tokens
        if given + new > self.limits.max_total_tokens:
            raise ValidationError(
                f"`inputs` tokens + `max_new_tokens` must be <= {self.limits.max_total_tokens}. "
                f"Given: {given} `inputs` tokens and {new} `max_new_tokens`"
            )
