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
Ids = Annotated[list[int], Field(max_length=1 << 16)]
#: A list of module name suffixes, or a regular expression, which only RE2 runs (`pattern.py`).
Modules = Annotated[frozenset[str], Strict(False), Field(max_length=4096)] | str | None
#: Endings of module names, of modules that are stored whole.
Names = Annotated[list[str], Field(max_length=4096)] | None
#: Ids whose rows are trained: of the input embedding, or by the ending of a module's name.
TokenIds = Ids | dict[str, Ids] | None
#: Names of the list of layers, each a regular expression.
LayersPattern = Annotated[list[str], Field(max_length=64)] | str | None


class Fields(BaseModel):
    """The honoured fields of one peft_type. Unknown fields are ignored, as PEFT does."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    peft_type: str


class SavedFields(Fields):
    """What may be stored whole beside any adapter; `peft_saved.py` reads it, whatever the adapter."""

    modules_to_save: Names = None


class LoraFields(SavedFields):
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
    layers_pattern: LayersPattern = None
    ensure_weight_tying: bool | None = None
    use_dora: bool | None = None
    trainable_token_indices: TokenIds = None


class AdaLoraFields(SavedFields):
    init_r: Count = 12
    lora_alpha: Alpha = 8
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: dict[str, list[bool]] | None = None
    target_modules: Modules = None
    exclude_modules: Modules = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: LayersPattern = None
    ensure_weight_tying: bool | None = None
    trainable_token_indices: TokenIds = None


class VeraFields(SavedFields):
    r: Count = 256
    save_projection: bool = True
    bias: Literal["none", "all", "vera_only"] = "none"
    target_modules: Modules = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: LayersPattern = None


class IA3Fields(SavedFields):
    target_modules: Modules = None
    exclude_modules: Modules = None
    feedforward_modules: Modules = None


class LnTuningFields(SavedFields):
    target_modules: Modules = None
    exclude_modules: Modules = None


class BeftFields(SavedFields):
    target_modules: Modules = None


class TrainableTokensFields(Fields):
    token_indices: Ids = []
    target_modules: Modules = None


class PrefixFields(SavedFields):
    """Prefix tuning: the sizes are compared with the base by the method."""

    num_virtual_tokens: Count
    num_layers: Count | None = None
    token_dim: Count | None = None
    num_attention_heads: Count | None = None


class PromptFields(PrefixFields):
    """Prompt tuning and P-tuning, which store `num_virtual_tokens` rows for each submodule."""

    num_transformer_submodules: Count | None = None


class MultitaskFields(PromptFields):
    num_tasks: Count = 1
    num_ranks: Count = 1


class CptFields(PrefixFields):
    cpt_token_ids: Ids | None = None
    cpt_mask: Ids | None = None
    cpt_tokens_type_mask: Ids | None = None


class DiscreteFields(Fields):
    """This server's own format of a discrete prompt: {label: [words]} beside the template."""

    template: str
    verbalizer: dict[str, list[str]] | None = None


class LabelFields(Fields):
    """What the config of a SEQ_CLS or TOKEN_CLS file may be given by hand: PEFT writes neither."""

    num_labels: Count | None = None
    id2label: dict[str, str] | None = None


class HeadFields(LabelFields):
    """This server's own format of a head on its own."""

    task_type: Literal["SEQ_CLS", "TOKEN_CLS"]
    pooling: str | None = None
    hidden: Count | None = None  # rows of dense.weight
    activation: str | None = None


class BitFitFields(Fields):
    """This server's own format: nothing but the peft_type."""


