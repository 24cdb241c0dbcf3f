"""Decoder layers written down as native instructions, so that a step runs them in one call with nothing in between.

Owns the order of a layer's kernels, the space between them and when a program has to be written again. A layer with a hook,
or with an op that has to be called from Python in this step, gets no program and runs as modules. Knows no model: its parts
are handed in by `fused_layer.py`, which has tried them.

    norm -> q k v (+ adapters) -> rotary, cache, attention -> o (+) -> h += -> norm -> gate up (+) -> act -> down (+) -> h +=
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from ..methods.base import Rows
from ..methods.grouped import AddRows, MulRows
from .attention import LayerAttention, attention_of
from .fused import GatedMLP, RMSNorm
from .linear import PackedModule
from .native import NativeKernels, opcodes
from .sites import Extension
from .step import Step

Words = tuple[int, ...]
Turn = tuple[Tensor, Tensor] | None  # cos and sin [1, T, d]

_HIDDEN = 0  # the address that stands for the hidden states, which run through all layers


@runtime_checkable
class Instructed(Protocol):
    """A prepared call that can be an instruction of a layer."""

    def words(self, x: int, y: int) -> Words:
        """With the addresses of its input and its output."""


@dataclass(frozen=True)
class AttentionShape:
    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int
    softcap: float


@dataclass(frozen=True)
class LayerParts:
    """The modules of one decoder layer, all of kinds that have an instruction."""

    norm: nn.Module
    attention: nn.Module
    q: PackedModule
    k: PackedModule
    v: PackedModule
    o: PackedModule
    second_norm: nn.Module
    mlp: nn.Module
    shape: AttentionShape

    @property
    def gated(self) -> GatedMLP:
        return cast("GatedMLP", self.mlp.forward)

    @property
    def feed_forward(self) -> tuple[PackedModule, PackedModule, PackedModule]:
        """The gate, up and down projections."""
        return cast("tuple[PackedModule, PackedModule, PackedModule]", (self.gated.gate, self.gated.up, self.gated.down))

    @property
    def linears(self) -> tuple[PackedModule, ...]:
        return (self.q, self.k, self.v, self.o, *self.feed_forward)

    def modules(self) -> Iterator[nn.Module]:
        yield from (self.norm, self.attention, self.q, self.k, self.v, self.o, self.second_norm, self.mlp)
        yield from self.feed_forward


def layer_parts(layer: nn.Module, shape: AttentionShape) -> LayerParts | None:
    """The parts of a layer of the llama shape, None where one of them has no instruction."""
    attention, mlp = (cast("nn.Module", getattr(layer, name)) for name in ("self_attn", "mlp"))
    norms = [cast("nn.Module", getattr(layer, name)) for name in ("input_layernorm", "post_attention_layernorm")]
    gated = mlp.forward
    if not isinstance(gated, GatedMLP) or not all(isinstance(norm.forward, RMSNorm) for norm in norms):
        return None
    linears = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    if not all(isinstance(module, PackedModule) for module in (*linears, gated.gate, gated.up, gated.down)):
        return None
    if gated.kernel not in (gated.native.silu_mul, gated.native.gelu_tanh_mul):
        return None
    q, k, v, o = linears
    return LayerParts(norms[0], attention, q, k, v, o, norms[1], mlp, shape)


class Space:
    """What lies between a layer's kernels, shared by all layers. Invariant: an address holds until `grown` changes."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self.grown = 0

    def of(self, name: str, floats: int) -> int:
        """The address of at least `floats` floats."""
        held = self._held.get(name)
        if held is None or held.numel() < floats:
            held = self._held[name] = torch.empty(max(floats, 1))
            self.grown += 1
        return held.data_ptr()


class Frame:
    """What all layers of one step have in common, as words; written again when the step's tensors are new."""

    def __init__(self) -> None:
        self.words = torch.zeros(opcodes.FRAME_WORDS, dtype=torch.int64)
        self._held: tuple[object, ...] = ()
        self._prompt = -1

    def of(self, step: Step, hidden: Tensor, turn: Turn) -> Tensor:
        held = (hidden, turn, step.write, step.tables, step.starts, step.contexts)
        if self._prompt != step.prompt:
            self._prompt, self._held = step.prompt, ()
        if len(held) != len(self._held) or any(a is not b for a, b in zip(held, self._held, strict=True)):
            self._held = held
            cos, sin, turned = (turn[0].data_ptr(), turn[1].data_ptr(), turn[0].shape[-1]) if turn else (0, 0, 0)
            rows, width = step.tables.shape
            tensors = (step.starts.data_ptr(), step.contexts.data_ptr())
            words = (hidden.data_ptr(), cos, sin, turned, step.write.data_ptr(), step.tables.data_ptr(), width, *tensors, rows)
            self.words.copy_(torch.tensor((*words, hidden.shape[1], step.prompt)))
        return self.words


