"""The ranges of sampling parameters, in LoRAX's and TGI's words. Pure: a body's values in, a `Sampling` out."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from ..errors import ValidationError
from ..requests import Sampling
from .body import shown
from .context import Limits
from .schemas import CompletionRequest, GenerateParameters, OpenAIRequest

_COLDEST = 1e-5  # a temperature below this is greedy: dividing by it overflows
_SEEDS = 1 << 64

_UNSUPPORTED = ("adapter_source", "response_format", "grammar", "watermark")


@dataclass(frozen=True, slots=True)
class Wish:
    """Sampling as a client put it, whichever the wire format; `None` = not given."""

    sampled: bool  # whether the format samples when no other field says so
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    ignore_eos: bool = False
    top_n: int = 0
    prompt_logprobs: bool = False


def check_generate(parameters: GenerateParameters, limits: Limits, *, streaming: bool) -> None:
    """The rules of /generate that are not about numbers of `Sampling`. Raises: ValidationError."""
    for name in _UNSUPPORTED:
        if getattr(parameters, name):
            raise ValidationError(f"`{name}` is not supported")
    if parameters.best_of not in (None, 1):
        if streaming:
            raise ValidationError("`best_of` != 1 is not supported when streaming tokens")
        raise ValidationError(f"`best_of` must be > 0 and <= 1. Given: {shown(parameters.best_of)}")
    if parameters.decoder_input_details and streaming:
        raise ValidationError("`decoder_input_details` == true is not supported when streaming tokens")
    if parameters.truncate is not None and not 0 < parameters.truncate < limits.max_total_tokens:
        raise ValidationError(
            f"`truncate` must be strictly positive and less than {limits.max_total_tokens}. Given: {shown(parameters.truncate)}"
        )


def generate_wish(parameters: GenerateParameters, limits: Limits) -> Wish:
    """Raises: ValidationError for a number of alternatives out of range."""
    return Wish(
        sampled=parameters.do_sample,
        temperature=parameters.temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        typical_p=parameters.typical_p,
        repetition_penalty=parameters.repetition_penalty,
        frequency_penalty=parameters.frequency_penalty,
        presence_penalty=parameters.presence_penalty,
        seed=parameters.seed,
        ignore_eos=parameters.ignore_eos_token,
        top_n=_alternatives(parameters, limits),
        prompt_logprobs=parameters.decoder_input_details,
    )


def openai_wish(request: OpenAIRequest, *, top_n: int) -> Wish:
    """OpenAI samples at temperature 1 unless told otherwise; vLLM's -1 and 0 switch top_k off."""
    return Wish(
        sampled=True,
        temperature=request.temperature,
        top_k=None if request.top_k in (-1, 0) else request.top_k,
        top_p=request.top_p,
        typical_p=request.typical_p,
        repetition_penalty=request.repetition_penalty,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        seed=request.seed,
        ignore_eos=request.ignore_eos or request.ignore_eos_token,
        top_n=top_n,
    )


def sampling_of(wish: Wish, max_new_tokens: int) -> Sampling:
    """Raises: ValidationError naming the field and its range."""
    _check_truncations(wish)
    _check_penalties(wish)
    if wish.seed is not None and not 0 <= wish.seed < _SEEDS:
        raise ValidationError(f"`seed` must be >= 0 and < 2^64. Given: {shown(wish.seed)}")
    given = (wish.temperature, wish.top_k, wish.top_p, wish.typical_p)
    temperature = 1.0 if wish.temperature is None else wish.temperature
    return Sampling(
        max_new_tokens=max_new_tokens,
        do_sample=(wish.sampled or any(value is not None for value in given)) and temperature >= _COLDEST,
        temperature=max(temperature, _COLDEST),
        top_k=wish.top_k,
        top_p=None if wish.top_p == 1 else wish.top_p,
        typical_p=wish.typical_p,
        repetition_penalty=1.0 if wish.repetition_penalty is None else wish.repetition_penalty,
        frequency_penalty=wish.frequency_penalty or 0.0,
        presence_penalty=wish.presence_penalty or 0.0,
        seed=secrets.randbits(64) if wish.seed is None else wish.seed,
        ignore_eos=wish.ignore_eos,
        top_n=wish.top_n,
        prompt_logprobs=wish.prompt_logprobs,
    )


def check_max_new_tokens(value: int | None) -> int | None:
    if value is not None and value <= 0:
        raise ValidationError("`max_new_tokens` must be strictly positive")
    return value


def check_stop(stop: list[str], limits: Limits) -> tuple[str, ...]:
    if len(stop) > limits.max_stop_sequences:
        raise ValidationError(f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {len(stop)}")
    if "" in stop:
        raise ValidationError("`stop` sequences cannot be empty")
    return tuple(stop)


def check_choices(request: OpenAIRequest, limit: int) -> int:
    """How many choices a prompt gets."""
    count = 1 if request.n is None else request.n
    if not 1 <= count <= limit:
        raise ValidationError(f"`n` must be > 0 and <= {limit}. Given: {shown(count)}")
    if isinstance(request, CompletionRequest) and request.best_of not in (None, count):
        raise ValidationError(f"`best_of` must equal `n`. Given: {shown(request.best_of)}")
    return count


def check_top_n(name: str, value: int, limits: Limits) -> int:
    if not 0 <= value <= limits.max_top_n:
        raise ValidationError(f"`{name}` must be >= 0 and <= {limits.max_top_n}. Given: {shown(value)}")
    return value


def _alternatives(parameters: GenerateParameters, limits: Limits) -> int:
    wanted = parameters.return_k_alternatives
    if wanted is None:
        return check_top_n("top_n_tokens", parameters.top_n_tokens or 0, limits)
    if wanted <= 0:
        raise ValidationError("`return_k_alternatives` must be strictly positive")
    return check_top_n("return_k_alternatives", wanted, limits)


def _check_truncations(wish: Wish) -> None:
    if wish.temperature is not None and wish.temperature < 0:
        raise ValidationError("`temperature` must be non-negative")
    if wish.top_k is not None and wish.top_k <= 0:
        raise ValidationError("`top_k` must be strictly positive")
    if wish.top_p is not None and not 0 < wish.top_p <= 1:
        raise ValidationError("`top_p` must be > 0.0 and <= 1.0")
    if wish.typical_p is not None and not 0 < wish.typical_p < 1:
        raise ValidationError("`typical_p` must be > 0.0 and < 1.0")


def _check_penalties(wish: Wish) -> None:
    if wish.repetition_penalty is not None and wish.repetition_penalty <= 0:
        raise ValidationError("`repetition_penalty` must be strictly positive")
    for name in ("frequency_penalty", "presence_penalty"):
        value = getattr(wish, name)
        if value is not None and not -2 <= value <= 2:
            raise ValidationError(f"`{name}` must be >= -2.0 and <= 2.0")
