"""What a bench run is asked to do: every knob with its default and help text, checked in one place before any work.

Owns no behaviour beyond the checks. The command line makes its flags from these fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, get_args, get_type_hints
from urllib.parse import urlsplit

from ..errors import AdapterdError
from ..settings import Settings

Popularity = Literal["distinct", "uniform", "zipf", "identical"]
Scenario = Literal[
    "load",
    "base-vs-adapters",
    "many-adapters",
    "prefill-while-decoding",
    "noisy-neighbour",
    "weights",
    "many-registered",
    "cold-start",
]
Family = Literal["lora", "ia3", "bitfit", "bottleneck", "prefix_tuning", "prompt_tuning", "p_tuning", "trainable_tokens"]
Precision = Literal["bf16", "fp32"]

FAMILIES: Final[tuple[str, ...]] = get_args(Family)
DEFAULT_MODEL: Final[str] = Settings.model_fields["model"].default


class BenchError(AdapterdError):
    """The bench cannot go on; the message says what to change."""

    error_type = "bench"


@dataclass(frozen=True)
class BenchOptions:
    """One bench run. A field's name is its flag (`prompt_tokens` is `--prompt-tokens`), `help()` says what it does."""

    url: Annotated[str, "The running server."] = "http://127.0.0.1:8080"
    api_key: Annotated[
        str | None,
        "Sent as a bearer token; it must be allowed to upload adapters, or, for scenarios of several tenants without "
        "`api_keys`, to administer: then the bench makes the tenants and their keys, and removes them at the end.",
    ] = None
    api_keys: Annotated[
        tuple[str, ...],
        "Keys of the tenants of noisy-neighbour (victim, attacker) and weights (1, 2, 4), with commas between; "
        "each must be allowed to upload adapters.",
    ] = ()
    offline: Annotated[
        bool,
        "Measure the engine in this process, without a server and HTTP: base and adapters interleaved, and the step "
        "against the floor that this machine's memory sets.",
    ] = False
    sweep: Annotated[
        bool, "With --offline: also at 1, 2, 4 ... distinct adapters, and at 1, 2, 4 ... rows, up to those asked for."
    ] = False
    model: Annotated[str, "With --offline: the base model, a local directory, a Hub id or a short name."] = DEFAULT_MODEL
    native: Annotated[bool, "With --offline: use the native CPU kernels where they can be had."] = True
    scenario: Annotated[
        Scenario,
        "load = one run of the offered load; base-vs-adapters = base and adapters interleaved, and their ratio; "
        "many-adapters = upload and use one adapter after the other, and report memory; "
        "prefill-while-decoding = a long prompt beside streams, and how much each delays the other; "
        "noisy-neighbour = a tenant at 30% of capacity alone and beside one that offers ten times its share; "
        "weights = three backlogged tenants of weights 1, 2 and 4, and what each was served; "
        "many-registered = --registered adapters of Zipf popularity against --adapters of them, and streams beside loads; "
        "cold-start = time to first token through an adapter that is only in the store, against a resident one.",
    ] = "load"
    versus_peft: Annotated[
        bool, "Compare with PEFT's generate(adapter_names=...) in this process, interleaved with the server. LoRA only."
    ] = False
    concurrency: Annotated[int, "Requests in flight at once; rows of the batch with --versus-peft and --offline."] = 8
    requests: Annotated[int, "Requests per run."] = 32
    prompt_tokens: Annotated[int, "Length of every prompt, exactly; special tokens that the server adds count."] = 128
    long_prompt_tokens: Annotated[
        int, "Length of the prompt beside streams, with prefill-while-decoding; of the attacker's, with noisy-neighbour."
    ] = 512
    max_new_tokens: Annotated[int, "Tokens to generate per request; the end-of-sequence token is ignored."] = 64
    adapters: Annotated[int, "Random adapters to upload and use; 0 = the base model only."] = 8
    registered: Annotated[int, "Adapters that are uploaded, with --scenario many-registered."] = 2000
    keep: Annotated[
        bool, "Leave the adapters of many-registered on the server; the next run of the same shape uses them again."
    ] = False
    families: Annotated[tuple[Family, ...], "Families of the adapters, in turn."] = ("lora",)
    rank: Annotated[int, "Rank of LoRA adapters, on all linear layers but the output head."] = 16
    precision: Annotated[
        Precision, "Of the adapters' weights. LoRA of bf16 precision is held in bf16, at half the bytes and the same values."
    ] = "bf16"
    virtual_tokens: Annotated[int, "Positions of prefix tuning, prompt tuning and P-tuning adapters."] = 16
    popularity: Annotated[
        Popularity,
        "Which adapter a request uses: distinct = each in turn, uniform = a random one, "
        "zipf = a random one of Zipf-1.5 popularity, identical = all the same.",
    ] = "distinct"
    repeats: Annotated[int, "Rounds of a comparison; medians and spread are over rounds."] = 5
    seconds: Annotated[float, "Measured time of each phase that goes by the clock: noisy-neighbour, weights."] = 15.0
    warmup: Annotated[bool, "Send a short request through each adapter first, so that loading is not measured."] = True
    seed: Annotated[int | None, "Of prompts, adapters and popularity; unset = a new one, which no cache knows."] = None
    base: Annotated[
        Path | None, "With --versus-peft: the directory of the server's base model; unset = looked up by its name."
    ] = None
    timeout: Annotated[float, "Seconds a request may take."] = 600.0

    @classmethod
    def help(cls) -> dict[str, str]:
        """Field -> help text, in the order of the fields."""
        return {name: hint.__metadata__[0] for name, hint in get_type_hints(cls, include_extras=True).items()}

    def check(self) -> None:
        """Raises: BenchError naming the first field that is wrong, its rule and its value."""
        for name, rule, holds in _RULES:
            value = getattr(self, name)
            if not holds(value):
                raise BenchError(f"`{name}` must be {rule}. Given: {value!r}")
        for family in self.families:
            if family not in FAMILIES:
                raise BenchError(f"`families` may name {', '.join(FAMILIES)}. Given: {family!r}")
        if self.adapters == 0 and (self.scenario in _THROUGH_ADAPTERS or self.versus_peft):
            raise BenchError("`adapters` must be > 0 for a comparison. Given: 0")
        self._check_tenants()
        if self.versus_peft:
            self._check_versus_peft()
        if self.offline:
            self._check_offline()
        elif self.sweep:
            raise BenchError("`sweep` goes with `offline` only")

    def _check_tenants(self) -> None:
        count = TENANTS.get(self.scenario, 0)
        if self.api_keys and len(self.api_keys) != count:
            raise BenchError(f"`api_keys` must be {count} keys with --scenario {self.scenario}. Given: {len(self.api_keys)}")
        if count and not self.api_keys and self.api_key is None:
            raise BenchError(f"`api_keys` must be {count} keys, or `api_key` one that may administer. Given: neither")

    def _check_offline(self) -> None:
        if self.scenario != "load" or self.versus_peft:
            raise BenchError("`offline` is a scenario of its own; leave out `scenario` and `versus_peft`")
        if self.popularity not in ("distinct", "identical"):
            raise BenchError(f"`popularity` must be distinct or identical with `offline`. Given: {self.popularity!r}")

    def _check_versus_peft(self) -> None:
        if self.scenario != "load":
            raise BenchError(f"`versus_peft` is a scenario of its own; leave out `scenario`. Given: {self.scenario!r}")
        if set(self.families) != {"lora"}:
            raise BenchError(f"`families` must be lora with `versus_peft`: PEFT mixes no other. Given: {self.families!r}")


