"""What a base's adapters have to fit: names and sizes of its modules, from a server's /info or from a base in this process.

Owns that description; knows no weights and makes no adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .options import BenchError

if TYPE_CHECKING:  # brings torch, which a client of a server elsewhere does without
    from ..methods.base import BaseShape


@dataclass(frozen=True, slots=True)
class Linear:
    """A Linear or Conv1D inside the base's layers."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class Exit:
    """The module whose output is a sublayer's."""

    layer: int
    kind: str  # "attention" or "feed_forward"
    module: str


@dataclass(frozen=True)
class Dimensions:
    """What a base's adapters have to fit."""

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    linears: tuple[Linear, ...]
    exits: tuple[Exit, ...]  # empty where the architecture's layout is not known
    vocab_size: int
    embedding: str  # the input embedding's name; empty where none is as long as the vocabulary

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Dimensions:
        """From what GET /info says. Raises: BenchError when it lacks a field or has one of another form."""
        try:
            return _dimensions(info)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BenchError(f"`url`: GET /info does not describe the server's base model: {error!r}") from error

    @classmethod
    def of_shape(cls, shape: BaseShape) -> Dimensions:
        """Of a base in this process."""
        return cls(
            model_type=shape.model_type,
            hidden_size=shape.hidden_size,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            linears=_linears((name, m.kind, m.in_features, m.out_features) for name, m in shape.modules.items()),
            exits=tuple(Exit(sublayer.layer, sublayer.kind, sublayer.exit) for sublayer in shape.sublayers),
            vocab_size=shape.vocab_size,
            embedding=shape.embedding,
        )

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim


def _dimensions(info: Mapping[str, Any]) -> Dimensions:
    base = info["base"]
    modules = [(str(name), str(kind), int(i), int(o)) for name, (kind, i, o) in base["modules"].items()]
    vocabulary = int(base["vocab_size"])
    return Dimensions(
        model_type=str(info["model_type"]),
        hidden_size=int(base["hidden_size"]),
        num_layers=int(base["num_layers"]),
        num_heads=int(base["num_attention_heads"]),
        num_kv_heads=int(base["num_key_value_heads"]),
        head_dim=int(base["head_dim"]),
        linears=_linears(modules),
        exits=tuple(Exit(int(layer), str(kind), str(module)) for layer, kind, module in base["sublayers"]),
        vocab_size=vocabulary,
        embedding=next((name for name, kind, length, _ in modules if kind == "embedding" and length == vocabulary), ""),
    )


def _linears(modules: Iterable[tuple[str, str, int, int]]) -> tuple[Linear, ...]:
    """The output head, a module of no layer, is left out: no adapter made here is on it."""
    return tuple(Linear(name, i, o) for name, kind, i, o in modules if kind in ("linear", "conv1d") and "." in name)
