"""How AdapterHub's library sees each architecture: which module it calls what, and where its adapters sit.

Owns the table of the models it has a class or an interface for (1.3.0), and the reading of adapter_interface.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from ..errors import AdapterError
from ..methods.base import BaseShape
from ..methods.layout import Kind
from .adapterhub_fields import InterfaceFields, parse

INTERFACE: Final = "adapter_interface.json"


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


def places_of(base: BaseShape, interface: Mapping[str, object] | None) -> Places:
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
