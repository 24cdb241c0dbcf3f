"""Trainable tokens (PEFT): single rows of an embedding trained; a head that shares the embedding's weight follows.

Owns the "tokens" pool and which module an id belongs to. Never reads files.

    Checkpoint.sites[module] = {"rows": [n, H]}, one per id
    Checkpoint.config = {"field": name of the config's field for messages,
                         "indices": the ids of every module, or {ending of a module's name: its ids},
                         "targeted": modules that may bring rows; left out or None: the input embedding}
    Part.sites[module] = {"ids": [n] int64 ascending, "rows": [n, H]}: of an embedding, the rows that come out for these
    ids (its gain folded in); of the output head, the rows whose products with x are these ids' logits
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import AdapterError
from .base import BaseShape, Checkpoint, Limits, Method, ModuleShape, Op, Part, Rows, Tensors, check_shape, site_shape
from .full import check_size
from .grouped import PooledOp
from .maps import MakeLinear, Maps, indices

_Trained = dict[str, dict[str, Tensor]]


class TrainableTokens(Method):
    """Trained rows of embeddings and the output head; `linear` replaces the torch product where one is given."""

    name: ClassVar[str] = "trainable_tokens"
    also: ClassVar[str] = "`trainable_token_indices` of PEFT `LORA` and `ADALORA`"
    served: ClassVar[str] = "rows of the embedding, and of a head that shares its weight"

    def __init__(self, linear: MakeLinear | None = None) -> None:
        self.linear = linear

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        trained: _Trained = {}
        for module, stored in checkpoint.sites.items():
            trained[module] = _trained(module, _ids_of(module, checkpoint, base), stored, base)
            check_size(_name(module), sum(t.nbytes for kept in trained.values() for t in kept.values()), limits)
        _tie(trained, base)
        _check_asked(trained, checkpoint, base)
        sites = {module: _scaled(base.modules[module], kept) for module, kept in trained.items()}
        return Part(self.name, pool="tokens", sites=sites)

    def op(self, part: Part, module: str, base: BaseShape, device: torch.device, dtype: torch.dtype) -> Op:
        if base.modules[module].kind == "embedding":
            return TokenRowsOp(device, dtype)
        return TokenLogitsOp(Maps(self.linear, device, dtype), device)


def _name(module: str) -> str:
    return f"{module}.trainable_tokens_delta"


def _ids_of(module: str, checkpoint: Checkpoint, base: BaseShape) -> Sequence[int]:
    """The ids of a module's rows, as the config gives them. Raises: AdapterError naming the config's field."""
    field, given = str(checkpoint.config["field"]), checkpoint.config["indices"]
    if isinstance(given, Mapping):
        named = [ids for ending, ids in given.items() if module.endswith(ending)]
        if not named:
            raise AdapterError(field, f"does not name {module}, for which the upload holds rows")
        if any(ids != named[0] for ids in named):
            raise AdapterError(field, f"names {module} twice, with different ids")
        return _numbers(field, named[0])
    targeted = checkpoint.config.get("targeted")
    allowed = [base.embedding] if targeted is None else list(targeted) if isinstance(targeted, Sequence) else []
    if module not in allowed and not (_is_tied(base) and module == base.head and base.embedding in allowed):
        target = field if targeted is None else "target_modules"
        raise AdapterError(target, f"does not name {module}, for which the upload holds rows")
    return _numbers(field, given)


def _numbers(field: str, ids: object) -> Sequence[int]:
    if not isinstance(ids, Sequence) or not ids:
        raise AdapterError(field, "names no ids, but the upload holds rows")
    return ids


def _trained(module: str, ids: Sequence[int], tensors: Tensors, base: BaseShape) -> dict[str, Tensor]:
    """Ids in order, and their rows. Raises: AdapterError naming the tensor."""
    shape = site_shape(base, module, _name(module), ("linear", "embedding"), head=True)
    if shape.kind == "linear" and module != base.head:
        raise AdapterError(_name(module), f"{module!r} is neither an embedding nor the output head")
    if shape.bias is not None or shape.gain is None:
        raise AdapterError(_name(module), f"{module!r} is not a plain table of rows; single rows of it cannot be replaced")
    sizes = (shape.in_features, shape.out_features)
    vocab, width = sizes if shape.kind == "embedding" else sizes[::-1]
    check_shape(_name(module), tensors["rows"], (len(ids), width))
    if outside := [i for i in ids if not 0 <= i < vocab]:
        raise AdapterError(_name(module), f"trains id {outside[0]}, {module!r} has 0 to {vocab - 1}")
    if len(set(ids)) < len(ids):
        raise AdapterError(_name(module), "trains an id twice")
    order = sorted(range(len(ids)), key=lambda at: ids[at])
    return {"ids": torch.tensor(sorted(ids), dtype=torch.int64), "rows": tensors["rows"].float()[order]}


def _is_tied(base: BaseShape) -> bool:
    return base.tied_embeddings and base.head in base.modules


def _tie(trained: _Trained, base: BaseShape) -> None:
    """Add the output head where it shares the embedding's weight and brings no rows of its own."""
    if not _is_tied(base) or base.embedding not in trained or base.head in trained:
        return
    if base.modules[base.head].bias is not None:
        raise AdapterError(_name(base.embedding), f"{base.head!r} shares the weight and has a bias, which PEFT would drop")
    trained[base.head] = trained[base.embedding]


