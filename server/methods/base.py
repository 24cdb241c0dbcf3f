"""The one abstraction every PEFT family is written against: `Method` reads, `Part` is what it read, `Op` applies it.

Owns the data shapes shared by all families. Knows no family by name, no model, no scheduler.

    upload --checkpoints--> Checkpoint --Method.read--> Part --Sites.put--> Op.put(slot) ... Op.after(x, y, rows)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor

from adapters_store.digest import Digest
from adapters_store.records import JSON

from ..errors import AdapterError

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class ModuleShape:
    """One module of the base, as an adapter sees it. `conv1d` is GPT-2's Linear with a transposed weight."""

    kind: Literal["linear", "conv1d", "embedding", "norm"]
    in_features: int
    out_features: int
    bias: Tensor | None = None  # [out] fp32, None where the base has none
    offset: float | None = 0.0  # a norm scales by offset + weight (gemma stores the distance from 1); None: it does not
    gain: float | None = 1.0  # an embedding gives gain * weight[id] (gemma 3 scales inside); None: it does not


@dataclass(frozen=True)
class Sublayer:
    """Where one attention or feed-forward sublayer of one layer starts and ends (module names in the HF model).

        residual --> entry (norm) --> projections ... exit (o_proj / down_proj) --> + residual

    `residual` names a module whose *input* is the sublayer's residual, `inlet` one whose input is the
    sublayer's own input (after the norm), `exit` the module whose output is the sublayer's output.
    """

    layer: int
    kind: Literal["attention", "feed_forward"]
    residual: str
    inlet: str
    exit: str


def no_weight(module: str) -> Tensor:
    """`BaseShape.weight` where only the base's sizes are known. Raises: AdapterError naming the module."""
    raise AdapterError(module, "is held against the base model's weight, and here only its sizes are known")


def no_tokens(text: str, first: bool) -> Sequence[int]:
    """`BaseShape.tokens` where there is no tokenizer. Raises: AdapterError naming the template."""
    raise AdapterError("template", "is text, and here the base model has no tokenizer")


@dataclass(frozen=True)
class BaseShape:
    """What an adapter must fit: names and sizes of the base, its small tensors (biases), and a way to read its weights.

    `weight(module)` is for load time only: an fp32 copy on the CPU, unpacked on demand, of a Linear's or Conv1D's weight
    [out, in], an embedding's [V, H] or a norm's [H] as it is stored. `tokens(text, first)` are the ids of one piece of a
    prompt, those that open a text (BOS) included where it is the first.
    """

    digest: Digest  # of the base's weights; part of every KV cache key
    model_type: str  # Hugging Face's, e.g. "llama"
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    modules: Mapping[str, ModuleShape]  # every Linear, Conv1D, Embedding and norm, by its dotted name
    sublayers: tuple[Sublayer, ...] = ()  # empty where the architecture's layout is not known
    tied_embeddings: bool = False
    window: int = 0  # positions that a sliding-window layer sees; 0: every layer sees all
    head: str = "lm_head"  # the output head's name; it sees kept tokens only
    embedding: str = ""  # the input embedding's name
    weight: Callable[[str], Tensor] = field(default=no_weight, repr=False, compare=False)
    tokens: Callable[[str, bool], Sequence[int]] = field(default=no_tokens, repr=False, compare=False)


@dataclass(frozen=True)
class Limits:
    """Upload limits that a method enforces while reading."""

    max_rank: int = 256
    max_virtual_tokens: int = 512
    max_full_bytes: int = 256 << 20  # whole matrices of one upload, as stored


