"""AdapterHub's LoRA, VeRA, DoRA and (IA)^3 into neutral checkpoints.

Owns what the fields of a LoRAConfig mean for the stored tensors, fused projections included. Never imports the library.

    LoRA    y + s B A x,  s = alpha / r
    VeRA    the same with A = D A', B = B'' B': A' and B' are shared by every module, D and B'' are its own, both full
    DoRA    f (y + s B A x),  f = m / |W + B A| per output: the bias is scaled too, and the norm is taken without s
    (IA)^3  y times a vector
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import AdapterError
from ..methods.base import BaseShape, Checkpoint, Tensors
from .adapterhub_fields import LoraFields
from .adapterhub_places import Places
from .adapterhub_sites import Site


def read_loras(
    members: list[tuple[str, LoraFields]], found: Mapping[str, list[Site]], base: BaseShape, places: Places
) -> Iterable[Checkpoint]:
    """`found` holds the file's sites by kind. Raises: AdapterError naming the field or tensor at fault."""
    sites, shared = found["lora"], found["shared"]
    if len(members) > 1:
        raise AdapterError("config.configs", "holds more than one LoRA config")
    if shared and not any(_is_vera(fields) for _, fields in members):
        raise AdapterError(shared[0].prefix[:-1], "is what VeRA modules share, but the config has none")
    if sites and not members:
        raise AdapterError(sites[0].prefix[:-1], "is a LoRA, but the config has none")
    for where, fields in members:
        modules = _by_module(fields, sites, base, places)
        if fields.composition_mode == "scale":
            _check_ia3(fields, where)
            yield Checkpoint("ia3", {}, {name: _ia3(fields, where, *site, base) for name, site in modules.items()})
        else:
            yield from _added(fields, where, modules, shared, base)


def _added(
    fields: LoraFields, where: str, modules: Mapping[str, tuple[Site, str, str]], shared: list[Site], base: BaseShape
) -> Iterable[Checkpoint]:
    if _is_vera(fields):
        pair = _shared_pair(fields, where, shared)
        factors = {name: _vera(fields, where, *site, *pair, base) for name, site in modules.items()}
    else:
        factors = {name: _lora(fields, *site, base) for name, site in modules.items()}
    yield Checkpoint("lora", {"scale": dict.fromkeys(factors, fields.alpha / fields.r)}, factors)
    if fields.use_dora:
        scales = {name: _dora(where, *site, factors[name], base) for name, site in modules.items()}
        yield Checkpoint("ia3", {}, scales)


def _is_vera(fields: LoraFields) -> bool:
    return fields.composition_mode == "add" and (fields.vera_d is not None or fields.vera_b is not None)


def _by_module(fields: LoraFields, sites: list[Site], base: BaseShape, places: Places) -> dict[str, tuple[Site, str, str]]:
    """Module of the base -> (what is stored for it, module, role). Exactly the modules the config names."""
    roles = _roles(fields, places)
    expected = {(layer, role) for layer in range(base.num_layers) if layer not in fields.leave_out for role in roles}
    found: dict[str, tuple[Site, str, str]] = {}
    for site in sites:
        module, layer, role = _located(site, base, places)
        if module in found:
            raise AdapterError(site.prefix[:-1], "is stored twice, under two paths")
        if (layer, role) not in expected:
            raise AdapterError(site.prefix[:-1], "is stored, but the config gives it no LoRA")
        expected.discard((layer, role))
        found[module] = site, module, role
    if expected:
        layer, role = min(expected)
        raise AdapterError(f"layer {layer}", f"has no LoRA at {role!r}, although the config gives it one")
    return found


def _roles(fields: LoraFields, places: Places) -> set[str]:
    """The places of one layer that have a LoRA: "q", "k", "v" or the fused "qkv", "intermediate", "output"."""
    projections: set[str] = set(fields.attn_matrices) if fields.selfattn_lora else set()
    if projections and "qkv" in places.roles.values():
        projections = {"qkv"}
    others = {"intermediate": fields.intermediate_lora, "output": fields.output_lora}
    return projections | {role for role, on in others.items() if on}


def _located(site: Site, base: BaseShape, places: Places) -> tuple[str, int, str]:
    """(module of the base, layer, role). A path saved from a bare model is the tail of the base's name."""
    for place, role in places.roles.items():
        layer = site.path.removesuffix(f".{place}").rpartition(".")[2]
        if site.path.endswith(f".{place}") and layer.isdecimal():
            names = [name for name in base.modules if f".{name}".endswith(f".{site.path}")]
            if len(names) == 1:
                return names[0], int(layer), role
    raise AdapterError(site.prefix[:-1], "is not a place the library gives a LoRA in this base model")


def _check_ia3(fields: LoraFields, where: str) -> None:
    if fields.use_dora:
        raise AdapterError(f"{where}use_dora", "composition_mode 'scale' has no DoRA")


