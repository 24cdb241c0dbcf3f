"""What crosses the engine's border: requests in, events out. Plain data; no torch, no HTTP, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

from adapters_store.digest import Digest

from .errors import AdapterdError
from .recipes import Recipe
from .tenancy.policy import OPEN, TenantPolicy

#: What a request wants. All but `generate` end after the prefill, with `Event.scores` and no token.
#:     classify  the logits of its adapter's head, one row per text (SEQ_CLS) or per prompt token (TOKEN_CLS)
#:     embed     one row: the final hidden state, pooled as `Request.pooling` says
#:     score     one row: the logprobs of `Request.choices` as the token after the prompt
Task = Literal["generate", "classify", "embed", "score"]


class FinishReason(StrEnum):
    SCORED = "scored"  # a task that generates nothing is done
    LENGTH = "length"
    EOS = "eos_token"
    STOP = "stop_sequence"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request picks its tokens. `None` (or the neutral value) switches a rule off.

    greedy when `do_sample` is false; every number is validated before it gets here.
    """

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0  # always set; the API draws one when the client gives none
    ignore_eos: bool = False
    top_n: int = 0  # alternatives to report per token
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One unit of work. `adapters` are content digests (empty = base model only), applied together."""

    id: str
    tenant: str
    adapters: tuple[Digest, ...]
    prompt: tuple[int, ...]
    sampling: Sampling
    arrival: float = 0.0  # time.monotonic() when it was accepted, seconds
    task: Task = "generate"
    pooling: Literal["last", "mean"] = "mean"  # of task "embed"; a head has its own
    choices: tuple[int, ...] = ()  # of task "score": token ids
    recipes: tuple[Recipe, ...] = ()  # of those `adapters` that no store holds: how each is computed
    policy: TenantPolicy = OPEN  # the tenant's weight and quotas when the request was accepted


class Token(NamedTuple):  # as Event: made for every row of every step, where a frozen dataclass takes twice as long
    """One sampled (or, in `Event.prompt`, one given) token. `logprob` is None for a prompt's first token."""

    id: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


class Event(NamedTuple):
    """Progress of one request. Every accepted request gets exactly one event with `finish` set, and none after it."""

    request_id: str
    tokens: tuple[Token, ...] = ()
    finish: FinishReason | None = None
    error: AdapterdError | None = None  # set iff finish is ERROR
    prompt: tuple[Token, ...] = ()  # with the first token, when prompt_logprobs was asked for
    cached_tokens: int = 0  # prompt positions that came from the prefix cache
    computed_tokens: int = 0  # with finish: prompt positions that were computed for it, and tokens it was given
    queue_seconds: float | None = None  # on the first event: time from arrival to the first step
    scores: tuple[tuple[float, ...], ...] = ()  # with finish SCORED: rows of finite numbers, see Task
