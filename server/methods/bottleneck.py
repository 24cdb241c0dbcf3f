"""Bottleneck adapters (Houlsby et al., 2019; Pfeiffer et al., 2021; parallel: He et al., 2022) behind a sublayer's exit.

Owns their neutral form, the "bottleneck:..." pools and their arithmetic. Knows no library's file format: which of a
library's options give which `Form` is the dialect reader's business.

    y' = y + up(act(down(x))) + skip * r      y: the sublayer's output, r: its residual, x = y | y + r | r

    Checkpoint.sites[exit module] = {"down": [b, H], "down_bias": [b], "up": [H, b], "up_bias": [H]}, optionally
        "scale" [1] or [H] on the branch, "norm_before_weight", "norm_before_bias" [H] of a LayerNorm on x,
        "norm_after_weight", "norm_after_bias" [H] of a LayerNorm on the branch
    Checkpoint.config = {"activation": one of ACTIVATIONS, "reads": one of READS, "skip": -1, 0 or 1}
    Part.sites: the same names; "scale" and "norm_before_*" are folded into the matrices
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AdapterError
from .activations import ACTIVATIONS, activation_of
from .base import BaseShape, Checkpoint, Limits, Method, Op, Part, Rows, Sublayer, Tensors, check_shape
from .grouped import Pool, Split, split_of

#: What the down projection reads: the sublayer's output, output + residual, or (parallel adapters) the residual alone.
READS = ("output", "sum", "residual")
SMALLEST_BUCKET = 8
#: torch's default; the libraries that write these norms never change it.
NORM_EPS = 1e-5


def bucket_of(width: int) -> int:
    """The pool's width: 8, 12, 16, 24, 32, 48, ... so that few pools hold every width and under half is padding."""
    power = max(SMALLEST_BUCKET, 1 << (width - 1).bit_length())
    smaller = power * 3 // 4
    return smaller if SMALLEST_BUCKET <= width <= smaller else power


@dataclass(frozen=True)
class Form:
    """What the parts of one pool have in common: everything about the forward that is not a tensor."""

    width: int
    activation: str
    reads: str
    skip: int
    norm_before: bool
    norm_after: bool

    @property
    def pool(self) -> str:
        norms = (":norm_before" if self.norm_before else "") + (":norm_after" if self.norm_after else "")
        return f"bottleneck:{self.width}:{self.activation}:{self.reads}:{self.skip}{norms}"

    @classmethod
    def parse(cls, pool: str) -> Self:
        """The inverse of `pool`."""
        _, width, activation, reads, skip, *norms = pool.split(":")
        return cls(int(width), activation, reads, int(skip), "norm_before" in norms, "norm_after" in norms)


class Bottleneck(Method):
    """Bottleneck adapters at the exits of attention and feed-forward sublayers."""

    name: ClassVar[str] = "bottleneck"
    served: ClassVar[str] = "after the attention's and feed-forward's exits"

    def read(self, checkpoint: Checkpoint, base: BaseShape, limits: Limits) -> Part:
        if not checkpoint.sites:
            raise AdapterError("bottleneck", "the upload holds no bottleneck tensors")
        for module, tensors in checkpoint.sites.items():
            _check_site(module, tensors, base, limits)
        form = _form(checkpoint)
        sites = {module: _fold(module, tensors) for module, tensors in checkpoint.sites.items()}
        return Part(self.name, pool=form.pool, sites=sites)

    def op(self, part: Part, module: str, base: BaseShape, device: torch.device, dtype: torch.dtype) -> Op:
        form = Form.parse(str(part.pool))
        return BottleneckOp(form, base.hidden_size, _sublayer(base, module).residual, device, dtype)


def _sublayer(base: BaseShape, module: str) -> Sublayer:
    if not base.sublayers:
        raise AdapterError("bottleneck", f"the layout of base model type {base.model_type!r} is not known")
    for sublayer in base.sublayers:
        if sublayer.exit == module:
            return sublayer
    raise AdapterError(module, f"is not the exit of an attention or feed-forward sublayer of {base.model_type}")


def _check_site(module: str, tensors: Tensors, base: BaseShape, limits: Limits) -> None:
    _sublayer(base, module)
    missing = {"down", "down_bias", "up", "up_bias"} - tensors.keys()
    if missing:
        raise AdapterError(f"{module}.{min(missing)}", "is missing")
    hidden, width = base.hidden_size, len(tensors["down"])
    if not 0 < width <= limits.max_rank:
        raise AdapterError(f"{module}.down", f"width {width} is not within 1..{limits.max_rank}, this server's limit")
    wanted = {"down": (width, hidden), "down_bias": (width,), "up": (hidden, width), "up_bias": (hidden,)}
    for name, tensor in tensors.items():
        single = name == "scale" and tensor.numel() == 1
        check_shape(f"{module}.{name}", tensor, (1,) if single else wanted.get(name, (hidden,)))


def _form(checkpoint: Checkpoint) -> Form:
    config, sites = checkpoint.config, checkpoint.sites
    reads, skip = config.get("reads"), config.get("skip")
    if reads not in READS:
        raise AdapterError("reads", f"must be one of {', '.join(READS)}")
    if skip not in (-1, 0, 1):
        raise AdapterError("skip", "must be -1, 0 or 1")
    return Form(
        width=bucket_of(max(len(tensors["down"]) for tensors in sites.values())),
        activation=activation_of("activation", str(config.get("activation"))),
        reads=str(reads),
        skip=int(skip),
        norm_before=_uniform(sites, "norm_before"),
        norm_after=_uniform(sites, "norm_after"),
    )