@dataclass(frozen=True)
class _Written:
    """A program, None where there can be none, and what it was written for."""

    rows: dict[str, Rows]
    tokens: int
    grown: int
    layer: LayerAttention
    program: Tensor | None

    def holds(self, rows: dict[str, Rows], tokens: int, grown: int, layer: LayerAttention) -> bool:
        return self.rows is rows and self.layer is layer and (self.tokens, self.grown) == (tokens, grown)


@dataclass(frozen=True)
class _Chain:
    """Programs of layers that run in one call: their instructions one after another."""

    words: Tensor
    pieces: tuple[Tensor, ...]  # what `words` was made of
    following: tuple[LayerProgram, ...]  # those behind the first

    def holds(self, pieces: Sequence[Tensor]) -> bool:
        return len(self.pieces) == len(pieces) and all(a is b for a, b in zip(self.pieces, pieces, strict=True))


class LayerProgram:
    """One layer's instructions, for each composition that the batch remembers; runs the layers that follow along with it.

    Invariant: a program is used only with what it was written for.
    """

    def __init__(self, module: nn.Module, parts: LayerParts, native: NativeKernels, space: Space, frame: Frame) -> None:
        self._module, self._parts, self._native, self._space, self._frame = module, parts, native, space, frame
        self.following: LayerProgram | None = None  # what the model runs next, on what this leaves and with nothing between
        self._done: Tensor | None = None  # hidden states that a layer before ran through this one

    def tile(self) -> None:
        """Its linears see every row of a step, in their order: those of prompts may use the matrix unit."""
        for linear in self._parts.linears:
            self._native.tile(linear.packed)

    def run(self, hidden: Tensor, turn: Turn) -> bool:
        """Run the layer in place on hidden [1, T, H]; False where it has to be run as modules, hidden being untouched."""
        done, self._done = self._done, None
        if done is hidden:
            return True
        chain = self._run(hidden, turn, 1)
        for program in () if chain is None else chain.following:
            program._done = hidden
        return chain is not None

    def run_through(self, hidden: Tensor, turn: Turn, layers: int) -> bool:
        """The same for this layer and those behind it; False where `layers` of them cannot run in one call."""
        return not self._module._forward_pre_hooks and self._run(hidden, turn, layers) is not None

    def _run(self, hidden: Tensor, turn: Turn, least: int) -> _Chain | None:
        layer, split = attention_of(self._parts.attention), self._native.split
        split.first, split.rows = (0, -1) if layer is None else (layer.step.prompt, hidden.shape[1])
        if layer is None or not hidden.is_contiguous() or hidden.dtype is not torch.float32:
            return None
        if turn is not None and not (turn[0].is_contiguous() and turn[1].is_contiguous()):
            return None
        chain = self._chain(layer.step, hidden.shape[1])
        if chain is None or 1 + len(chain.following) < least:
            return None
        self._native.layer(chain.words, self._frame.of(layer.step, hidden, turn))
        return chain

    def _chain(self, step: Step, tokens: int) -> _Chain | None:
        """This layer's program and those of the layers behind it, as far as each has one."""
        grown = -1
        while grown != self._space.grown:  # a program that was written made others stale
            grown = self._space.grown
            programs, pieces = self._pieces(step, tokens)
        if not pieces:
            return None
        known = cast("_Chain | None", step.memo.get((self, "chain")))
        if known is None or not known.holds(pieces):
            known = step.memo[self, "chain"] = _Chain(torch.cat(pieces), tuple(pieces), tuple(programs[1:]))
        return known

    def _pieces(self, step: Step, tokens: int) -> tuple[list[LayerProgram], list[Tensor]]:
        programs: list[LayerProgram] = []
        pieces: list[Tensor] = []
        program: LayerProgram | None = self
        while program is not None and (piece := program._written(step, tokens)) is not None:
            programs.append(program)
            pieces.append(piece)
            program = program._next
        return programs, pieces

    @property
    def _next(self) -> LayerProgram | None:
        """What may run in the same call: nobody looks at the hidden states between the two."""
        following = self.following
        if following is None or self._module._forward_hooks or following._module._forward_pre_hooks:
            return None
        return following

    def _written(self, step: Step, tokens: int) -> Tensor | None:
        layer = attention_of(self._parts.attention)
        if layer is None:
            return None
        # The dict of rows is a new one for every composition, and hooks come and go between compositions only.
        written = cast("_Written | None", step.memo.get(self))
        if written is None or not written.holds(step.rows, tokens, self._space.grown, layer):
            program = self._write(layer, tokens)
            written = step.memo[self] = _Written(step.rows, tokens, self._space.grown, layer, program)
        return written.program

    def _write(self, layer: LayerAttention, tokens: int) -> Tensor | None:
        if any(module._forward_hooks or module._forward_pre_hooks for module in self._parts.modules()):
            return None
        instructions, grown = None, -1
        while grown != self._space.grown:  # space that grew half-way has moved: addresses written before are stale
            grown = self._space.grown
            instructions = _instructions(self._parts, layer, tokens, self._space)
        if instructions is None:
            return None
        width = opcodes.INSTRUCTION_WORDS
        return torch.tensor([(*words, *(0,) * (width - len(words))) for words in instructions], dtype=torch.int64)


