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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AdapterError
from .activations import ACTIVATIONS, activation_of
from .base import BaseShape, Checkpoint, Limits, Method, Op, Part, Rows, Run, Sublayer, Tensors, check_shape
from .grouped import Pool, RunsOp, Split, per_row, split_of

#: kernel(activation, (down, down_bias, up, up_bias), rows, own) -> run(x, y), which adds the rows' branches of x (where
#: `own`: of y itself) to y, a row's bits depending on no other row; down and up [S, b, H], biases [S, b] and [S, H].
Kernel = Callable[[str, Sequence[Tensor], Rows, bool], Run]

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
    """Bottleneck adapters at sublayers' exits; `kernel` replaces the torch arithmetic where one is given."""

    name: ClassVar[str] = "bottleneck"
    served: ClassVar[str] = "after the attention's and feed-forward's exits"

    def __init__(self, kernel: Kernel | None = None) -> None:
        self.kernel = kernel

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
        return BottleneckOp(form, base.hidden_size, _sublayer(base, module).residual, device, dtype, self.kernel)


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


class BottleneckOp(RunsOp):
    """Semantics: y'[t] = y[t] + up[s] @ act(down[s] @ x[t] + b[s]) + c[s] + skip * r[t], s the slot of row t.

    x[t] is y[t], y[t] + r[t] or r[t], normalised first in a form with norm_before; with norm_after the branch (all that
    is added to y but skip * r) goes through a LayerNorm of its own.

    down and (transposed) up [slots, b, H] are zero padded from the adapter's width to b, which is exact for every
    activation: the rows of `up` that meet the padding are zero.
    A slot nobody was put into is skipped, not computed: no choice of weights makes a form with `skip` the identity.
    """

    order: ClassVar[int] = 40

    def __init__(
        self,
        form: Form,
        hidden: int,
        residual: str,
        device: torch.device,
        dtype: torch.dtype,
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__()
        self.form = form
        self.kernel = kernel
        self._residual = residual
        shapes = {"down": (form.width, hidden), "down_bias": (form.width,), "up": (form.width, hidden), "up_bias": (hidden,)}
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
        for name, tensor in tensors.items():
            stored = tensor.T if name == "up" else tensor
            self._pools[name].tensor[slot, : len(stored)] = stored
        self._held.add(slot)

    def clear(self, slot: int) -> None:
        self._held.discard(slot)
        for pool in self._pools.values():
            pool.clear(slot)

    def prepare(self, rows: Rows) -> Sequence[Run]:
        form = self.form
        if self.kernel is None:
            return (partial(self._torch, rows, _Gathered(self._pools, split_of(rows))),)
        weights = tuple(self._pools[name].tensor for name in ("down", "down_bias", "up", "up_bias"))
        if form.reads == "output" and not (form.skip or form.norm_before or form.norm_after):
            return (self.kernel(form.activation, weights, rows, True),)
        return (partial(self._native, rows, self.kernel(form.activation, weights, rows, False)),)

    def _native(self, rows: Rows, add: Run, x: Tensor, y: Tensor) -> None:
        """Per row throughout: elementwise arithmetic, LayerNorms and `add`, none of which looks at other rows."""
        form = self.form
        residual = rows.taps[self._residual] if self.taps else y
        given = self._read(y, residual)
        if not form.norm_after:
            add(given.contiguous(), y)
        else:
            branch = torch.zeros_like(y)
            add(given.contiguous(), branch)
            norm = ("norm_after_weight", "norm_after_bias")
            weight, bias = (per_row(self._pools[name].tensor, rows, (self, name)) for name in norm)
            rows.store(y, rows.take(y) + (_normalised(rows.take(branch)) * weight + bias))
        if form.skip:
            rows.store(y, torch.add(rows.take(y), rows.take(residual), alpha=form.skip))

    def _torch(self, rows: Rows, weights: _Gathered, x: Tensor, y: Tensor) -> None:
        """Products of torch's over groups of rows: their bits may depend on how many rows share them."""
        residual = rows.taps[self._residual] if self.taps else None
        for slot, where in weights.split.long:
            y[where] = self._bend(y[where], residual, where, weights.of(slot, y.dtype))
        if weights.split.short is not None:
            y[weights.split.short] = self._bend(y[weights.split.short], residual, weights.split.short, weights.short(y.dtype))

    def _bend(self, y: Tensor, residual: Tensor | None, where: slice | Tensor, held: Tensors) -> Tensor:
        """y [n, H] -> [n, H]; residual [T, H] is of the whole step, `where` picks its n rows."""
        r = residual[where] if residual is not None else y
        hidden = ACTIVATIONS[self.form.activation](_project(self._read(y, r), held["down"], held["down_bias"]))
        branch = _project(hidden, held["up"].transpose(-1, -2), held["up_bias"])
        if self.form.norm_after:
            branch = _normalised(branch) * held["norm_after_weight"] + held["norm_after_bias"]
        out = y + branch
        return torch.add(out, r, alpha=self.form.skip) if self.form.skip else out

    def _read(self, y: Tensor, r: Tensor) -> Tensor:
        """What the down projection reads, of the same rows."""
        x = r if self.form.reads == "residual" else y + r if self.form.reads == "sum" else y
        return _normalised(x) if self.form.norm_before else x


class _Gathered:
    """Pools as torch's products take them: of one slot (down [b, H] ...), or gathered for m rows (with a leading m)."""

    def __init__(self, pools: Mapping[str, Pool], split: Split) -> None:
        self._pools = pools
        self.split = split
        self._short: dict[str, Tensor] | None = None

    def of(self, slots: int | slice | Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: pool.tensor[slots].to(dtype) for name, pool in self._pools.items()}

    def short(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights that the short groups share, gathered once."""
        if self._short is None:
            self._short = self.of(self.split.slots, dtype)
        return self._short


def _normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def _project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [n, i] through weight [o, i] (one slot) or [n, o, i] (a slot per row): [n, o]."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return torch.baddbmm(bias.unsqueeze(-1), weight, x.unsqueeze(-1)).squeeze(-1)
