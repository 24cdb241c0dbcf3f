"""Which config fields of AdapterHub mean what here: honoured (a field of a model below), cosmetic, or refused unless default.

Every field of every config class of adapters 1.3.0 that is served is in exactly one of the three; the defaults are the
library's own (a test holds both against tests/golden/adapterhub/fields.json). Reads no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import AdapterError
from ..methods.layout import Kind

Number = Annotated[float, Field(allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1 << 31)]
Index = Annotated[int, Field(ge=0, le=1 << 31)]
Layers = Annotated[list[Annotated[int, Field(ge=0, le=1 << 31)]], Field(max_length=1024)]


#: Read off its code (`torch.mean(gate, dim=1)` in bottlenecks, LoRA, (IA)^3 and prefixes alike).
GATES: Final = "its gate is a mean over the whole sequence, future tokens included, which a running stream does not have"


class Fields(BaseModel):
    """The honoured fields of one kind of config; their defaults are the library's."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    #: No effect on what a loaded adapter computes: initialisation, training, or options of a refused field.
    cosmetic: ClassVar[frozenset[str]] = frozenset()
    #: Field -> (the only value that is served, why).
    refused: ClassVar[Mapping[str, tuple[object, str]]] = {}


class UploadFields(Fields):
    """The file itself. What is not listed is meta data of whoever saved it."""

    config: dict[str, object]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    version: Annotated[str, Field(pattern=r"^adapters\.\d{1,4}\.\d{1,4}(\.\d{1,4})?$")]
    model_type: str
    hidden_size: Count


class BottleneckFields(Fields):
    mh_adapter: bool
    output_adapter: bool
    reduction_factor: Factor | dict[str, Factor]
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    is_parallel: bool = False
    scaling: Number | Literal["learned", "channel"] = 1.0
    residual_before_ln: bool | Literal["post_add"] = True
    adapter_residual_before_ln: bool = False
    leave_out: Layers = []

    cosmetic: ClassVar[frozenset[str]] = frozenset(
        {
            "dropout",
            "factorized_phm_W",
            "factorized_phm_rule",
            "hypercomplex_nonlinearity",
            "init_weights",
            "init_weights_seed",
            "inv_adapter_reduction_factor",
            "learn_phm",
            "phm_bias",
            "phm_c_init",
            "phm_dim",
            "phm_init_range",
            "phm_rank",
            "shared_W_phm",
            "shared_phm_rule",
            "stochastic_depth",
        }
    )
    refused: ClassVar[Mapping[str, tuple[object, str]]] = MappingProxyType(
        {
            "phm_layer": (False, "Compacter's hypercomplex layers are not served"),
            "inv_adapter": (None, "invertible adapters are not served"),
            "cross_adapter": (False, "a decoder has no cross attention"),
            "use_gating": (False, GATES),
        }
    )

    def covers(self, kind: Kind, layer: int) -> bool:
        return (self.mh_adapter if kind == "attention" else self.output_adapter) and layer not in self.leave_out


class LoraFields(Fields):
    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    leave_out: Layers = []
    r: Count = 8
    alpha: Number = 8
    attn_matrices: list[Literal["q", "k", "v"]] = ["q", "v"]
    composition_mode: Literal["add", "scale"] = "add"
    use_dora: bool = False
    vera_d: Number | None = None  # with either of them set the adapter is a VeRA; the values only initialise it
    vera_b: Number | None = None

    cosmetic: ClassVar[frozenset[str]] = frozenset({"dropout", "dtype", "init_weights", "init_weights_seed"})
    refused: ClassVar[Mapping[str, tuple[object, str]]] = MappingProxyType(
        {
            "use_gating": (False, GATES),
        }
    )


class PrefixFields(Fields):
    flat: bool = False
    prefix_length: Count = 30
    bottleneck_size: Count = 512
    non_linearity: str = "tanh"

    cosmetic: ClassVar[frozenset[str]] = frozenset(
        {
            "cross_prefix",  # a decoder has neither an encoder nor cross attention
            "dropout",
            "encoder_prefix",
            "init_weights_seed",
            "shared_gating",  # of a gate that is refused
        }
    )
    refused: ClassVar[Mapping[str, tuple[object, str]]] = MappingProxyType(
        {
            "leave_out": ([], "every layer has the prefix or none has"),
            "use_gating": (False, GATES),
        }
    )


class UnionFields(Fields):
    configs: Annotated[list[dict[str, object]], Field(min_length=1, max_length=16)]


class HeadUploadFields(Fields):
    """head_config.json. `config` is null for a head of one of transformers' own classes, which then says all."""

    config: dict[str, object] | None
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    model_class: str
    model_type: str
    hidden_size: Count
    num_labels: Count | None = None
    label2id: dict[str, Index] | None = None


