"""AdapterHub's bottlenecks into neutral checkpoints: what each option computes on decoders, read off its 1.3.0.

See tests/golden/README.md for the table of options. Never imports the library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ..errors import AdapterError
from ..methods.activations import activation_of
from ..methods.base import BaseShape, Checkpoint, Sublayer, Tensors
from ..methods.layout import Kind
from .adapterhub_fields import BottleneckFields
from .adapterhub_places import Exit, Places
from .adapterhub_sites import Site

KINDS: Final[tuple[Kind, ...]] = ("attention", "feed_forward")


@dataclass(frozen=True)
class Options:
    """What the sites of one checkpoint have in common; see `server/methods/bottleneck.py`."""

    activation: str
    reads: str
    skip: int
    norms: tuple[bool, bool]

    @property
    def config(self) -> dict[str, object]:
        return {"activation": self.activation, "reads": self.reads, "skip": self.skip}


def read_bottlenecks(
    members: list[tuple[str, BottleneckFields]], sites: Mapping[str, list[Site]], base: BaseShape, places: Places
) -> Iterable[Checkpoint]:
    """One checkpoint per way to compute: a pool's slot holds one adapter's sites and computes them alike."""
    parts: dict[Options, dict[str, Tensors]] = {}
    missing = {(kind, i) for _, f in members for kind in KINDS for i in range(base.num_layers) if f.covers(kind, i)}
    for kind in KINDS:
        for site in sites[kind]:
            sublayer = _sublayer(site, kind, base)
            where, fields = _member(members, kind, sublayer.layer, site)
            if (kind, sublayer.layer) not in missing:
                raise AdapterError(site.prefix[:-1], "is stored twice, under two paths")
            missing.discard((kind, sublayer.layer))
            options = _options(fields, where, sublayer, places)
            tensors = _bottleneck(fields, where, site, sublayer.layer, base.hidden_size)
            parts.setdefault(options, {})[sublayer.exit] = tensors
    if missing:
        kind, layer = min(missing)
        raise AdapterError(f"layer {layer}", f"has no adapter after {_said(kind)}, although the config gives it one")
    for options, found in parts.items():
        yield Checkpoint("bottleneck", options.config, found)


def _said(kind: Kind) -> str:
    return kind.replace("_", "-")


def _sublayer(site: Site, kind: Kind, base: BaseShape) -> Sublayer:
    """The sublayer of the layer at `site.path`, which is the base's own path or, saved from a bare model, its tail."""
    if not base.sublayers:
        raise AdapterError("config.architecture", f"bottlenecks are not served for base model type {base.model_type!r}")
    for sublayer in base.sublayers:
        layer = site.path.rpartition(".")[2]
        if sublayer.kind == kind and layer == str(sublayer.layer) and f".{site.path}." in f".{sublayer.exit}":
            return sublayer
    raise AdapterError(site.prefix[:-1], "is in no layer of the base model")


def _member(members: list[tuple[str, BottleneckFields]], kind: Kind, layer: int, site: Site) -> tuple[str, BottleneckFields]:
    found = [(where, fields) for where, fields in members if fields.covers(kind, layer)]
    if len(found) != 1:
        count = "no config gives" if not found else f"{len(found)} configs give"
        raise AdapterError(site.prefix[:-1], f"{count} layer {layer} an adapter after {_said(kind)}")
    return found[0]


def _options(fields: BottleneckFields, where: str, sublayer: Sublayer, places: Places) -> Options:
    """The library's options as what is computed at the sublayer's exit, given that decoders pass it no LayerNorm.

    Sequential, h the output and r the residual (methods/modeling.py, Adapter): x = h + r with original_ln_before, else h;
    the branch is added to h, or to x without residual_before_ln; original_ln_after then adds r, which here the model does.
    Parallel (ParallelAdapter): x = r, the branch is added to h.
    """
    exit_ = _exit(fields, where, sublayer, places)
    summed = fields.original_ln_before and exit_.residual is not None and not fields.is_parallel
    kept = 1 if summed and not fields.residual_before_ln else 0
    options = Options(
        activation=activation_of(f"{where}non_linearity", fields.non_linearity),
        reads="residual" if fields.is_parallel else "sum" if summed else "output",
        skip=kept if fields.original_ln_after else kept - 1,
        norms=(fields.ln_before, fields.ln_after),
    )
    if options.reads != "output" or options.skip:
        _check_residual(exit_, where, sublayer, places)
    return options


