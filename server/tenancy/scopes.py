"""Scopes: what a key may be used for. Independent of one another; a key has those it was made with and no other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

#: infer     generate, classify, embed, tokenize; look at adapters and users
#: adapters  upload, delete, load and unload adapters, bind users
#: admin     every tenant's policy and keys, shared adapters, the metrics and the engine's inside
Scope = Literal["infer", "adapters", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


def known_scopes(names: Iterable[str]) -> frozenset[Scope]:
    """Those of `names` that this release knows: what it does not know it does not grant."""
    return frozenset(scope for scope in SCOPES if scope in set(names))


def unknown_scope(names: Iterable[str]) -> str | None:
    """The first of `names` that is no scope."""
    return next((name for name in names if name not in SCOPES), None)
