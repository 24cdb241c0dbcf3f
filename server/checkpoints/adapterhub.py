"""AdapterHub's dialect (the `adapters` library, 0.x and 1.x): its adapter_config.json and adapter.safetensors, into neutral
checkpoints.

Owns what the library computes for each option on decoders, read off its 1.3.0 (see tests/golden/README.md), and where it
hangs its modules. Never imports the library.

    <layers>.{l}.attention_adapters.adapters.{name}.adapter_down.0.weight    bottleneck after attention
    <layers>.{l}.output_adapters.adapters.{name}.adapter_up.bias             bottleneck after the feed-forward
    <layers>.{l}.self_attn.q_proj.loras.{name}.lora_A                        LoRA, and IA3 (lora_B alone)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

import torch
from torch import Tensor

from ..errors import AdapterError
from ..methods.activations import activation_of
from ..methods.base import BaseShape, Checkpoint, Sublayer, Tensors, check_shape
from ..methods.layout import Kind
from .adapterhub_fields import BottleneckFields, InterfaceFields, LoraFields, UploadFields, members_of, parse, shown

WEIGHTS: Final = "adapter.safetensors"
INTERFACE: Final = "adapter_interface.json"
KINDS: Final[tuple[Kind, ...]] = ("attention", "feed_forward")

# --- Where the library puts things ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exit:
    """Where a bottleneck sits, as names relative to the layer."""

    module: str  # the one whose output it takes
    residual: str | None  # the one whose input is its residual; None: it gets none
    norm: str | None = None  # a LayerNorm of the base that it applies itself


@dataclass(frozen=True)
class Places:
    """How the library sees one architecture. `hooked` models add the residual themselves, after the adapter."""

    exits: Mapping[Kind, Exit]
    roles: Mapping[str, str]  # module, relative to the layer -> role in LoRAConfig
    hooked: bool
    source: str  # what to name in an error


def _llama_like(hooked: bool) -> Places:
    """In its own Llama and Mistral classes the library swaps the two: intermediate_lora is down_proj, output_lora up_proj."""
    exits: dict[Kind, Exit] = {
        "attention": Exit("self_attn.o_proj", "input_layernorm"),
        "feed_forward": Exit("mlp.down_proj", "post_attention_layernorm"),
    }
    up, down = ("intermediate", "output") if hooked else ("output", "intermediate")
    roles = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v"}
    return Places(MappingProxyType(exits), roles | {"mlp.up_proj": up, "mlp.down_proj": down}, hooked, "model_type")


BUILT_IN: Final[Mapping[str, Places]] = MappingProxyType(
    {
        "llama": _llama_like(hooked=False),
        "mistral": _llama_like(hooked=False),
        "qwen2": _llama_like(hooked=True),
        "qwen3": _llama_like(hooked=True),
        "gpt2": Places(
            {"attention": Exit("attn.c_proj", "ln_1"), "feed_forward": Exit("mlp.c_proj", "ln_2")},
            {"attn.c_attn": "qkv", "mlp.c_fc": "intermediate", "mlp.c_proj": "output"},
            hooked=False,
            source="model_type",
        ),
        "phi": Places(
            {"attention": Exit("self_attn.dense", "input_layernorm"), "feed_forward": Exit("mlp.fc2", None)},
            {
                "self_attn.q_proj": "q",
                "self_attn.k_proj": "k",
                "self_attn.v_proj": "v",
                "mlp.fc1": "intermediate",
                "mlp.fc2": "output",
            },
            hooked=True,
            source="model_type",
        ),
    }
)


def _places(base: BaseShape, interface: Mapping[str, object] | None) -> Places:
    if interface is None:
        built_in = BUILT_IN.get(base.model_type)
        if built_in is None:
            raise AdapterError(INTERFACE, f"is missing; the library saves it with every adapter of a {base.model_type}")
        return built_in
    given = interface.get("interface")
    if not isinstance(given, dict):
        raise AdapterError(f"{INTERFACE}: interface", "must be a JSON object")
    return _from_interface(parse(InterfaceFields, given, f"{INTERFACE}: interface."))


def _from_interface(fields: InterfaceFields) -> Places:
    """With an interface the library hooks the model, also one that it has a class for."""
    attention = fields.layer_self_attn
    projections = {"q": fields.attn_q_proj, "k": fields.attn_k_proj, "v": fields.attn_v_proj, "qkv": fields.attn_qkv_proj}
    roles = {f"{attention}.{module}": role for role, module in projections.items() if module is not None}
    roles |= {fields.layer_intermediate_proj: "intermediate", fields.layer_output_proj: "output"}
    exits: dict[Kind, Exit] = {"feed_forward": Exit(fields.layer_output_proj, fields.layer_pre_ffn, fields.layer_ln_2)}
    if fields.attn_o_proj is not None:
        exits["attention"] = Exit(f"{attention}.{fields.attn_o_proj}", fields.layer_pre_self_attn, fields.layer_ln_1)
    return Places(exits, roles, hooked=True, source=INTERFACE)


# --- The tensors ----------------------------------------------------------------------------------------------------


@dataclass
class Site:
    """The tensors stored under one path, by what follows the adapter's name in their keys."""

    prefix: str  # of every key here, for messages
    path: str  # the module the library hung it on
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Raises: AdapterError naming the key when it is missing or has another shape."""
        if name not in self.tensors:
            raise AdapterError(self.prefix + name, "is missing")
        check_shape(self.prefix + name, self.tensors[name], shape)
        return self.tensors[name]

    def check_only(self, names: Collection[str]) -> None:
        for name in self.tensors:
            if name not in names:
                raise AdapterError(self.prefix + name, "is not a tensor that the config gives this adapter")


_HOLDERS: Final[Mapping[str, Kind | Literal["lora"]]] = MappingProxyType(
    {"attention_adapters.adapters": "attention", "output_adapters.adapters": "feed_forward", "loras": "lora"}
)


def _sites(tensors: Tensors, name: str) -> dict[str, list[Site]]:
    """Sites by what they are: attention, feed_forward, lora. Raises: AdapterError naming a tensor that is none of them."""
    found: dict[tuple[str, str], Site] = {}
    for key, tensor in tensors.items():
        for holder, what in _HOLDERS.items():
            path, middle, rest = f".{key}".rpartition(f".{holder}.{name}.")
            if middle:
                site = found.setdefault((what, path), Site(key[: len(key) - len(rest)], path[1:]))
                site.tensors[rest] = tensor
                break
        else:
            raise AdapterError(key, f"belongs to no bottleneck or LoRA of an adapter named {shown(name)}")
    by_kind: dict[str, list[Site]] = {what: [] for what in _HOLDERS.values()}
    for (kind, _), site in found.items():
        by_kind[kind].append(site)
    return by_kind


def is_adapterhub(config: Mapping[str, object]) -> bool:
    """Whether an adapter_config.json is of this dialect: PEFT's has a peft_type and no nested config."""
    return "peft_type" not in config and "config" in config and "version" in config