def _exit(fields: BottleneckFields, where: str, sublayer: Sublayer, places: Places) -> Exit:
    """Also refuses what the library itself cannot run on a decoder."""
    if fields.residual_before_ln == "post_add" and not fields.is_parallel:
        raise AdapterError(f"{where}residual_before_ln", "'post_add' needs a LayerNorm after the sublayer; decoders have none")
    if not fields.original_ln_after and places.hooked:
        raise AdapterError(
            f"{where}original_ln_after", f"false is not defined for {sublayer.exit}, whose model adds the residual"
        )
    if fields.ln_after and fields.adapter_residual_before_ln and not fields.is_parallel:
        raise AdapterError(f"{where}adapter_residual_before_ln", "true together with ln_after is not served")
    exit_ = places.exits.get(sublayer.kind)
    if exit_ is None or not sublayer.exit.endswith(f".{exit_.module}"):
        have = "nothing" if exit_ is None else exit_.module
        raise AdapterError(places.source, f"puts adapters behind {have}; this base's exit is {sublayer.exit}")
    if exit_.norm is not None:
        raise AdapterError(places.source, f"gives the adapter behind {exit_.module} the base's {exit_.norm}; not served")
    return exit_


def _check_residual(exit_: Exit, where: str, sublayer: Sublayer, places: Places) -> None:
    if exit_.residual is None:
        raise AdapterError(f"{where}is_parallel", f"the library has no input for a parallel adapter at {sublayer.exit}")
    layer = sublayer.exit.removesuffix(exit_.module)
    if layer + exit_.residual != sublayer.residual:
        raise AdapterError(places.source, f"takes the residual before {exit_.residual}; this base's is {sublayer.residual}")


def _bottleneck(fields: BottleneckFields, where: str, site: Site, layer: int, hidden: int) -> dict[str, Tensor]:
    width = _width(fields, where, layer, hidden)
    linear = 1 if fields.ln_before else 0
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "down": (f"adapter_down.{linear}.weight", (width, hidden)),
        "down_bias": (f"adapter_down.{linear}.bias", (width,)),
        "up": ("adapter_up.weight", (hidden, width)),
        "up_bias": ("adapter_up.bias", (hidden,)),
    }
    if fields.ln_before:
        shapes |= {f"norm_before_{name}": (f"adapter_down.0.{name}", (hidden,)) for name in ("weight", "bias")}
    if fields.ln_after:
        shapes |= {f"norm_after_{name}": (f"adapter_norm_after.{name}", (hidden,)) for name in ("weight", "bias")}
    if isinstance(fields.scaling, str):
        shapes["scale"] = ("scaling", (1 if fields.scaling == "learned" else hidden,))
    tensors = {neutral: site.take(name, shape) for neutral, (name, shape) in shapes.items()}
    _check_norm_copy(site, tensors)
    site.check_only([*(name for name, _ in shapes.values()), *(_NORM_COPY if fields.ln_before else ())])
    if not isinstance(fields.scaling, str) and fields.scaling != 1.0:
        tensors["scale"] = torch.tensor([fields.scaling])
    return tensors


#: The library registers the norm twice, so a state dict has it under both names.
_NORM_COPY: Final = ("adapter_norm_before.weight", "adapter_norm_before.bias")


def _check_norm_copy(site: Site, tensors: Tensors) -> None:
    for name in _NORM_COPY:
        own = tensors.get(f"norm_before_{name.rpartition('.')[2]}")
        if own is not None and name in site.tensors and not torch.equal(site.tensors[name], own):
            raise AdapterError(site.prefix + name, "differs from adapter_down.0, which is the same norm")


def _width(fields: BottleneckFields, where: str, layer: int, hidden: int) -> int:
    factor = fields.reduction_factor
    if isinstance(factor, dict):
        chosen = factor.get(str(layer), factor.get("default"))
        if chosen is None:
            raise AdapterError(f"{where}reduction_factor", f"names neither layer {layer} nor a default")
        factor = chosen
    return max(1, int(hidden // factor))
