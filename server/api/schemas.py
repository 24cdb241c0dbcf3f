"""The shapes of bodies on the wire, requests strict (true is no number, "5" is no 5), answers as clients parse them.

Ranges are not here: rules.py words them as LoRAX does. Unknown fields are ignored, as LoRAX and TGI do.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..tenancy.policy import TenantPolicy


class Strict(BaseModel):
    """A request body. `null` counts as absent for a field that has a default other than null."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


def _or_null(kind: Any, default: Callable[[], object]) -> BeforeValidator:
    """null counts as the default, and the OpenAPI document says that it may stand there."""
    return BeforeValidator(lambda value: default() if value is None else value, json_schema_input_type=kind | None)


def _one_or_several(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return value
    raise ValueError("must be a string or a list of strings")


Flag = Annotated[bool, _or_null(bool, bool)]
Strings = Annotated[list[str], _or_null(list[str], list)]
Numbers = Annotated[list[float], _or_null(list[float], list)]

# -- LoRAX and TGI: requests -----------------------------------------------------------------------------------------


class MergedAdapters(Strict):
    """LoRAX's: which LoRA adapters to merge, and how. Adapters of one rank."""

    ids: list[str]
    weights: Numbers = Field([], description="One per id; none = all 1.")
    merge_strategy: str | None = Field(None, description="linear (null), ties, dare_linear or dare_ties")
    density: float = Field(0.0, description="> 0 and <= 1: the share of values that ties and dare_* keep.")
    majority_sign_method: str | None = Field(None, description="total (null) or frequency")


class GenerateParameters(Strict):
    adapter_id: str | None = Field(None, description="Name of an uploaded adapter; empty or null = the base model.")
    compose: Flag = Field(False, description="With an adapter and a user who has one too: apply both.")
    task_id: int | None = Field(None, description="Which task of a multitask prompt, from 0; such an adapter needs it.")
    do_sample: Flag = Field(False, description="Sample; also implied by temperature, top_k, top_p and typical_p.")
    max_new_tokens: int | None = Field(None, description="> 0; null = as many as the context has room for.")
    temperature: float | None = Field(None, description=">= 0; 0 = greedy.")
    top_k: int | None = Field(None, description="> 0")
    top_p: float | None = Field(None, description="> 0 and <= 1")
    typical_p: float | None = Field(None, description="> 0 and < 1")
    repetition_penalty: float | None = Field(None, description="> 0; 1 = none")
    frequency_penalty: float | None = Field(None, description="-2 to 2; 0 = none")
    presence_penalty: float | None = Field(None, description="-2 to 2; 0 = none")
    seed: int | None = Field(None, description="0 to 2^64 - 1; null = a random one")
    stop: Strings = Field([], description="The generation ends with the first of these that appears.")
    truncate: int | None = Field(None, description="Keep only the last n tokens of the inputs.")
    ignore_eos_token: Flag = Field(False, description="Go on after the model's end-of-sequence token.")
    return_full_text: Flag = Field(False, description="Put the inputs in front of `generated_text`.")
    details: Flag = Field(False, description="Report tokens, log probabilities and why the generation ended.")
    decoder_input_details: Flag = Field(False, description="Report the prompt's tokens too; not when streaming.")
    return_k_alternatives: int | None = Field(None, description="Most likely tokens to report at each position.")
    top_n_tokens: int | None = Field(None, description="TGI's name of `return_k_alternatives`.")
    best_of: int | None = Field(None, description="Only 1.")
    watermark: Flag = Field(False, description="Not supported.")
    adapter_source: str | None = Field(None, description="Not supported: adapters come from this server's store.")
    merged_adapters: MergedAdapters | None = Field(None, description="LoRA adapters made one; not with `adapter_id`.")
    response_format: dict[str, object] | None = Field(None, description="Not supported.")
    grammar: dict[str, object] | None = Field(None, description="Not supported.")


class GenerateRequest(Strict):
    inputs: str
    parameters: Annotated[GenerateParameters, _or_null(GenerateParameters, dict)] = Field(
        default_factory=lambda: GenerateParameters.model_validate({})
    )
    adapter_id: str | None = Field(None, description="Same as `parameters.adapter_id`.")
    task_id: int | None = Field(None, description="Same as `parameters.task_id`.")
    user_id: str | None = Field(None, description="Goes through this user's adapter, if one is bound.")
    stream: Flag = Field(False, description="Answer with server-sent events.")


class TextsParameters(Strict):
    adapter_id: str | None = Field(None, description="Name of an uploaded adapter; empty or null = the base model.")
    compose: Flag = Field(False, description="With an adapter and a user who has one too: apply both.")
    task_id: int | None = Field(None, description="Which task of a multitask prompt, from 0; such an adapter needs it.")
    truncate: int | None = Field(None, description="Keep only the last n tokens of each text.")


class TextsRequest(Strict):
    """What /classify and /embed share."""

    inputs: Annotated[str | list[str], BeforeValidator(_one_or_several)] = Field(description="One text, or 1 to 32.")
    parameters: Annotated[TextsParameters, _or_null(TextsParameters, dict)] = Field(
        default_factory=lambda: TextsParameters.model_validate({})
    )
    adapter_id: str | None = Field(None, description="Same as `parameters.adapter_id`.")
    task_id: int | None = Field(None, description="Same as `parameters.task_id`.")
    user_id: str | None = Field(None, description="Goes through this user's adapter, if one is bound.")


class ClassifyRequest(TextsRequest):
    raw_scores: Flag = Field(False, description="Answer with logits instead of probabilities.")


class EmbedRequest(TextsRequest):
    normalize: bool | None = Field(None, description="Scale each vector to length 1; null = true.")
    pooling: str | None = Field(None, description="mean (null) of the text's tokens, or its last.")


class TokenizeRequest(Strict):
    inputs: str
    add_special_tokens: bool | None = Field(None, description="null = true")


# -- LoRAX and TGI: answers ------------------------------------------------------------------------------------------


class PrefillToken(BaseModel):
    id: int
    text: str
    logprob: float | None


class AlternativeToken(BaseModel):
    id: int
    text: str
    logprob: float


class Token(BaseModel):
    id: int
    text: str
    logprob: float
    special: bool
    alternative_tokens: list[AlternativeToken] | None = None


class StreamDetails(BaseModel):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


class Details(StreamDetails):
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None


class GenerateResponse(BaseModel):
    generated_text: str
    details: Details | None = None


class StreamResponse(BaseModel):
    index: int
    token: Token
    top_tokens: list[Token] | None = None
    generated_text: str | None
    details: StreamDetails | None


class Label(BaseModel):
    label: str
    score: float


class Entity(BaseModel):
    entity: str
    score: float
    index: int = Field(description="Of the token in the text.")
    word: str
    start: int = Field(description="Its first character in the text.")
    end: int


class EmbedResponse(BaseModel):
    embeddings: list[float] | list[list[float]]


class SimpleToken(BaseModel):
    id: int
    text: str
    start: int
    stop: int


class ErrorResponse(BaseModel):
    error: str
    error_type: str


# -- OpenAI: requests ------------------------------------------------------------------------------------------------


class StreamOptions(Strict):
    include_usage: Flag = False


class OpenAIRequest(Strict):
    """What completions and chat completions share, vLLM's and LoRAX's additions included."""

    model: str = Field(description="The base model's name, or an adapter's.")
    temperature: float | None = Field(None, description="null = 1; 0 = greedy.")
    top_p: float | None = None
    top_k: int | None = Field(None, description="-1, 0 or null = off.")
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    n: int | None = Field(None, description="Choices per prompt.")
    stop: str | list[str] | None = None
    stream: Flag = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Goes through this user's adapter, if one is bound.")
    compose: Flag = Field(False, description="With an adapter and a user who has one too: apply both.")
    task_id: int | None = Field(None, description="Which task of a multitask prompt, from 0; such an adapter needs it.")
    ignore_eos: Flag = False
    ignore_eos_token: Flag = False
    logit_bias: dict[str, float] | None = Field(None, description="Not supported.")
    response_format: dict[str, object] | None = Field(None, description='Only {"type": "text"}.')


class CompletionRequest(OpenAIRequest):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, description="null = 16, as OpenAI does.")
    logprobs: int | None = Field(None, description="Alternatives to report per token.")
    echo: Flag = Field(False, description="Put the prompt in front of the text.")
    best_of: int | None = Field(None, description="Only 1 or `n`.")
    suffix: str | None = Field(None, description="Not supported.")