def _ia3(fields: LoraFields, where: str, site: Site, module: str, role: str, base: BaseShape) -> dict[str, Tensor]:
    """The library's (IA)^3 always scales outputs, bias included; parts of a fused projection it does not name by alpha."""
    if fields.r != 1:
        raise AdapterError(f"{where}r", f"is {fields.r}; composition_mode 'scale' needs 1")
    parts = _parts(fields, role)
    out = base.modules[module].out_features
    scaled = site.take("lora_B", (out // len(parts) * sum(parts), 1)).flatten().float()
    site.check_only(("lora_B",))
    full = torch.ones(len(parts), out // len(parts))
    full[parts] = scaled.view(sum(parts), -1)
    out_scale = full.flatten() * fields.alpha
    if not bool(torch.isfinite(out_scale).all()):
        raise AdapterError(f"{where}alpha", f"{fields.alpha:g} makes {module} overflow")
    return {"out": out_scale}


def _lora(fields: LoraFields, site: Site, module: str, role: str, base: BaseShape) -> dict[str, Tensor]:
    """A fused projection has one A and B per named part, stacked: here B becomes block diagonal, zero where no part is."""
    shape, parts, rank = base.modules[module], _parts(fields, role), fields.r
    named, height = sum(parts), shape.out_features // len(parts)
    a = site.take("lora_A", (named * rank, shape.in_features))
    b = site.take("lora_B", (named * height, rank))
    site.check_only(("lora_A", "lora_B", *_magnitude(fields)))
    if len(parts) == 1:
        return {"A": a, "B": b}
    full = b.new_zeros(len(parts), height, named, rank)
    full[parts, :, range(named)] = b.view(named, height, rank)
    return {"A": a, "B": full.reshape(shape.out_features, named * rank)}


def _magnitude(fields: LoraFields) -> tuple[str, ...]:
    return ("m.weight",) if fields.use_dora else ()


def _shared_pair(fields: LoraFields, where: str, shared: list[Site]) -> tuple[Site, int]:
    """What every VeRA module shares, A [r, in] and B [out, r], and the number of outputs it is made for."""
    if len(shared) != 1:
        raise AdapterError(f"{where}vera_d", f"needs one pair of shared_parameters, the upload holds {len(shared)}")
    b = shared[0].tensors.get("lora_B")
    if b is None or b.ndim != 2:
        raise AdapterError(f"{shared[0].prefix}lora_B", f"must be a matrix [out, {fields.r}]")
    shared[0].check_only(("lora_A", "lora_B"))
    return shared[0], len(b)


def _vera(
    fields: LoraFields, where: str, site: Site, module: str, role: str, shared: Site, outputs: int, base: BaseShape
) -> dict[str, Tensor]:
    """One pair serves every module, so all of them have its shape: with others the library crashes."""
    shape, rank = base.modules[module], fields.r
    if role == "qkv":
        raise AdapterError(f"{where}vera_d", f"the library cannot run VeRA on {module}, a fused projection")
    if shape.out_features != outputs:
        have = f"{module} has {shape.out_features} outputs, the shared lora_B is made for {outputs}"
        raise AdapterError(f"{shared.prefix}lora_B", have)
    a = shared.take("lora_A", (rank, shape.in_features)).float()
    b = shared.take("lora_B", (outputs, rank)).float()
    down, up = site.take("vera_D", (rank, rank)).float(), site.take("vera_B", (outputs, outputs)).float()
    site.check_only(("vera_D", "vera_B", *_magnitude(fields)))
    factors = {"A": down @ a, "B": up @ b}
    if not all(bool(torch.isfinite(factor).all()) for factor in factors.values()):
        raise AdapterError(site.prefix[:-1], "overflows when it is multiplied by what the modules share")
    return factors


def _dora(where: str, site: Site, module: str, role: str, factors: Tensors, base: BaseShape) -> dict[str, Tensor]:
    """The factor per output, applied after the LoRA: on what the base and the LoRA gave together, bias included."""
    shape = base.modules[module]
    if role == "qkv" or shape.kind != "linear":
        raise AdapterError(f"{where}use_dora", f"the library applies no DoRA to {module}, a {shape.kind} module")
    magnitude = site.take("m.weight", (shape.out_features, 1)).flatten().float()
    norm = torch.linalg.norm(base.weight(module) + factors["B"].float() @ factors["A"].float(), dim=1)
    factor = magnitude / norm
    if not bool(torch.isfinite(factor).all()):
        raise AdapterError(f"{site.prefix}m.weight", "divided by the norm of the adapted weight is not finite")
    return {"out": factor}


def _parts(fields: LoraFields, role: str) -> list[bool]:
    """Which parts of a projection the adapter has: one, or q, k and v of a fused one, in the order they are stored."""
    return [name in fields.attn_matrices for name in ("q", "k", "v")] if role == "qkv" else [True]
