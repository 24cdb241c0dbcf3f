"""Which config fields of PEFT mean what here: honoured, cosmetic, or refused unless they have a listed value.

Every field of every dataclass PEFT writes for a served peft_type is in exactly one of the three (a test holds the tables
against PEFT's own classes). Reads no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from ..errors import AdapterError

Count = Annotated[int, Field(ge=1, le=1 << 31)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]
#: A list of module name suffixes, or a regular expression, which is never run.
Modules = Annotated[frozenset[str], Strict(False), Field(max_length=4096)] | str | None


class Fields(BaseModel):
    """The honoured fields of one peft_type. Unknown fields are ignored, as PEFT does."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    peft_type: str


class LoraFields(Fields):
    r: Count = 8
    lora_alpha: Alpha = 8
    use_rslora: bool | None = None
    lora_bias: bool | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    target_modules: Modules = None
    exclude_modules: Modules = None
    layers_to_transform: list[int] | int | None = None


class IA3Fields(Fields):
    target_modules: Modules = None
    exclude_modules: Modules = None
    feedforward_modules: Modules = None


class PromptFields(Fields):
    """Prefix tuning, prompt tuning and P-tuning: the sizes are compared with the base by the method."""

    num_virtual_tokens: Count
    num_layers: Count | None = None
    token_dim: Count | None = None
    num_attention_heads: Count | None = None


class BitFitFields(Fields):
    """This server's own format: nothing but the peft_type."""


#: base_model_name_or_path: shapes decide. auto_mapping names a module to import: never looked at.
_COMMON_COSMETIC: Final = frozenset({"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"})
_TASKS: Final = (None, "CAUSAL_LM")
_OFF: Final = (None, False)
_NONE: Final[tuple[object, ...]] = (None, [])

#: Fields that change what a LoRA computes, with the values at which they do not. They are refused for every peft_type.
SEMANTIC: Final[Mapping[str, tuple[object, ...]]] = MappingProxyType(
    {
        "task_type": _TASKS,
        "modules_to_save": _NONE,
        "use_dora": _OFF,
        "use_qalora": _OFF,
        "use_bdlora": _OFF,
        "layer_replication": _NONE,
        "target_parameters": _NONE,
        "trainable_token_indices": (None, [], {}),
        "alora_invocation_tokens": (None,),
        "arrow_config": (None,),
        "velora_config": (None,),
        "monteclora_config": (None,),
        "kasa_config": (None,),
        "megatron_config": (None,),
        # The initialisations left out here change the base's weights, which are shared by every tenant.
        "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
        "loftq_config": (None, {}),
        "corda_config": (None,),
        "lora_ga_config": (None,),
        "enable_lora": (None,),  # PEFT before 0.3: parts of a fused projection
    }
)


@dataclass(frozen=True)
class Classes:
    """How the config fields of one peft_type are classified."""

    model: type[Fields]
    cosmetic: frozenset[str]
    refused: Mapping[str, tuple[object, ...]]

    @property
    def honoured(self) -> frozenset[str]:
        return frozenset(self.model.model_fields)


def _refused(*fields: str) -> Mapping[str, tuple[object, ...]]:
    return {field: SEMANTIC[field] for field in fields}


#: fan_in_fan_out: A and B are stored the same way round for Conv1D. dropout: training only. runtime_config: PEFT drops it
#: too. layers_pattern, ensure_weight_tying, megatron_core, *_group_size: without effect unless a refused field is set.
_LORA_COSMETIC: Final = frozenset(
    {
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "layers_pattern",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    }
)
_PROMPT_REFUSED: Final = {**_refused("task_type", "modules_to_save"), "num_transformer_submodules": (None, 1)}
#: Fields of the encoder that was applied when the file was saved, or of an initialisation that is over.
_PREFIX_COSMETIC: Final = frozenset({"encoder_hidden_size", "init_weights", "prefix_projection"})
_SOFT_COSMETIC: Final = frozenset(
    {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"}
)
_ENCODER_COSMETIC: Final = frozenset(
    {"encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"}
)

CLASSES: Final[Mapping[str, Classes]] = MappingProxyType(
    {
        "LORA": Classes(
            LoraFields,
            _COMMON_COSMETIC | _LORA_COSMETIC,
            {field: values for field, values in SEMANTIC.items() if field != "enable_lora"},
        ),
        "IA3": Classes(
            IA3Fields,
            _COMMON_COSMETIC | {"fan_in_fan_out", "init_ia3_weights"},
            _refused("task_type", "modules_to_save"),
        ),
        "BITFIT": Classes(BitFitFields, _COMMON_COSMETIC, _refused("task_type")),
        "PREFIX_TUNING": Classes(PromptFields, _COMMON_COSMETIC | _PREFIX_COSMETIC, _PROMPT_REFUSED),
        "PROMPT_TUNING": Classes(PromptFields, _COMMON_COSMETIC | _SOFT_COSMETIC, _PROMPT_REFUSED),
        "P_TUNING": Classes(PromptFields, _COMMON_COSMETIC | _ENCODER_COSMETIC, _PROMPT_REFUSED),
    }
)

F = TypeVar("F", bound=Fields)


def refuse_unserved(kind: str, config: Mapping[str, object]) -> None:
    """Raises: AdapterError naming the first field that asks for something that is not served."""
    for field, allowed in {**SEMANTIC, **CLASSES[kind].refused}.items():
        value = config.get(field)
        if not any(type(value) is type(other) and value == other for other in allowed):
            served = ", ".join(shown_value(other) for other in allowed)
            raise AdapterError(field, f"{shown_value(value)} is not served; served: {served}")


def parse_fields(model: type[F], config: Mapping[str, object]) -> F:
    """Raises: AdapterError naming the first field of the wrong type."""
    try:
        return model.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        got = "" if first["type"] == "missing" else f", got {shown_value(first['input'])}"
        raise AdapterError(str(first["loc"][0]), f"{first['msg']}{got}") from None


def shown_value(value: object) -> str:
    """A config value in a message: printable and short."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