@dataclass(frozen=True)
class Checkpoint:
    """An upload in neutral names, whichever library wrote it (`server/checkpoints/` makes these).

    `config` holds the method's own fields, each already checked for type; `sites` maps a module name of the base to the
    tensors stored for it ({"A": [r, in], "B": [out, r]} for LoRA; every method's module documents its own); `loose`
    holds tensors that belong to no module (soft prompts). All tensors are finite, fp32/fp16/bf16, on the CPU.
    """

    method: str
    config: Mapping[str, object]
    sites: Mapping[str, Tensors] = field(default_factory=dict)
    loose: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Prefix:
    """Positions in front of the text: ready K/V per layer, or embeddings or tokens still to be run once through the base.

    Exactly one of (`keys` and `values`), `embeddings` and `ids` is set. With `factors` it is a prefix per task (multitask
    prompt tuning), `embeddings` being what the tasks share: nothing is served with it before `for_task` picked one.
    """

    length: int  # N, positions
    keys: Tensor | None = None  # [layers, N, kv_heads, head_dim], used as stored: no RoPE is applied
    values: Tensor | None = None  # [layers, N, kv_heads, head_dim]
    embeddings: Tensor | None = None  # [N, hidden]
    positions: int | None = None  # how many positions the text is moved by; None: by `length` (AdapterHub's prefix: 0)
    ids: Tensor | None = None  # [N] int64, plain tokens: a discrete prompt
    factors: tuple[Tensor, Tensor] | None = None  # columns [tasks, N, k] and rows [tasks, k, hidden]

    @property
    def tasks(self) -> int:
        """How many tasks there are to choose from; 0: it is a prefix as it stands."""
        return 0 if self.factors is None else len(self.factors[0])

    def for_task(self, task: int) -> Prefix:
        """One task's own soft prompt: the shared embeddings times (element by element) the task's columns @ rows.

        Raises: AdapterError naming the field `task_id` for a prefix without tasks and for a task it does not have.
        """
        if self.factors is None or self.embeddings is None:
            raise AdapterError("task_id", "the adapter has no tasks")
        if not 0 <= task < self.tasks:
            raise AdapterError("task_id", f"{task} is none of the adapter's {self.tasks} tasks, 0 to {self.tasks - 1}")
        columns, rows = (factor[task].float() for factor in self.factors)
        return replace(self, embeddings=self.embeddings.float() * (columns @ rows), factors=None)

    @property
    def shift(self) -> int:
        """How far a text token's position id lies behind its place in the KV cache."""
        return 0 if self.positions is None else self.length - self.positions

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it holds."""
        held = (self.keys, self.values, self.embeddings, self.ids, *(self.factors or ()))
        return tuple(tensor for tensor in held if tensor is not None)


@dataclass(frozen=True)
class Head:
    """A classifier over the final hidden states: score(activation(dense(h))), the dense layer being optional."""

    task: Literal["SEQ_CLS", "TOKEN_CLS"]  # one row of logits per text, or one per token of it
    pooling: Literal["last", "mean"]  # of SEQ_CLS, over the text's own tokens
    labels: tuple[str, ...]  # k names, by class index
    tensors: Tensors  # fp32: score.weight [k, H'], and maybe score.bias [k], dense.weight [H', H], dense.bias [H']
    activation: str | None = None  # a name in ACTIVATIONS

    @property
    def every_position(self) -> bool:
        """Whether it reads all of a text, so that none of it may come from the prefix cache."""
        return self.task == "TOKEN_CLS" or self.pooling == "mean"

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Part:
    """What one adapter contributes through one family. CPU tensors, scale already folded in.

    `pool` names the device pool that holds it ("lora:16", "ia3", "bottleneck:64:relu"): parts of one pool have equal
    shapes at a site. A part without sites (a prefix) needs no pool and has `pool=None`.
    """

    method: str
    pool: str | None = None
    sites: Mapping[str, Tensors] = field(default_factory=dict)
    prefix: Prefix | None = None
    head: Head | None = None
    told: Mapping[str, JSON] = field(default_factory=dict)  # kept in the adapter's record, for whoever words requests
    scale: Mapping[str, float] = field(default_factory=dict)  # LoRA's, by site: the factor that was folded into it

    @property
    def nbytes(self) -> int:
        own = sum(t.nbytes for tensors in self.sites.values() for t in tensors.values())
        return own + (self.prefix.nbytes if self.prefix else 0) + (self.head.nbytes if self.head else 0)


@dataclass(frozen=True)
class Adapter:
    """A bundle of parts under one content digest: all that the engine needs to serve it."""

    digest: Digest
    parts: tuple[Part, ...]
    sources: frozenset[Digest] = frozenset()  # the stored adapters it was computed from; empty where it is stored itself

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def pools(self) -> tuple[str, ...]:
        return tuple(part.pool for part in self.parts if part.pool is not None)

    @property
    def prefix(self) -> Prefix | None:
        return next((part.prefix for part in self.parts if part.prefix is not None), None)

    @property
    def head(self) -> Head | None:
        return next((part.head for part in self.parts if part.head is not None), None)


#: A token that no step has: nothing in it is a prompt's.
NO_PROMPT: Final = 1 << 62


@dataclass
class Rows:
    """Which tokens of a step go through one pool, and through which slot. Written by the runner, read by ops.

        tokens of the step   0 1 2 3 4 5 6         index = [2 3 4 6]    rows of this pool, ordered by slot
        slot in this pool    - - 4 4 4 - 7         slot  = [4 4 4 7]    groups = ((4, 0, 3), (7, 3, 4))

    `span` is set when `index` is one run of consecutive tokens, so that a slice does for a gather. `scratch` is a
    cache an op may fill; it lives as long as the batch keeps this composition.
    """

    index: Tensor  # [n] int64, token positions in the step
    slot: Tensor  # [n] int64, sorted
    groups: tuple[tuple[int, int, int], ...]  # (slot, start, stop) runs over index
    span: slice | None
    taps: Mapping[str, Tensor]  # module name -> that module's input in this step, [T, in]; see Op.taps
    scratch: dict[object, object] = field(default_factory=dict)
    fixed: bool = False  # `slot` is read on the device alone, may change unseen and holds 0 for rows outside the pool
    prompt: int = NO_PROMPT  # the step's first token that is a prompt's, as all behind it are

    def take(self, x: Tensor) -> Tensor:
        """The pool's rows of `x` [T, d]: [n, d], a view where the rows are consecutive."""
        return x[self.span] if self.span is not None else x[self.index]

    def store(self, y: Tensor, rows: Tensor) -> Tensor:
        """Write `rows` [n, d] over the pool's rows of `y` [T, d] in place."""
        if self.span is not None:
            y[self.span] = rows
        else:
            y[self.index] = rows
        return y


