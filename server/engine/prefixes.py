"""Prefixes: blocks that sequences share, and what each sequence holds of them. Block ids only; never imports torch.

Owns the shared prefixes of adapters and finds blocks at their expense. Decides neither who runs nor who is preempted.

    blocks of a sequence    [ adapter's prefix | found in the cache | its own ...]
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from adapters_store.digest import Digest

from .pages import Owner, Pages, chain_key
from .plan import Copy, Plan, Sequence


@dataclass(eq=False)
class SharedPrefix:
    """Read-only blocks that start every sequence of one tenant and adapter (or composition)."""

    blocks: list[int]
    length: int
    adapters: tuple[Digest, ...]
    ready: bool
    shift: int  # of the text behind it; see Sequence
    ids: list[int]  # [length], virtual positions where it has no token
    owner: Owner
    unpaid: int = 0  # positions computed for it that nobody was charged for


class Prefixes:
    """Shared prefixes by the root of their hash chain. Invariant: each holds its blocks until it is dropped."""

    def __init__(self, pages: Pages, splits_prompts: bool = False) -> None:
        """`splits_prompts`: see `SchedulerLimits`."""
        self._pages = pages
        self._splits_prompts = splits_prompts
        self._prefixes: OrderedDict[bytes, SharedPrefix] = OrderedDict()  # least recently used first

    def get(self, seed: bytes) -> SharedPrefix | None:
        return self._prefixes.get(seed)

    def use(self, seed: bytes) -> SharedPrefix | None:
        """The same, which makes it the most recently used."""
        if seed in self._prefixes:
            self._prefixes.move_to_end(seed)
        return self._prefixes.get(seed)

    def begin(self, seed: bytes, prefix: SharedPrefix) -> None:
        self._prefixes[seed] = prefix

    def complete(self, seed: bytes) -> None:
        """It has been computed."""
        self._prefixes[seed].ready = True

    def settle(self, seed: bytes) -> int:
        """Positions that are to be charged for it: all that were computed, and 0 from then on, as for unknown ones."""
        prefix = self._prefixes.get(seed)
        if prefix is None:
            return 0
        unpaid, prefix.unpaid = prefix.unpaid, 0
        return unpaid

    def drop(self, seed: bytes) -> None:
        """Running sequences keep their blocks. Unknown ones are ignored."""
        prefix = self._prefixes.pop(seed, None)
        if prefix is not None:
            self._pages.release(prefix.blocks)

    def forget(self, digest: Digest) -> None:
        """Drop those of an adapter that are complete."""
        for seed in [seed for seed, prefix in self._prefixes.items() if digest in prefix.adapters and prefix.ready]:
            self.drop(seed)

    @property
    def held(self) -> int:
        """Blocks of shared prefixes."""
        return len({block for prefix in self._prefixes.values() for block in prefix.blocks})

    # -- blocks --------------------------------------------------------------------------------------------------

    def allocate(self, count: int, owner: Owner) -> list[int] | None:
        """Blocks, at the price of idle ones and of shared prefixes if need be: of whoever has most."""
        while self._pages.free < count and (seed := self._excessive()) is not None:
            self.drop(seed)
        while self._pages.available < count:
            seed = next((s for s, p in self._prefixes.items() if p.ready), None)
            if seed is None:
                return None
            self.drop(seed)
        return self._pages.allocate(count, owner)

    def _excessive(self) -> bytes | None:
        """An unused prefix of the tenant that has most blocks, if it keeps more in those than in idle blocks.

        None where there is one tenant only: its idle blocks go before its prefixes.
        """
        shares = self._pages.shares
        if len(shares) < 2:
            return None
        unused = {s: p for s, p in self._prefixes.items() if p.ready and not self._in_use(p)}
        spare = {p.owner.name for p in unused.values()} | {name for name in shares if self._pages.idle(name)}
        most = max(spare, key=lambda name: shares[name], default="")
        own = [seed for seed, prefix in unused.items() if prefix.owner.name == most]
        return own[0] if sum(len(unused[seed].blocks) for seed in own) > self._pages.idle(most) else None

    def _in_use(self, prefix: SharedPrefix) -> bool:
        """A last block that is not full is copied, so only the first tells."""
        return any(self._pages.is_shared(block) for block in prefix.blocks[:1])

    # -- a sequence's blocks -------------------------------------------------------------------------------------

    def attach(self, sequence: Sequence, prefix: SharedPrefix | None, plan: Plan, *, cached: bool, spare: bool) -> bool:
        """Give a sequence the blocks that it shares; false, and no change, when there is no room.

        `cached`: it may start from the prefix cache. `spare`: only if its own blocks would be there now, too.
        """
        if prefix is not None and not sequence.virtual:
            _put_behind(sequence, prefix)
        size = self._pages.block_size
        shared = prefix.length // size if prefix else 0
        matched = self._match(sequence, shared) if cached else []
        own = self._pages.blocks_for(len(sequence.ids) + 1) - shared - len(matched)
        if spare and own > self._pages.available:
            self._pages.release(matched)
            return False
        sequence.done = (shared + len(matched)) * size
        sequence.blocks = matched
        if prefix is not None:
            for block in prefix.blocks[:shared]:
                self._pages.hold(block)
            sequence.blocks = prefix.blocks[:shared] + matched
            if sequence.done < prefix.length and not self._copy_tail(sequence, prefix, plan):
                self.release(sequence)
                return False
        sequence.published = shared + len(matched)
        return True

    def _copy_tail(self, sequence: Sequence, prefix: SharedPrefix, plan: Plan) -> bool:
        """The prefix ends inside a block: the sequence gets that block as its own copy, to write on behind it."""
        source = prefix.blocks[-1]
        self._pages.hold(source)  # finding a block may drop this very prefix
        tail = self.allocate(1, owner_of(sequence))
        self._pages.release([source])  # changes are applied in order, so whoever gets it next comes after the copy
        if tail is None:
            return False
        plan.changes.append(Copy(source, tail[0]))
        sequence.blocks += tail
        sequence.done = prefix.length
        return True

    def release(self, sequence: Sequence) -> None:
        """It holds no blocks any more, and what was computed for it is gone."""
        self._pages.release(sequence.blocks)
        sequence.blocks = []
        sequence.reached = max(sequence.reached, sequence.done)
        sequence.published = sequence.done = 0

    def publish(self, sequence: Sequence) -> None:
        """Make its full blocks findable for those of its tenant and adapters that begin as it does."""
        full = sequence.done // self._pages.block_size
        if full > sequence.published:
            self._extend_keys(sequence, full)
            for index in range(sequence.published, full):
                self._pages.publish(sequence.blocks[index], sequence.keys[index])
            sequence.published = full

    def _match(self, sequence: Sequence, shared: int) -> list[int]:
        """Cached blocks behind the shared prefix; at least one position is always left to compute."""
        full = (len(sequence.ids) - 1) // self._pages.block_size
        self._extend_keys(sequence, full)
        return self._pages.match(sequence.keys[shared:full])

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        extend_keys(sequence, count, self._pages.block_size, sequence.prompt_end if self._splits_prompts else None)


def owner_of(sequence: Sequence) -> Owner:
    """Its tenant, for blocks that it shares."""
    request = sequence.request
    return Owner(sequence.tenant, 1.0 if request is None else request.policy.weight)


def _put_behind(sequence: Sequence, prefix: SharedPrefix) -> None:
    sequence.virtual = prefix.length
    sequence.shift = prefix.shift
    sequence.ids = prefix.ids + sequence.ids
    sequence.prompt_end += prefix.length


def extend_keys(sequence: Sequence, count: int, block_size: int, prompt_end: int | None = None) -> None:
    """The hash chain of its first `count` blocks; with `prompt_end`, positions from there on are others than a prompt's."""
    while len(sequence.keys) < count:
        start = len(sequence.keys) * block_size
        stop = start + block_size
        mark = () if prompt_end is None or stop <= prompt_end else (max(0, prompt_end - start),)
        previous = sequence.keys[-1] if sequence.keys else sequence.seed
        sequence.keys.append(chain_key(previous, (*sequence.ids[start:stop], *mark)))
