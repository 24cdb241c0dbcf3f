"""Pages: who holds which block of the KV cache, and which full blocks may be reused as a prefix.

Block ids only: the tensors live in the runner. Never imports torch, knows no requests and no adapters.

    positions  0..15     16..31    32..47          block_size 16
    blocks     [ 7 ]     [ 3 ]     [ 9 ]           a sequence's block table
    keys       k0=h(seed,ids[0:16])  k1=h(k0,ids[16:32])   the third block is not full: no key, never shared

A block is in exactly one state: free, held (by one or more holders), or idle (unheld, kept because its key may match).
Blocks have an owner; when an idle one is to be reused, it is one of whoever has most blocks relative to its weight.
Block 0 is the null block: always zero, never given out, safe to read for padding.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple


def chain_seed(*parts: str) -> bytes:
    """The root of a block hash chain: tenant, adapter digests and base digest, never a name or client input."""
    digest = blake2b(digest_size=16)
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(4, "little") + raw)
    return digest.digest()


def chain_key(previous: bytes, ids: Sequence[int]) -> bytes:
    """The key of a full block: its own token ids and everything before it."""
    return blake2b(array("q", ids).tobytes(), digest_size=16, key=previous).digest()


class Owner(NamedTuple):
    """Whose a block is, and the weight of its claim to blocks."""

    name: str = ""
    weight: float = 1.0


NOBODY = Owner()


@dataclass
class _Kept:
    """One owner's blocks."""

    name: str
    weight: float
    used: int = 0  # held and idle
    idle: OrderedDict[int, None] = field(default_factory=OrderedDict)  # least recently used first


class Pages:
    """The block allocator. Invariant (`check`): free + idle + held = all blocks but the null block."""

    def __init__(self, blocks: int, block_size: int) -> None:
        """`blocks` counts the null block; `block_size` is in positions."""
        if blocks < 2:
            raise ValueError(f"a KV cache needs at least 2 blocks, got {blocks}")
        self.block_size = block_size
        self.total = blocks - 1
        self._free = list(range(blocks - 1, 0, -1))
        self._holders = [0] * blocks
        self._kept: dict[str, _Kept] = {}  # by owner; those that have any
        self._idle = 0
        self._key_of: dict[int, bytes] = {}
        self._keeper: dict[int, _Kept] = {}  # of blocks that are not free
        self._by_key: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give out now."""
        return len(self._free) + self._idle

    @property
    def free(self) -> int:
        """Blocks that hold nothing which could be used again."""
        return len(self._free)

    @property
    def shares(self) -> Mapping[str, float]:
        """Blocks of each owner that has any, held and idle, relative to its weight."""
        return {name: kept.used / kept.weight for name, kept in self._kept.items()}

    def idle(self, owner: str) -> int:
        """Its blocks that could be reused."""
        kept = self._kept.get(owner)
        return 0 if kept is None else len(kept.idle)

    @property
    def used(self) -> int:
        """Blocks held by sequences and prefixes; idle cached blocks do not count."""
        return self.total - self.available

    def blocks_for(self, positions: int) -> int:
        return -(-positions // self.block_size)

    def allocate(self, count: int, owner: Owner = NOBODY) -> list[int] | None:
        """`count` blocks held once each, or None (and no change) when there are not that many."""
        if count > self.available:
            return None
        if not count:
            return []
        kept = self._kept.setdefault(owner.name, _Kept(owner.name, owner.weight))
        kept.weight = owner.weight
        kept.used += count
        if count > len(self._free):
            self._reclaim(count - len(self._free))
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
            self._keeper[block] = kept
        return blocks

    def hold(self, block: int) -> None:
        """One more holder of a block that is held or idle."""
        if not self._holders[block]:
            del self._keeper[block].idle[block]
            self._idle -= 1
        self._holders[block] += 1

    def is_shared(self, block: int) -> bool:
        """Whether it has several holders."""
        return self._holders[block] > 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder fewer. Keyed blocks become idle, the last of the sequence first in line for reuse."""
        for block in reversed(list(blocks)):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._key_of:
                self._keeper[block].idle[block] = None
                self._idle += 1
            else:
                self._set_free(block)

    def publish(self, block: int, key: bytes) -> None:
        """Make a full, held block findable. An equal block that was published earlier stays the one found."""
        if key not in self._by_key and block not in self._key_of:
            self._by_key[key] = block
            self._key_of[block] = key

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Hold and return the longest run of published blocks from the first key on."""
        found: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            self.hold(block)
            found.append(block)
        return found

    def check(self) -> None:
        """Raises: RuntimeError when a block is lost or counted twice."""
        held = {block for block, count in enumerate(self._holders) if count}
        free = set(self._free)
        idle = {block for kept in self._kept.values() for block in kept.idle}
        if len(free) != len(self._free) or held & free or held & idle or free & idle:
            raise RuntimeError("a KV block is in two states")
        if len(held) + len(free) + len(idle) != self.total:
            raise RuntimeError("a KV block is lost")
        if len(idle) != self._idle or Counter(kept.name for kept in self._keeper.values()) != self._counts():
            raise RuntimeError("a KV block is counted for the wrong owner")

    def _counts(self) -> dict[str, int]:
        return {name: kept.used for name, kept in self._kept.items()}

    def _set_free(self, block: int) -> None:
        kept = self._keeper.pop(block)
        kept.used -= 1
        if not kept.used:
            del self._kept[kept.name]
        self._free.append(block)

    def _reclaim(self, count: int) -> None:
        """Make idle blocks free: each one the least recently used of the owner that has most. `count` of them exist."""
        most = [(-kept.used / kept.weight, name) for name, kept in self._kept.items() if kept.idle]
        heapq.heapify(most)
        for _ in range(count):
            kept = self._kept[most[0][1]]
            block, _none = kept.idle.popitem(last=False)
            self._idle -= 1
            del self._by_key[self._key_of.pop(block)]
            self._set_free(block)
            if kept.idle:
                heapq.heapreplace(most, (-kept.used / kept.weight, kept.name))
            else:
                heapq.heappop(most)