def _uniform(sites: Mapping[str, Tensors], norm: str) -> bool:
    """Whether the sites have this norm, weight and bias, all of them or none."""
    names = {f"{norm}_weight", f"{norm}_bias"}
    held = [names & tensors.keys() for tensors in sites.values()]
    if any(held) and any(found != names for found in held):
        raise AdapterError(norm, "some sites have its weight and bias and some do not")
    return bool(held[0])


def _fold(module: str, tensors: Tensors) -> dict[str, Tensor]:
    """In fp32: LN(x) = x^ * w + b goes into `down`, the scale into `up` (or behind the branch's norm it cannot change)."""
    site = dict(tensors)
    scale = site.pop("scale", None)
    weight, bias = site.pop("norm_before_weight", None), site.pop("norm_before_bias", None)
    if scale is not None:
        site["up"] = site["up"].float() * scale.float().unsqueeze(-1)
        site["up_bias"] = site["up_bias"].float() * scale.float()
    if weight is not None and bias is not None:
        down = site["down"].float()
        site["down"] = down * weight.float()
        site["down_bias"] = site["down_bias"].float() + down @ bias.float()
    for name, tensor in site.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{module}.{name}", "overflows when its scale or norm is folded in")
    return site


@dataclass(frozen=True)
class _Weights:
    """Of one slot (down [b, H], biases and norm [b] or [H]), or gathered for m rows (the same with a leading m)."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None


class BottleneckOp(Op):
    """Semantics: y'[t] = y[t] + up[s] @ act(down[s] @ x[t] + b[s]) + c[s] + skip * r[t], s the slot of row t.

    x[t] is y[t], y[t] + r[t] or r[t], normalised first in a form with norm_before; with norm_after the branch (all that
    is added to y but skip * r) goes through a LayerNorm of its own.

    down [slots, b, H] and up [slots, H, b] are zero padded from the adapter's width to b, which is exact for every
    activation: the columns of `up` that meet the padding are zero.
    A slot nobody was put into is skipped, not computed: no choice of weights makes a form with `skip` the identity.
    """

    order: ClassVar[int] = 40

    def __init__(self, form: Form, hidden: int, residual: str, device: torch.device, dtype: torch.dtype) -> None:
        self.form = form
        self._residual = residual
        self._live: set[int] = set()
        shapes = {"down": (form.width, hidden), "down_bias": (form.width,), "up": (hidden, form.width), "up_bias": (hidden,)}
        if form.norm_after:
            shapes |= {"norm_after_weight": (hidden,), "norm_after_bias": (hidden,)}
        self._pools = {name: Pool(shape, 0.0, device, dtype) for name, shape in shapes.items()}

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self._pools.values())

    @property
    def taps(self) -> tuple[str, ...]:
        return (self._residual,) if self.form.reads != "output" or self.form.skip else ()

    def grow(self, capacity: int) -> None:
        for pool in self._pools.values():
            pool.grow(capacity)

    def put(self, slot: int, tensors: Tensors) -> None:
        self.clear(slot)
        width = len(tensors["down"])
        for name, tensor in tensors.items():
            place = self._pools[name].tensor[slot]
            narrow = {"down": place[:width], "down_bias": place[:width], "up": place[..., :width]}
            narrow.get(name, place).copy_(tensor)
        self._live.add(slot)

    def clear(self, slot: int) -> None:
        self._live.discard(slot)
        for pool in self._pools.values():
            pool.clear(slot)

    def after(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        split, gathered = self._work(rows, y.dtype)
        residual = rows.taps[self._residual] if self.taps else None
        for slot, where in split.long:
            y[where] = self._bend(y[where], residual, where, self._weights(slot, y.dtype))
        if split.short is not None and gathered is not None:
            y[split.short] = self._bend(y[split.short], residual, split.short, gathered)
        return y

    def _work(self, rows: Rows, dtype: torch.dtype) -> tuple[Split, _Weights | None]:
        """This op's rows, and the weights its short groups share, found once per composition."""
        kept = rows.scratch.get(self)
        if kept is None:
            groups = tuple(group for group in rows.groups if group[0] in self._live)
            split = split_of(rows if groups == rows.groups else replace(rows, groups=groups, scratch={}))
            kept = split, None if split.short is None else self._weights(split.slots, dtype)
            rows.scratch[self] = kept
        return cast("tuple[Split, _Weights | None]", kept)

    def _weights(self, slots: int | slice | Tensor, dtype: torch.dtype) -> _Weights:
        held = {name: pool.tensor[slots].to(dtype) for name, pool in self._pools.items()}
        return _Weights(
            held["down"],
            held["down_bias"],
            held["up"],
            held["up_bias"],
            held.get("norm_after_weight"),
            held.get("norm_after_bias"),
        )

    def _bend(self, y: Tensor, residual: Tensor | None, where: slice | Tensor, weights: _Weights) -> Tensor:
        """y [n, H] -> [n, H]; residual [T, H] is of the whole step, `where` picks its n rows."""
        r = residual[where] if residual is not None else y
        x = r if self.form.reads == "residual" else y + r if self.form.reads == "sum" else y
        if self.form.norm_before:
            x = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
        hidden = ACTIVATIONS[self.form.activation](_project(x, weights.down, weights.down_bias))
        branch = _project(hidden, weights.up, weights.up_bias)
        if weights.norm_weight is not None and weights.norm_bias is not None:
            branch = F.layer_norm(branch, branch.shape[-1:], eps=NORM_EPS) * weights.norm_weight + weights.norm_bias
        out = y + branch
        return torch.add(out, r, alpha=self.form.skip) if self.form.skip else out


def _project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [n, i] through weight [o, i] (one slot) or [n, o, i] (a slot per row): [n, o]."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return torch.baddbmm(bias.unsqueeze(-1), weight, x.unsqueeze(-1)).squeeze(-1)
