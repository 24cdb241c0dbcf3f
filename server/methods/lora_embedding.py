"""LoRA on an embedding: the ids pick columns of A, which then go through B like any low-rank activations.

Owns the table of A. The second product is another op's, so that it takes the same path as every LoRA.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Op, Rows, Tensors
from .grouped import Pool, PooledOp


class EmbeddingLoraOp(PooledOp):
    """Semantics: y[t] += B[s] @ A[s][:, x[t]] for each row t of the pool, s its slot; x [T] ids.

    `product` is a LoRA op over low-rank activations [T, r], its own A being the identity: products with 1 and 0 are exact.
    """

    order: ClassVar[int] = 10

    def __init__(self, vocabulary: int, rank: int, product: Op, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.rank = rank
        self.table = Pool((vocabulary, rank), 0.0, device, dtype)  # A^T of each slot
        self.product = product

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + self.product.nbytes

    def grow(self, capacity: int) -> None:
        self.table.grow(capacity)
        self.product.grow(capacity)

    def put(self, slot: int, tensors: Tensors) -> None:
        self.clear(slot)
        a = tensors["A"]
        self.table.tensor[slot, :, : len(a)] = a.T
        self.product.put(slot, {**tensors, "A": torch.eye(len(a), self.rank)})
        self._held.add(slot)

    def clear(self, slot: int) -> None:
        self._held.discard(slot)
        self.table.clear(slot)
        self.product.clear(slot)

    def after(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        held = self.held(rows)
        if not held.groups:
            return y
        low = y.new_zeros(len(x), self.rank)
        low[held.index] = self.table.tensor[held.slot, x[held.index]].to(y.dtype)
        return self.product.after(low, y, rows)