class ContentPart(Strict):
    type: str
    text: str | None = None


class ChatMessage(Strict):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None


class ChatRequest(OpenAIRequest):
    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: Flag = False
    top_logprobs: int | None = None
    tools: list[dict[str, object]] | None = Field(None, description="Not supported.")


# -- adapters and users ----------------------------------------------------------------------------------------------


class AdapterResponse(BaseModel):
    """One version of one adapter."""

    adapter_id: str
    version: int
    digest: str
    method: str
    parts: list[str]
    size_bytes: int
    created_at: datetime
    state: str = Field(description="stored, loading, resident, or failed(reason)")
    shared: bool = Field(description="Whether all tenants may use it.")
    details: dict[str, object]


class AdapterList(BaseModel):
    adapters: list[AdapterResponse]
    next_cursor: str | None = None


class UserRequest(Strict):
    adapter_id: str


class UserResponse(BaseModel):
    user_id: str
    adapter_id: str
    updated_at: datetime


class UserList(BaseModel):
    users: list[UserResponse]
    next_cursor: str | None = None


class Health(BaseModel):
    status: str


class Ready(BaseModel):
    phase: Literal["loading", "ready", "draining", "stopped"]
    percent: float


class OpenAIError(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorResponse(BaseModel):
    error: OpenAIError


# -- operators ---------------------------------------------------------------------------------------------------------


class PolicyRequest(TenantPolicy):
    """A tenant's whole policy; what is left out is the server's own limit."""

    model_config = ConfigDict(strict=True)


class TenantResponse(BaseModel):
    name: str
    policy: dict[str, object]
    created_at: datetime


class TenantList(BaseModel):
    tenants: list[TenantResponse]


class KeyRequest(Strict):
    tenant: str
    scopes: list[str] = Field(description="Of infer, adapters, admin.")
    note: str = ""


class KeyResponse(BaseModel):
    id: str
    tenant: str
    scopes: list[str]
    note: str
    created_at: datetime
    revoked_at: datetime | None


class NewKeyResponse(KeyResponse):
    key: str = Field(description="The key itself: the only time that it is shown.")


class KeyList(BaseModel):
    keys: list[KeyResponse]