#: base_model_name_or_path: shapes decide. auto_mapping names a module to import: never looked at.
_COMMON_COSMETIC: Final = frozenset({"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"})
HEAD_TASKS: Final = ("SEQ_CLS", "TOKEN_CLS")  # the file holds a classifier too
_TASKS: Final = (None, "CAUSAL_LM", *HEAD_TASKS)
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
#: too. megatron_core, *_group_size: without effect unless a refused field is set.
_LORA_COSMETIC: Final = frozenset(
    {
        "eva_config",
        "fan_in_fan_out",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    }
)
#: The schedule and the loss of the training; AdaLoRA scales by `lora_alpha` and `init_r` alone.
_ADALORA_COSMETIC: Final = frozenset(
    {
        "alpha_pattern",
        "beta1",
        "beta2",
        "deltaT",
        "lora_bias",
        "orth_reg_weight",
        "r",
        "target_r",
        "tfinal",
        "tinit",
        "total_step",
        "use_rslora",
    }
)
#: projection_prng_key: the projections are read from the file, never drawn again.
_VERA_COSMETIC: Final = frozenset({"d_initial", "fan_in_fan_out", "init_weights", "projection_prng_key", "vera_dropout"})
_PROMPT_REFUSED: Final = _refused("task_type")
#: An encoder and a decoder: PEFT itself runs no prefix tuning or CPT of two on a decoder.
_ONE_SUBMODULE: Final = {"num_transformer_submodules": (None, 1)}
#: Fields of the encoder that was applied when the file was saved, or of an initialisation that is over.
_PREFIX_COSMETIC: Final = frozenset({"encoder_hidden_size", "init_weights", "prefix_projection"})
_SOFT_COSMETIC: Final = frozenset(
    {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"}
)
#: Where the training started: the file's own tensors are what came of it.
_MULTITASK_COSMETIC: Final = frozenset({"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"})
#: The loss and the projection of the delta, both of the training.
_CPT_COSMETIC: Final = frozenset(
    {
        "opt_loss_decay_factor",
        "opt_projection_epsilon",
        "opt_projection_format_epsilon",
        "opt_weighted_loss_type",
        "tokenizer_name_or_path",
    }
)
_ENCODER_COSMETIC: Final = frozenset(
    {"encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"}
)

CLASSES: Final[Mapping[str, Classes]] = MappingProxyType(
    {
        "LORA": Classes(
            LoraFields,
            _COMMON_COSMETIC | _LORA_COSMETIC,
            {field: values for field, values in SEMANTIC.items() if field not in ("enable_lora", *LoraFields.model_fields)},
        ),
        "ADALORA": Classes(
            AdaLoraFields,
            _COMMON_COSMETIC | _LORA_COSMETIC | _ADALORA_COSMETIC,
            {field: values for field, values in SEMANTIC.items() if field not in ("enable_lora", *AdaLoraFields.model_fields)},
        ),
        "VERA": Classes(VeraFields, _COMMON_COSMETIC | _VERA_COSMETIC, _refused("task_type")),
        "IA3": Classes(IA3Fields, _COMMON_COSMETIC | {"fan_in_fan_out", "init_ia3_weights"}, _refused("task_type")),
        "LN_TUNING": Classes(LnTuningFields, _COMMON_COSMETIC, _refused("task_type")),
        "BEFT": Classes(BeftFields, _COMMON_COSMETIC | {"init_weights"}, _refused("task_type")),
        "TRAINABLE_TOKENS": Classes(TrainableTokensFields, _COMMON_COSMETIC | {"init_weights"}, _refused("task_type")),
        "HEAD": Classes(HeadFields, _COMMON_COSMETIC, {}),
        "BITFIT": Classes(BitFitFields, _COMMON_COSMETIC, _refused("task_type")),
        "PREFIX_TUNING": Classes(PrefixFields, _COMMON_COSMETIC | _PREFIX_COSMETIC, {**_PROMPT_REFUSED, **_ONE_SUBMODULE}),
        "PROMPT_TUNING": Classes(PromptFields, _COMMON_COSMETIC | _SOFT_COSMETIC, _PROMPT_REFUSED),
        "P_TUNING": Classes(PromptFields, _COMMON_COSMETIC | _ENCODER_COSMETIC, _PROMPT_REFUSED),
        "MULTITASK_PROMPT_TUNING": Classes(
            MultitaskFields, _COMMON_COSMETIC | _SOFT_COSMETIC | _MULTITASK_COSMETIC, _PROMPT_REFUSED
        ),
        "CPT": Classes(CptFields, _COMMON_COSMETIC | _CPT_COSMETIC, {"task_type": ("CAUSAL_LM",), **_ONE_SUBMODULE}),
        "DISCRETE_PROMPT": Classes(DiscreteFields, _COMMON_COSMETIC, _refused("task_type")),
    }
)

F = TypeVar("F", bound=Fields)


def refuse_unserved(kind: str, config: Mapping[str, object]) -> None:
    """Raises: AdapterError naming the first field that asks for something that is not served."""
    classes = CLASSES[kind]
    for field, allowed in {**SEMANTIC, **classes.refused}.items():
        if field in classes.honoured:
            continue
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