def _check_asked(trained: _Trained, checkpoint: Checkpoint, base: BaseShape) -> None:
    """Every ending in the config has its rows, and rows for one weight that PEFT loads as one are the same."""
    field, given = str(checkpoint.config["field"]), checkpoint.config["indices"]
    if not isinstance(given, Mapping):
        _check_one_weight(trained, base)
        if not trained:
            raise AdapterError(field, "names ids, but the upload holds no rows")
        return
    for ending, ids in given.items():
        found = [kept for module, kept in trained.items() if module.endswith(ending)]
        if not found:
            raise AdapterError(field, f"names {ending!r}, for which the upload holds no rows")
        if any(kept["ids"].tolist() != sorted(ids) for kept in found):
            raise AdapterError(field, f"names {ending!r} with ids that its shared weight does not have")


def _check_one_weight(trained: _Trained, base: BaseShape) -> None:
    one, other = trained.get(base.embedding), trained.get(base.head)
    if _is_tied(base) and one and other and not torch.equal(one["rows"], other["rows"]):
        raise AdapterError(_name(base.head), f"differs from that of {base.embedding}, with which it shares one weight")


def _scaled(shape: ModuleShape, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gain = shape.gain if shape.kind == "embedding" else None
    return dict(kept) if gain is None else {"ids": kept["ids"], "rows": kept["rows"] * gain}


class TokenRowsOp(PooledOp):
    """Semantics: y[t] = rows[s][j] for each row t of the pool whose id x[t] is ids[s][j], s its slot; x [T] ids."""

    order: ClassVar[int] = 2

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._device = device
        self._dtype = dtype
        self._slots: dict[int, tuple[Tensor, Tensor]] = {}  # ids [n] ascending, rows [n, H]

    @property
    def nbytes(self) -> int:
        return sum(ids.nbytes + rows.nbytes for ids, rows in self._slots.values())

    def grow(self, capacity: int) -> None:
        """A slot takes its memory when it is put."""

    def put(self, slot: int, tensors: Tensors) -> None:
        self._slots[slot] = tensors["ids"].to(self._device), tensors["rows"].to(self._device, self._dtype)
        self._held.add(slot)

    def clear(self, slot: int) -> None:
        self._held.discard(slot)
        self._slots.pop(slot, None)

    def after(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        for slot, index in indices(self.held(rows)):
            ids, trained = self._slots[slot]
            seen = x[index]
            at = torch.searchsorted(ids, seen).clamp_(max=len(ids) - 1)
            hit = ids[at] == seen
            y[index[hit]] = trained[at[hit]]
        return y


class TokenLogitsOp(PooledOp):
    """Semantics: y[t, ids[s]] = rows[s] x[t] for each row t of the pool, s its slot."""

    order: ClassVar[int] = 2

    def __init__(self, maps: Maps, device: torch.device) -> None:
        super().__init__()
        self.maps = maps
        self._device = device
        self._ids: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return self.maps.nbytes + sum(ids.nbytes for ids in self._ids.values())

    def grow(self, capacity: int) -> None:
        """A slot takes its memory when it is put."""

    def put(self, slot: int, tensors: Tensors) -> None:
        self._ids[slot] = tensors["ids"].to(self._device)
        self.maps.put(slot, tensors["rows"], None)
        self._held.add(slot)

    def clear(self, slot: int) -> None:
        self._held.discard(slot)
        self._ids.pop(slot, None)
        self.maps.clear(slot)

    def after(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        for slot, index in indices(self.held(rows)):
            y[index[:, None], self._ids[slot]] = self.maps.product(slot, x, index)
        return y