#: Scenario -> how many tenants it needs.
TENANTS: Final[Mapping[str, int]] = MappingProxyType({"noisy-neighbour": 2, "weights": 3})
_THROUGH_ADAPTERS: Final = ("base-vs-adapters", "many-adapters", "noisy-neighbour", "many-registered", "cold-start")


def _between(low: int, high: int) -> tuple[str, Callable[[Any], bool]]:
    return f"{low} to {high}", lambda value: isinstance(value, int) and low <= value <= high


def _one_of(choices: object) -> tuple[str, Callable[[Any], bool]]:
    allowed = get_args(choices)
    return f"one of {', '.join(allowed)}", lambda value: value in allowed


def _is_url(value: str) -> bool:
    parts = urlsplit(value)
    return parts.scheme in ("http", "https") and bool(parts.hostname)


#: Field, rule in words, rule as code; the upper bounds keep a slip of the keyboard from filling a disk.
_RULES: Final[tuple[tuple[str, str, Callable[[Any], bool]], ...]] = (
    ("url", "an http:// or https:// address", _is_url),
    ("scenario", *_one_of(Scenario)),
    ("popularity", *_one_of(Popularity)),
    ("precision", *_one_of(Precision)),
    ("concurrency", *_between(1, 4096)),
    ("requests", *_between(1, 1_000_000)),
    ("prompt_tokens", *_between(2, 1_000_000)),
    ("long_prompt_tokens", *_between(2, 1_000_000)),
    ("max_new_tokens", *_between(1, 1_000_000)),
    ("adapters", *_between(0, 100_000)),
    ("registered", *_between(1, 100_000)),
    ("families", "one family at least", lambda value: len(value) > 0),
    ("rank", *_between(1, 4096)),
    ("virtual_tokens", *_between(1, 65536)),
    ("repeats", *_between(1, 1000)),
    ("seconds", "a number of seconds > 0", lambda value: isfinite(value) and value > 0),
    ("timeout", "a number of seconds > 0", lambda value: isfinite(value) and value > 0),
)
