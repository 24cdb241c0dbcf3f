"""Runner: everything that happens on the device. One plan in, one sample per finished row out.

Owns the KV cache tensors, the sites and the step. Never decides what runs (the scheduler did), never waits for anything
but the device, and is called from one thread only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain

import torch
from torch import Tensor

from adapters_store.digest import Digest

from .. import host_memory
from ..engine.plan import Change, Copy, Evict, Fill, Put, Row, Sample
from ..engine.plan import Sequence as Seq
from ..methods.base import Adapter, Method, Prefix
from ..requests import Task, Token
from ..step_times import StepTimes
from .attention import LayerAttention, bind
from .batch import BatchBuilder, order_rows
from .graphs import DecodeGraphs, GraphLimits, Record
from .kernels import Kernels
from .loader import Base
from .readout import Readout
from .sampling import SampleRow, sample, score_prompt
from .sites import Sites
from .step import Step


@dataclass(frozen=True)
class CacheShape:
    """Size of the KV cache. `blocks` counts the null block."""

    blocks: int
    block_size: int

    def nbytes(self, base: Base) -> int:
        return self.blocks * block_nbytes(base, self.block_size)


def block_nbytes(base: Base, block_size: int) -> int:
    """Bytes of one block in all layers, keys and values."""
    shape = base.shape
    return 2 * shape.num_layers * block_size * shape.num_kv_heads * shape.head_dim * base.dtype.itemsize


class Runner:
    """The base with its cache and resident adapters. Invariant: cache block 0 is zero."""

    def __init__(
        self,
        base: Base,
        cache: CacheShape,
        methods: Mapping[str, Method],
        kernels: Kernels,
    ) -> None:
        shape = base.shape
        self.base = base
        self.times = StepTimes()  # shared with whoever calls `run`
        self.step = Step()
        self.sites = Sites(base.model, shape, self.step, methods, base.device, base.dtype)
        size = (cache.blocks, cache.block_size, shape.num_kv_heads, shape.head_dim)
        zeros = partial(_zeros, device=base.device, dtype=base.dtype)
        self._caches = [kernels.caches(zeros, size) for _ in range(shape.num_layers)]
        self._ahead = host_memory.Ahead(list(chain.from_iterable(self._caches)) if base.device.type == "cpu" else ())
        self._batch = BatchBuilder(self.step, cache.block_size, base.device)
        self._embed = base.model.get_input_embeddings()  # type: ignore[operator]
        self._graphs: DecodeGraphs | None = None
        self._prefixes: dict[Digest, Prefix] = {}
        self._adapter_bytes: int | None = None  # until asked for again after a change
        self._readout = Readout(base.model, base.device)
        self._peaks = kernels.peaks
        layers = [LayerAttention(*caches, self.step, kernels.attention, kernels.write) for caches in self._caches]
        bind(base.attention, layers)

    def use_graphs(self, record: Record, limits: GraphLimits) -> None:
        """From now on, steps of decodes are recorded once and replayed. The cache must have the limits' spare block."""
        self._graphs = DecodeGraphs(self.step, self.sites, lambda: self._logits(None), limits, record)

    @property
    def adapter_bytes(self) -> int:
        """Of the resident adapters: their pools and heads, and the prefixes kept for writing into pages again."""
        if self._adapter_bytes is None:
            prefixes = sum(prefix.nbytes for prefix in self._prefixes.values())
            self._adapter_bytes = self.sites.nbytes + self._readout.nbytes + prefixes
        return self._adapter_bytes

    # -- between forward passes ----------------------------------------------------------------------------------

    def apply(self, changes: Sequence[Change], adapters: Mapping[Digest, Adapter]) -> None:
        """Bring slots and blocks in line with a plan, in its order. `adapters` holds those that are being put."""
        self._adapter_bytes = None
        with torch.inference_mode():
            for change in changes:
                match change:
                    case Evict(digest, slots):
                        self._evict(digest, slots)
                    case Put(digest, slots):
                        self._put(adapters[digest], slots)
                    case Fill(digest, blocks):
                        self._reach(blocks)
                        self._fill(self._prefixes[digest], blocks)
                    case Copy(source, target):
                        for cache in chain.from_iterable(self._caches):
                            cache[target] = cache[source]

    def _put(self, adapter: Adapter, slots: Mapping[str, int]) -> None:
        with self._changing(slots):
            for part in adapter.parts:
                if part.pool is not None:
                    self.sites.put(part, slots[part.pool])
                if part.prefix is not None:
                    self._prefixes[adapter.digest] = part.prefix
                if part.head is not None:
                    self._readout.put(adapter.digest, part.head)

    def _evict(self, digest: Digest, slots: Mapping[str, int]) -> None:
        with self._changing(slots):
            for pool, slot in slots.items():
                self.sites.clear(pool, slot)
            self._prefixes.pop(digest, None)
            self._readout.clear(digest)

    @contextmanager
    def _changing(self, slots: Mapping[str, int]) -> Iterator[None]:
        """What was prepared for rows in other slots stays, unless an op came or went or moved its memory."""
        version = self.sites.version
        self._batch.forget_slots(slots)
        try:
            yield
        finally:
            if self.sites.version != version:
                self._batch.forget_composition()

    def _fill(self, prefix: Prefix, blocks: Sequence[int]) -> None:
        """Write stored K/V [layers, N, kv_heads, head_dim] into blocks that start at position 0."""
        if prefix.keys is None or prefix.values is None:
            raise ValueError("a prefix of embeddings or tokens has no K/V to write")
        at = torch.tensor(blocks, device=self.base.device)
        for layer, caches in enumerate(self._caches):
            for cache, stored in zip(caches, (prefix.keys, prefix.values), strict=True):
                padded = torch.zeros((len(blocks) * cache.shape[1], *cache.shape[2:]), device=cache.device, dtype=cache.dtype)
                padded[: prefix.length] = stored[layer].to(cache)
                cache[at] = padded.view(len(blocks), *cache.shape[1:])

    def release_memory(self) -> None:
        """Let go of what is kept for speed alone: weights gathered for a composition, and the allocator's free blocks."""
        self._batch.forget_composition()
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()

    def scratch_blocks(self, positions: int) -> list[int]:
        """Blocks for a sequence of so many positions that nobody waits for, while nothing else runs: always the same ones."""
        return list(range(1, 1 - -positions // self._caches[0][0].shape[1]))

    def prepare(self) -> bool:
        """Do some of what later steps would have to, nobody waiting for one; whether more is left. Some milliseconds."""
        return self._ahead.more()

    def _reach(self, blocks: Iterable[int]) -> None:
        """These blocks are about to be written. Fresh ones are handed out in order, so below the highest all may be."""
        self._ahead.reach((1 + max(blocks)) * self._caches[0][0][0].nbytes)

    def warm_up(self, tokens: int) -> int:
        """One pass over `tokens` tokens before anybody waits for one; returns the bytes of host memory the cache takes then.

        Threads start and buffers grow to a full step's size, so that what the process holds afterwards is what it needs.
        """
        blocks, size = self._caches[0][0].shape[:2]
        count = min(tokens, (blocks - 1) * size)
        scratch = self.scratch_blocks(count)
        self.run([Row(Seq(None, (), b"", 0, [0] * count, count, blocks=scratch), 0, count)])
        self._batch.forget_composition()
        return self._ahead.nbytes

    # -- a forward pass ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> dict[Seq, Sample]:
        """One step. Returns a sample for each row that reached its end, and scores where they were asked for."""
        rows = order_rows(rows)
        kept = [_kept_positions(row) for row in rows]
        begins = list(accumulate((row.count for row in rows), initial=0))
        keep = [begin + offset for begin, offsets in zip(begins, kept, strict=False) for offset in offsets]
        self._batch.fill(rows, keep)
        self._reach(row.sequence.blocks[-1] for row in rows)
        self.times.mark("fill")
        with self._readout.watching(rows):
            logits = self._forward(rows, begins)
        self.times.mark("forward")
        samples = self._sample(rows, kept, logits) | self._readout.read(rows, begins)
        self.times.mark("sample")
        return samples

    def _forward(self, rows: Sequence[Row], begins: Sequence[int]) -> Tensor:
        """-> logits [K, V] of the kept positions."""
        embeddings = self._soft_prompts(rows, begins)
        replayed = self._graphs.run() if self._graphs is not None and embeddings is None else None
        return self._logits(embeddings) if replayed is None else replayed

    def _logits(self, embeddings: Tensor | None) -> Tensor:
        """The model over the step as it stands; embeddings [1, T, hidden] in place of its ids where some have none."""
        step = self.step
        given = {"input_ids": step.ids[None]} if embeddings is None else {"inputs_embeds": embeddings}
        keep = step.keep if len(step.keep) < len(step.ids) else 0  # all of them need no gathering
        out = self.base.model(**given, position_ids=step.positions[None], use_cache=False, logits_to_keep=keep)
        logits: Tensor = out.logits[0]
        return logits

    def _soft_prompts(self, rows: Sequence[Row], begins: Sequence[int]) -> Tensor | None:
        """[1, T, hidden] when some row is a soft prompt being run, with its embeddings in place; else None."""
        builds = [(row, begin) for row, begin in zip(rows, begins, strict=False) if _is_soft_prompt(row)]
        if not builds:
            return None
        embedded: Tensor = self._embed(self.step.ids[None]).clone()
        for row, begin in builds:
            prompt = next(self._prefixes[d] for d in row.sequence.adapters if d in self._prefixes).embeddings
            if prompt is None:
                raise ValueError("a prefix without embeddings is no soft prompt")
            embedded[0, begin : begin + row.count] = prompt[row.start : row.start + row.count].to(embedded)
        return embedded

    def _sample(self, rows: Sequence[Row], kept: Sequence[range], logits: Tensor) -> dict[Seq, Sample]:
        ends = list(accumulate(len(offsets) for offsets in kept))
        picked = self._pick(rows, ends, logits)
        samples: dict[Seq, Sample] = {}
        for i, row in enumerate(rows):
            prompt = self._score(row, kept[i], logits[ends[i] - len(kept[i]) : ends[i]]) if _wants_scores(row) else ()
            if _task(row) == "score" and row.samples:
                samples[row.sequence] = _score_choices(row, logits[ends[i] - 1])
            elif i in picked:
                token, *more = picked[i]
                samples[row.sequence] = Sample(token, prompt, more=_confirmed(row.draft, token, more))
            elif prompt:
                samples[row.sequence] = Sample(None, prompt)
        return samples

    def _pick(self, rows: Sequence[Row], ends: Sequence[int], logits: Tensor) -> dict[int, list[Token | None]]:
        """For each row that picks its next token: that token, and one more behind every guess as if it were right."""
        picking = [(i, row) for i, row in enumerate(rows) if row.samples and _task(row) == "generate"]
        places = [ends[i] - 1 - behind for i, row in picking for behind in range(len(row.draft), -1, -1)]
        if not places:
            return {}
        chosen = logits if len(places) == len(logits) else logits[torch.tensor(places, device=logits.device)]
        asked = [_sample_row(row, guesses) for _, row in picking for guesses in range(len(row.draft) + 1)]
        tokens = iter(sample(chosen, asked, self._peaks))
        return {i: [next(tokens) for _ in range(len(row.draft) + 1)] for i, row in picking}

    def _score(self, row: Row, offsets: range, logits: Tensor) -> tuple[Token, ...]:
        """Logprobs of the prompt tokens that this chunk's positions predict; the first one of all has none."""
        seq = row.sequence
        first = row.start + offsets.start + 1  # the position whose token the first kept logits predict
        targets = seq.ids[first : min(first + len(offsets), seq.prompt_end)]
        at = torch.tensor(targets, device=logits.device, dtype=torch.int64)
        scores = score_prompt(logits[: len(targets)], at, self._peaks) if targets else []
        scored = [Token(i, s) for i, s in zip(targets, scores, strict=True)]
        head = [Token(seq.ids[seq.virtual], None)] if seq.scored == 0 else []
        return (*head, *scored)


def _zeros(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A zero tensor; on the CPU its pages cost memory only once they are written (torch.zeros would touch them all)."""
    if device.type != "cpu":
        return torch.zeros(size, device=device, dtype=dtype)
    return host_memory.zeros(size, dtype, large_pages=True)


def _is_soft_prompt(row: Row) -> bool:
    """Whether it is a prefix being run whose positions have no tokens, but embeddings of their own."""
    return row.sequence.request is None and min(row.sequence.ids) < 0


def _task(row: Row) -> Task | None:
    """None for a soft prompt being run."""
    return None if row.sequence.request is None else row.sequence.request.task


def _score_choices(row: Row, logits: Tensor) -> Sample:
    """logits [V] behind a prompt -> the logprobs of the tokens that its request asks about."""
    choices = row.sequence.request.choices if row.sequence.request is not None else ()
    logprobs = logits.float().log_softmax(-1)
    scores = logprobs[torch.tensor(choices, device=logits.device, dtype=torch.int64)].tolist()
    finite = bool(torch.isfinite(logits).all())
    return Sample(None, scores=(tuple(scores),) if finite else None)


def _wants_scores(row: Row) -> bool:
    """Whether this chunk holds prompt positions whose scores were asked for and not yet given."""
    seq = row.sequence
    return seq.request is not None and seq.sampling.prompt_logprobs and seq.scored < seq.prompt_end - seq.virtual


def _kept_positions(row: Row) -> range:
    """Offsets within the row whose logits are wanted."""
    if not _wants_scores(row):
        wanted = 1 + len(row.draft) if row.samples and not row.reads_hidden else 0
        return range(row.count - wanted, row.count)
    seq = row.sequence
    done = seq.virtual + max(seq.scored, 1) - 1  # the position that predicts the next prompt token to score
    return range(max(0, done - row.start), row.count)


def _sample_row(row: Row, guesses: int) -> SampleRow:
    """How the token behind so many of the row's guesses is picked.

    The tokens of a discrete prompt count as the prompt's own; positions without a token do not.
    """
    seq = row.sequence
    return SampleRow(
        seq.sampling,
        seq.generated + guesses,
        lambda: [i for i in seq.ids[: seq.prompt_end] if i >= 0],
        lambda: [*seq.ids[seq.prompt_end :], *row.draft[:guesses]],
    )


def _confirmed(draft: Sequence[int], token: Token | None, more: Sequence[Token | None]) -> tuple[Token, ...]:
    """What follows `token` for as long as the guess before it is what was picked."""
    found: list[Token] = []
    for guess, behind in zip(draft, more, strict=True):
        if token is None or token.id != guess or behind is None:
            break
        found.append(behind)
        token = behind
    return tuple(found)
