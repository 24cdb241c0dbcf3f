"""Readout: what is read from the final hidden states (after the final norm): the scores of heads, and embeddings.

Owns the heads on the device and the running means of texts that arrive in chunks. Hooks the inner model, so that rows
which are only read never reach the product with the vocabulary. Chooses no rows.

    inner model -> hidden [T, H] -+-> kept rows -> lm_head -> logits        (the runner)
                                  +-> last or mean of a text, or each of its tokens -> head or as it is
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from adapters_store.digest import Digest

from ..engine.plan import Row, Sample
from ..engine.plan import Sequence as Seq
from ..errors import GenerationError
from ..methods.base import Head
from ..methods.heads import head_scores


class Readout:
    """Usage: `with readout.watching(rows): run the model`, then `readout.read(rows, begins)`."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """`model` is a Hugging Face causal language model; its `base_model` ends with the final norm."""
        self._model = model
        self._device = device
        self._heads: dict[Digest, Head] = {}
        self._hidden: Tensor | None = None  # [T, H] of the step that was run last
        self._sums: WeakKeyDictionary[Seq, dict[int, Tensor]] = WeakKeyDictionary()  # [H] fp64 over positions before n

    @property
    def nbytes(self) -> int:
        """Device bytes of the heads."""
        return sum(head.nbytes for head in self._heads.values())

    def put(self, digest: Digest, head: Head) -> None:
        tensors = {name: tensor.to(self._device) for name, tensor in head.tensors.items()}
        self._heads[digest] = replace(head, tensors=tensors)

    def clear(self, digest: Digest) -> None:
        self._heads.pop(digest, None)

    @contextmanager
    def watching(self, rows: Sequence[Row]) -> Iterator[None]:
        """Keep the hidden states of the forward pass inside, if some row wants them."""
        if not any(row.reads_hidden for row in rows):
            yield
            return
        inner: nn.Module = self._model.base_model  # type: ignore[assignment]
        handle = inner.register_forward_hook(self._keep)
        try:
            yield
        finally:
            handle.remove()

    def read(self, rows: Sequence[Row], begins: Sequence[int]) -> dict[Seq, Sample]:
        """A sample for each row that adds scores; `begins[i]` is row i's first token in the step.

        Raises: GenerationError when the architecture's hidden states could not be seen.
        """
        wanted = [(row, begin) for row, begin in zip(rows, begins, strict=False) if row.reads_hidden]
        if not wanted:
            return {}
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            raise GenerationError("the base model does not show its hidden states")
        found = ((row, self._row(row, hidden[begin : begin + row.count])) for row, begin in wanted)
        return {row.sequence: _sample(scores) for row, scores in found if scores is not None}

    def _keep(self, module: nn.Module, args: object, output: Mapping[str, Tensor]) -> None:
        self._hidden = output["last_hidden_state"][0]

    def _row(self, row: Row, hidden: Tensor) -> Tensor | None:
        """hidden [n, H] of one row's tokens -> what they add, [rows, k]; None while the text goes on."""
        head = self._head(row.sequence)
        if head is not None and head.task == "TOKEN_CLS":
            return torch.stack([head_scores(head, _own(state)) for state in hidden])
        pooled = self._pooled(row, hidden, head)
        if pooled is None:
            return None
        return (pooled if head is None else head_scores(head, pooled))[None]

    def _head(self, sequence: Seq) -> Head | None:
        """The head of a sequence that is to be classified; None for one that is to be embedded."""
        if sequence.request is None or sequence.request.task == "embed":
            return None
        head = next((self._heads[digest] for digest in sequence.adapters if digest in self._heads), None)
        if head is None:
            raise GenerationError("the adapter has no head to classify with")
        return head

    def _pooled(self, row: Row, hidden: Tensor, head: Head | None) -> Tensor | None:
        """[H] fp32 once the row has reached the end of its text. The mean is over the text's own positions."""
        request = row.sequence.request
        pooling = head.pooling if head is not None else request.pooling if request is not None else "last"
        if pooling == "last":
            return _own(hidden[-1]) if row.samples else None
        total = self._add(row, hidden)
        return (total / (row.sequence.prompt_end - row.sequence.virtual)).float() if row.samples else None

    def _add(self, row: Row, hidden: Tensor) -> Tensor:
        """The sum [H] up to here. One position after the other, so that it does not matter where chunks were cut.

        What it was before stays known: a step that fails is run again in halves.
        """
        first = row.start == row.sequence.virtual
        before = torch.zeros_like(hidden[0], dtype=torch.float64) if first else self._sums[row.sequence][row.start]
        total = torch.cat((before[None], hidden.double())).cumsum(0)[-1].clone()
        self._sums[row.sequence] = {row.start: before, row.start + row.count: total}
        return total


def _own(state: Tensor) -> Tensor:
    """One position [H] in fp32 and in memory of its own, so that its place in the step cannot change how it is summed."""
    return state.to(torch.float32, copy=True)


def _sample(scores: Tensor) -> Sample:
    rows = [tuple(row) for row in scores.tolist()] if bool(torch.isfinite(scores).all()) else None
    return Sample(None, scores=None if rows is None else tuple(rows))
