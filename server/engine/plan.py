"""Plan: one step of work as data, from the scheduler (which writes it) to the runner (which reads it).

Plan(rows=[(seq3, start 41, count 1), (seq7, 0, 4), (seq5, 12, 1)])      decode, prefill, decode in one step
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters_store.digest import Digest

from ..requests import Request, Sampling, Token


@dataclass(eq=False)
class Sequence:
    """One row of the batch: its token ids, how far they are computed, and the blocks that hold their K/V.

        ids   [-1 -1 -1 | 97 12 55 | 8 4]      virtual | prompt | generated
        done         5 of 8 positions computed; a step moves `done` up, and samples when it reaches `len`

    `request` is None for a soft prompt being run once: its blocks then become the adapter's shared prefix.
    """

    request: Request | None
    adapters: tuple[Digest, ...]
    seed: bytes  # root of its block hash chain
    virtual: int  # positions in front of the text
    ids: list[int]
    prompt_end: int  # virtual + prompt length
    done: int = 0
    shift: int = 0  # of its text: place in the KV cache - position id
    blocks: list[int] = field(default_factory=list)  # grows in place; another list once the K/V is another
    slots: Mapping[str, int] = field(default_factory=dict)  # pool -> slot, while running
    keys: list[bytes] = field(default_factory=list)  # hash chain of full blocks, computed on demand
    published: int = 0  # leading blocks that are in the prefix cache
    cached: int = 0  # positions found in the prefix cache at first admission
    reached: int = 0  # positions that had been computed when it was preempted, at most
    charged: int = 0  # prompt positions that its tenant was charged for
    scored: int = 0  # prompt tokens whose logprobs were reported, when asked for
    admitted_at: float = 0.0  # time.monotonic() of the first admission; 0 before
    began_at: float = 0.0  # time.monotonic() of its first token; 0 before
    tenant: str = ""  # whose work it is
    number: int = 0  # in order of arrival
    scores: list[tuple[float, ...]] = field(default_factory=list)  # so far, of a task that generates nothing

    @property
    def sampling(self) -> Sampling:
        if self.request is None:
            raise RuntimeError("a prefix being built has no sampling")
        return self.request.sampling

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_end

    @property
    def computed(self) -> int:
        """Positions of its prompt that were computed for it, neither shared nor found in the cache, and tokens generated."""
        reached = self.prompt_end if self.generated else min(max(self.done, self.reached), self.prompt_end)
        return max(0, reached - self.virtual - self.cached) + self.generated

    @property
    def remaining(self) -> int:
        """Positions still to compute before the next token can be sampled."""
        return len(self.ids) - self.done


@dataclass(frozen=True)
class Row:
    """`count` positions of one sequence, from `start` on; the last of them may be guesses, to be verified.

    ids [97 12 55 8]   start 3, draft (4, 31)   ->   positions 3 4 5 with ids 8 4 31
    """

    sequence: Sequence
    start: int
    count: int
    draft: tuple[int, ...] = ()  # ids guessed to follow the sequence's own; counted in `count`

    @property
    def samples(self) -> bool:
        """Whether this row reaches the sequence's last position: it picks the next token, or completes the scores."""
        reached = self.start + self.count - len(self.draft)
        return self.sequence.request is not None and reached == len(self.sequence.ids)

    @property
    def of_prompt(self) -> bool:
        """Whether these positions were given, not generated. Such that are both are planned as two rows where it matters."""
        return self.start < self.sequence.prompt_end

    @property
    def reads_hidden(self) -> bool:
        """Whether it is the final hidden states that are wanted, not logits over the vocabulary."""
        return self.sequence.request is not None and self.sequence.request.task in ("classify", "embed")


@dataclass(frozen=True)
class Evict:
    digest: Digest
    slots: Mapping[str, int]


@dataclass(frozen=True)
class Put:
    digest: Digest
    slots: Mapping[str, int]


@dataclass(frozen=True)
class Fill:
    """Write an adapter's stored prefix K/V into its blocks."""

    digest: Digest
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Copy:
    """Copy one block: a shared prefix's last, partly filled block becomes a sequence's own."""

    source: int
    target: int


Change = Evict | Put | Fill | Copy


@dataclass
class Plan:
    """What the runner does in one step: the changes, in order, then one forward pass over the rows."""

    rows: list[Row] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    loads: list[Digest] = field(default_factory=list)  # adapters whose loading should start now
    preempted: int = 0

    @property
    def tokens(self) -> int:
        return sum(row.count for row in self.rows)


@dataclass(frozen=True)
class Sample:
    """What the forward pass said about one row. `token` or `scores` is None when its numbers were not finite."""

    token: Token | None
    prompt: tuple[Token, ...] = ()  # scores of this chunk's prompt tokens, when asked for
    scores: tuple[tuple[float, ...], ...] | None = ()  # what this chunk adds, where the task generates nothing
    more: tuple[Token, ...] = ()  # what follows `token` at once, one for each leading guess of the row's draft that was right