def _instructions(parts: LayerParts, layer: LayerAttention, tokens: int, space: Space) -> list[Words] | None:
    at, (gate_proj, up_proj, down_proj) = parts.shape, parts.feed_forward
    wide = {name: space.of(name, tokens * m.out_features) for name, m in (("q", parts.q), ("k", parts.k), ("v", parts.v))}
    normed = space.of("normed", tokens * parts.q.in_features)
    mixed, out = space.of("mixed", tokens * parts.o.in_features), space.of("out", tokens * parts.o.out_features)
    gate, up = (space.of(name, tokens * gate_proj.out_features) for name in ("gate", "up"))
    blocks, size = layer.keys.shape[:2]
    caches = (layer.keys.data_ptr(), layer.values.data_ptr())
    found: list[Sequence[Words] | None] = [
        _normed(parts.norm, normed),
        *(_adapted(module, normed, wide[name]) for name, module in (("q", parts.q), ("k", parts.k), ("v", parts.v))),
        [
            (opcodes.WRITE, wide["q"], wide["k"], wide["v"], *caches, blocks, size, at.heads, at.kv_heads, at.dim),
            (
                opcodes.ATTEND, wide["q"], *caches, blocks, size, at.dim, at.heads, at.kv_heads,
                _number(at.scale), at.window, _number(at.softcap), mixed,
            ),
        ],
        _adapted(parts.o, mixed, out, own_input=True),
        [(opcodes.ADD, out, _HIDDEN, parts.o.out_features)],
        _normed(parts.second_norm, normed),
        _adapted(gate_proj, normed, gate),
        _adapted(up_proj, normed, up),
        [(_activation(parts.gated), gate, up, gate, gate_proj.out_features)],
        _adapted(down_proj, gate, out, own_input=True),
        [(opcodes.ADD, out, _HIDDEN, down_proj.out_features)],
    ]  # fmt: skip
    return None if None in found else [words for some in found if some is not None for words in some]


def _normed(module: nn.Module, out: int) -> list[Words] | None:
    """A norm of the hidden states, and what this step's adapters do to it."""
    norm, extension = cast("RMSNorm", module.forward), cast("Extension | None", module.extension)
    words = (opcodes.NORM, _HIDDEN, out, norm.scale.data_ptr(), norm.scale.numel(), _number(norm.eps))
    if extension is None:
        return [words]
    before, after = extension.runs_before(), extension.runs()
    if before is None or before or after is None:
        return None
    found = [_words(run, _HIDDEN, out) for run in after]
    return None if None in found else [words, *(w for w in found if w is not None)]


def _activation(gated: GatedMLP) -> int:
    return opcodes.SILU_MUL if gated.kernel == gated.native.silu_mul else opcodes.GELU_TANH_MUL


def _adapted(module: PackedModule, x: int, y: int, *, own_input: bool = False) -> list[Words] | None:
    """A projection, and what this step's adapters do to it; None where that has to be called.

    An adapter that acts on the input needs one that no other module reads.
    """
    extension = module.extension
    if extension is None:
        return [module.packed.words(x, y)]
    before, after = extension.runs_before(), extension.runs()
    if before is None or after is None or (before and not own_input):
        return None
    acts = [*((run, x, x) for run in before), *((run, x, y) for run in after)]
    found = [_words(run, given, changed) for run, given, changed in acts]
    if None in found:
        return None
    acted = [words for words in found if words is not None]
    return [*acted[: len(before)], module.packed.words(x, y), *acted[len(before) :]]


def _words(run: object, x: int, y: int) -> Words | None:
    """A prepared call as an instruction, None where there is none for it."""
    if isinstance(run, Instructed):
        return run.words(x, y)
    if not isinstance(run, AddRows | MulRows) or run.vectors.dtype is not torch.float32:
        return None
    kind = opcodes.ADD_ROWS if isinstance(run, AddRows) else opcodes.MUL_ROWS
    rows, (slots, width) = run.rows, run.vectors.shape
    where = (rows.index.data_ptr(), rows.slot.data_ptr(), rows.index.numel(), slots)
    return (kind, y, run.vectors.data_ptr(), *where, width)


def _number(value: float) -> int:
    """A number as a word: the bits of a double."""
    return cast("int", struct.unpack("q", struct.pack("d", value))[0])