#: run(x, y): acts on y [T, out] in place, given x [T, in].
Run = Callable[[Tensor, Tensor], None]


class Op(ABC):
    """One family's device pool at one module: `capacity` slots, of which slot 0 is the identity and never given out.

    `before`/`after` may change only the rows named by `rows`; `after` may work in place on `y` (the module's fresh
    output), `before` must not touch `x` (other modules read it too).
    """

    #: Order at one module, ascending; ties are not allowed. LoRA 10, bias 20, IA3 30, bottleneck 40.
    order: ClassVar[int]

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Make room for slots 1..capacity-1, keeping what is there."""

    @abstractmethod
    def put(self, slot: int, tensors: Tensors) -> None:
        """Write one adapter's tensors into `slot`."""

    @abstractmethod
    def clear(self, slot: int) -> None:
        """Make `slot` the identity again."""

    @property
    def nbytes(self) -> int:
        """Device bytes of the pool."""
        return 0

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of other modules whose input this op reads from `rows.taps`; they run earlier in the same layer."""
        return ()

    @property
    def acts_before(self) -> bool:
        """Whether `before` does anything; a module gets a pre-hook only then."""
        return False

    @property
    def graphable(self) -> bool:
        """Whether `after` takes `Rows.fixed`, so that a CUDA graph of it holds for whatever slots the rows have."""
        return False

    def runs(self, rows: Rows) -> Sequence[Run] | None:
        """All that `after` does to these rows, as calls prepared for as long as the composition lasts.

        None where `after` itself has to be called.
        """
        return None

    def runs_before(self, rows: Rows) -> Sequence[Run] | None:
        """All that `before` does, as calls run(x, x) on a copy that is this module's own; None as in `runs`."""
        return None if self.acts_before else ()

    def before(self, x: Tensor, rows: Rows) -> Tensor:
        """x [T, in] -> [T, in]."""
        return x

    def after(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        """x [T, in], y [T, out] -> [T, out]."""
        return y


class Method(ABC):
    """One PEFT family. Stateless; one instance per family in `METHODS`."""

    name: ClassVar[str]
    #: For the table of methods in the README: what else gives a part of this family, and how it is served.
    also: ClassVar[str] = ""
    served: ClassVar[str] = ""

    @abstractmethod
    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        """Check a checkpoint against the base and fold it into a part. Pure, host side.

        Raises: AdapterError naming the field or tensor at fault.
        """

    def op(self, part: Part, module: str, base: BaseShape, device: torch.device, dtype: torch.dtype) -> Op:
        """A new, empty pool of this family at `module`, shaped for `part` and for every part of the same pool name."""
        raise NotImplementedError(f"{self.name} has no sites")


def module_shape(base: BaseShape, module: str, tensor: str) -> ModuleShape:
    """The base's module of that name. Raises: AdapterError naming the tensor when the base has none."""
    shape = base.modules.get(module)
    if shape is None:
        raise AdapterError(tensor, f"the base model ({base.model_type}) has no module {module!r}")
    return shape


def check_shape(tensor: str, got: Tensor, want: tuple[int, ...]) -> None:
    """Raises: AdapterError naming the tensor, the shape the base needs and the shape it has."""
    if tuple(got.shape) != want:
        raise AdapterError(tensor, f"has shape {list(got.shape)}, the base model needs {list(want)}")


def finite(value: Tensor) -> bool:
    """Whether all of it is: its extremes say so, in one pass and without memory that grows with it; NaN is its own extreme."""
    return not value.numel() or all(math.isfinite(extreme.item()) for extreme in value.aminmax())


def site_shape(base: BaseShape, module: str, tensor: str, kinds: tuple[str, ...], *, head: bool = False) -> ModuleShape:
    """The module an op may be attached to: one of `kinds`, with the output head among them where `head` says so.

    Raises: AdapterError naming the tensor for other kinds, an output head not asked for, and per-head norms.
    """
    shape = module_shape(base, module, tensor)
    if shape.kind not in kinds:
        raise AdapterError(tensor, f"{module!r} is a module of kind {shape.kind}; supported: {', '.join(kinds)}")
    if module == base.head and not head:
        raise AdapterError(tensor, f"adapting the output head {module!r} is not supported")
    if shape.kind == "norm" and shape.out_features != base.hidden_size:
        raise AdapterError(tensor, f"{module!r} normalises heads, not hidden states; adapting it is not supported")
    return shape
