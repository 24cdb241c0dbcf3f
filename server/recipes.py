"""Recipes: adapters that are computed from stored ones, as plain data with a digest of their own. No torch, no arithmetic.

A recipe's digest stands wherever a stored adapter's does: in slots, KV cache keys, the prefix cache and the host cache.

    Join((Merge((a, b), (0.7, 0.3)), user))     sources are content digests, or recipes in turn
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from adapters_store.digest import Digest

Strategy = Literal["linear", "ties", "dare_linear", "dare_ties"]
SignMethod = Literal["total", "frequency"]


@dataclass(frozen=True, slots=True)
class Merge:
    """Several LoRAs made one: A and B each combined with `weights`, as PEFT's `add_weighted_adapter` does.

    `density` is the share of values that ties and dare_* keep; linear reads neither it nor `majority_sign_method`.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    strategy: Strategy = "linear"
    density: float = 1.0
    majority_sign_method: SignMethod = "total"

    @property
    def digest(self) -> Digest:
        """Fields that the strategy does not read are left out, so that equal merges are one."""
        fields: dict[str, object] = {"weights": self.weights, "strategy": self.strategy}
        if self.strategy != "linear":
            fields["density"] = self.density
        if self.strategy.endswith("ties"):
            fields["majority_sign_method"] = self.majority_sign_method
        return _digest("merge", self.sources, fields)


@dataclass(frozen=True, slots=True)
class Join:
    """Adapters of one request that apply together, computed as one because a slot holds one part of each pool.

    The order counts where two of them have a prefix: the first one's positions come first.
    """

    sources: tuple[Source, ...]

    @property
    def digest(self) -> Digest:
        return _digest("join", self.sources, {})


@dataclass(frozen=True, slots=True)
class Task:
    """One task of a multitask prompt."""

    source: Source
    task_id: int

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source,)

    @property
    def digest(self) -> Digest:
        return _digest("task", self.sources, {"task_id": self.task_id})


Recipe = Merge | Join | Task
Source = Digest | Recipe


def digest_of(source: Source) -> Digest:
    return source if isinstance(source, Digest) else source.digest


def stored_sources(source: Source) -> frozenset[Digest]:
    """The stored adapters that a source is made of, at any depth."""
    if isinstance(source, Digest):
        return frozenset((source,))
    return frozenset[Digest]().union(*(stored_sources(each) for each in source.sources))


def _digest(kind: str, sources: tuple[Source, ...], fields: dict[str, object]) -> Digest:
    """sha256 of the canonical form: JSON with sorted keys, each nested recipe as its digest."""
    form = {"kind": kind, "sources": [digest_of(source) for source in sources], **fields}
    return Digest.of(b"adapterd recipe 1\n" + json.dumps(form, sort_keys=True, separators=(",", ":")).encode())