class HeadFields(Fields):
    """Linear layers over hidden states: all but the last of the base's width and followed by the activation."""

    head_type: Literal["classification", "tagging"]
    num_labels: Count = 2
    layers: Annotated[int, Field(ge=1, le=2)]
    activation_function: str | None = "tanh"
    label2id: dict[str, Index] | None = None
    bias: bool = True  # of the last layer

    #: A decoder hands its head the last token's state, with or without use_pooler.
    cosmetic: ClassVar[frozenset[str]] = frozenset({"dropout_prob", "use_pooler"})


class LmHeadFields(Fields):
    head_type: Literal["causal_lm"]
    layers: Annotated[int, Field(ge=1, le=1)] = 1
    bias: bool = False

    #: What shapes layers before the last, and training. The last layer's own shape is its tensor's.
    cosmetic: ClassVar[frozenset[str]] = frozenset(
        {"activation_function", "dropout_prob", "embedding_size", "label2id", "layer_norm", "shift_labels", "vocab_size"}
    )


class InterfaceFields(Fields):
    """adapter_interface.json: how the user told the library to see a model that it has no class for."""

    layer_self_attn: str
    layer_intermediate_proj: str
    layer_output_proj: str
    attn_o_proj: str | None
    attn_q_proj: str | None = None
    attn_k_proj: str | None = None
    attn_v_proj: str | None = None
    attn_qkv_proj: str | None = None
    layer_pre_self_attn: str | None = None
    layer_pre_ffn: str | None = None
    layer_ln_1: str | None = None
    layer_ln_2: str | None = None

    cosmetic: ClassVar[frozenset[str]] = frozenset(
        {"adapter_methods", "base_model", "layer_cross_attn", "layer_pre_cross_attn", "model_embeddings", "model_layers"}
    )


#: `config.architecture` -> fields.
ARCHITECTURES: Final[Mapping[str | None, type[Fields]]] = MappingProxyType(
    {None: BottleneckFields, "lora": LoraFields, "prefix_tuning": PrefixFields, "union": UnionFields}
)
_NOT_SERVED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "prompt_tuning": "AdapterHub offers prompt tuning for no decoder",
        "reft": "ReFT is not served",
        "mtl_lora": "multi-task LoRA is not served",
    }
)

HEADS: Final[Mapping[str, type[Fields]]] = MappingProxyType(
    {"classification": HeadFields, "tagging": HeadFields, "causal_lm": LmHeadFields}
)
_HEADS_NOT_SERVED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "multilabel_classification": "its labels are independent, here they are alternatives",
        "question_answering": "spans of an input are not served",
        "multiple_choice": "it compares several inputs",
        "dependency_parsing": "it compares pairs of tokens",
        "image_classification": "a text has no image",
        "seq2seq_lm": "a decoder has no encoder",
        "masked_lm": "a decoder fills no masks",
    }
)

F = TypeVar("F", bound=Fields)


def head_of(config: Mapping[str, object], where: str) -> HeadFields | LmHeadFields:
    """The config of a named head. Raises: AdapterError naming the field at fault."""
    kind = config.get("head_type")
    fields = HEADS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        why = _HEADS_NOT_SERVED.get(str(kind), f"served: {', '.join(HEADS)}")
        raise AdapterError(f"{where}head_type", f"{shown(kind)} is not served: {why}")
    check_known(fields, config, where)
    parsed = parse(fields, config, where)
    if not isinstance(parsed, HeadFields | LmHeadFields):
        raise TypeError(f"{type(parsed).__name__} is no head")
    return parsed


def parse(fields: type[F], config: Mapping[str, object], where: str) -> F:
    """`where` is "" for the file, "config." or "config.configs.{i}." for what is inside."""
    for name, (served, why) in fields.refused.items():
        if name in config and config[name] != served:
            raise AdapterError(where + name, f"{shown(config[name])} is not served: {why}")
    try:
        return fields.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(shown(part).strip("'") for part in first["loc"][:2])
        raise AdapterError(where + path, f"{first['msg']}, got {shown(first['input'])}") from None


def shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def check_known(fields: type[Fields], config: Mapping[str, object], where: str) -> None:
    known = {"architecture", *fields.model_fields, *fields.cosmetic, *fields.refused}
    for name in config:
        if name not in known:
            raise AdapterError(f"{where}{shown(name)[1:-1]}", "is not a field this server knows; it may change the adapter")


def members_of(config: Mapping[str, object], where: str = "config.") -> list[tuple[str, Fields]]:
    """The method configs of an upload, each with its `where`: several in a union."""
    kind = config.get("architecture")
    fields = ARCHITECTURES.get(kind) if kind is None or isinstance(kind, str) else None
    if fields is None or (fields is UnionFields and where != "config."):
        why = _NOT_SERVED.get(str(kind), "served: null (bottleneck), lora, prefix_tuning, and a union of these")
        raise AdapterError(f"{where}architecture", f"{shown(kind)} is not served: {why}")
    check_known(fields, config, where)
    parsed = parse(fields, config, where)
    if not isinstance(parsed, UnionFields):
        return [(where, parsed)]
    inner = ((f"{where}configs.{i}.", member) for i, member in enumerate(parsed.configs))
    return [found for place, member in inner for found in members_of(member, place)]