def read_adapterhub(
    config: Mapping[str, object], tensors: Tensors, base: BaseShape, interface: Mapping[str, object] | None = None
) -> tuple[Checkpoint, ...]:
    """The checkpoints of one upload: several for a union, or where places of one adapter compute differently.

    `interface` is adapter_interface.json, where the upload has one.
    Raises: AdapterError naming the config field or the tensor at fault.
    """
    upload = parse(UploadFields, config, "")
    if upload.model_type != base.model_type:
        raise AdapterError("model_type", f"{shown(upload.model_type)} is not the base model's, {base.model_type!r}")
    if upload.hidden_size != base.hidden_size:
        raise AdapterError("hidden_size", f"{upload.hidden_size} is not the base model's, {base.hidden_size}")
    members = members_of(_repaired(upload))
    places, sites = _places(base, interface), _sites(tensors, upload.name)
    bottlenecks = [(where, fields) for where, fields in members if isinstance(fields, BottleneckFields)]
    loras = [(where, fields) for where, fields in members if isinstance(fields, LoraFields)]
    return (*_read_bottlenecks(bottlenecks, sites, base, places), *_read_loras(loras, sites["lora"], base, places))


def _repaired(upload: UploadFields) -> Mapping[str, object]:
    """Before 1.1.0 the library ignored alpha when it applied a LoRA; since then it loads such files with alpha = r."""
    config = upload.config
    _, major, minor, *_ = upload.version.split(".")
    if config.get("architecture") == "lora" and (int(major), int(minor)) < (1, 1):
        return {**config, "alpha": config.get("r", LoraFields.model_fields["r"].default)}
    return config


# --- Bottlenecks ----------------------------------------------------------------------------------------------------


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


def _read_bottlenecks(
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


# --- LoRA and IA3 ---------------------------------------------------------------------------------------------------


def _read_loras(
    members: list[tuple[str, LoraFields]], sites: list[Site], base: BaseShape, places: Places
) -> Iterable[Checkpoint]:
    if len(members) > 1:
        raise AdapterError("config.configs", "holds more than one LoRA config")
    if sites and not members:
        raise AdapterError(sites[0].prefix[:-1], "is a LoRA, but the config has none")
    for where, fields in members:
        modules = _by_module(fields, sites, base, places)
        scale = fields.alpha / fields.r
        if fields.composition_mode == "scale":
            yield Checkpoint("ia3", {}, {name: _ia3(fields, where, *site, base) for name, site in modules.items()})
        else:
            found = {name: _lora(fields, *site, base) for name, site in modules.items()}
            yield Checkpoint("lora", {"scale": dict.fromkeys(found, scale)}, found)


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
    site.check_only(("lora_A", "lora_B"))
    if len(parts) == 1:
        return {"A": a, "B": b}
    full = b.new_zeros(len(parts), height, named, rank)
    full[parts, :, range(named)] = b.view(named, height, rank)
    return {"A": a, "B": full.reshape(shape.out_features, named * rank)}


def _parts(fields: LoraFields, role: str) -> list[bool]:
    """Which parts of a projection the adapter has: one, or q, k and v of a fused one, in the order they are stored."""
    return [name in fields.attn_matrices for name in ("q", "k", "v")] if role == "qkv" else [True]
