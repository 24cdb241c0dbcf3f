"""`merged_adapters`: LoRAX's parameter, checked in LoRAX's words, as a recipe over the records its ids stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar, get_args

from adapters_store.records import AdapterRecord

from ..errors import ValidationError
from ..recipes import Merge, SignMethod, Strategy
from .body import shown
from .schemas import MergedAdapters

_MOST: Final = 16  # adapters in one merge: all are in memory while it is computed
_STRATEGIES: Final[tuple[Strategy, ...]] = get_args(Strategy)
_SIGN_METHODS: Final[tuple[SignMethod, ...]] = get_args(SignMethod)


Choice = TypeVar("Choice", bound=str)


@dataclass(frozen=True, slots=True)
class Combination:
    """A merge as a client put it, every field checked; the names are not looked up yet."""

    ids: tuple[str, ...]
    weights: tuple[float, ...]
    strategy: Strategy
    density: float
    majority_sign_method: SignMethod

    def recipe(self, records: Sequence[AdapterRecord]) -> Merge:
        """`records` are what `ids` stand for. Raises: ValidationError naming the adapter that is not LoRA alone."""
        for record in records:
            others = sorted(set(record.parts) - {"lora"})
            if others:
                raise ValidationError(f"`merged_adapters`: {record.name!r} holds {', '.join(others)}; only LoRA can be merged")
        digests = tuple(record.digest for record in records)
        return Merge(digests, self.weights, self.strategy, self.density, self.majority_sign_method)


def check_merged(given: MergedAdapters | None, adapter_id: str | None) -> Combination | None:
    """Raises: ValidationError naming the field and its range."""
    if given is None:
        return None
    if adapter_id is not None:
        raise ValidationError("at most one of `adapter_id` or `adapters` may be provided")
    if not given.ids:
        raise ValidationError("at least one adapter ID must be provided when setting `adapters`")
    if len(given.ids) > _MOST:
        raise ValidationError(f"`merged_adapters` supports up to {_MOST} adapters. Given: {len(given.ids)}")
    if given.weights and len(given.weights) != len(given.ids):
        raise ValidationError("number of adapter IDs must match number of adapter weights")
    strategy = _one_of("merge_strategy", given.merge_strategy, _STRATEGIES)
    return Combination(
        ids=tuple(given.ids),
        weights=tuple(given.weights) or (1.0,) * len(given.ids),
        strategy=strategy,
        density=_density(given.density, strategy),
        majority_sign_method=_one_of("majority_sign_method", given.majority_sign_method, _SIGN_METHODS),
    )


def _one_of(field: str, given: str | None, choices: tuple[Choice, ...]) -> Choice:
    """The first choice where none is given; case does not matter, as in LoRAX."""
    if given is None:
        return choices[0]
    found = next((choice for choice in choices if choice == given.lower()), None)
    if found is None:
        raise ValidationError(f"`{field}` must be one of {', '.join(choices)}. Given: {shown(given)}")
    return found


def _density(given: float, strategy: Strategy) -> float:
    """1 for linear, which keeps every value; LoRAX's default of 0 is no density of the others."""
    if not 0 <= given <= 1 or (given == 0 and strategy != "linear"):
        raise ValidationError(f"`density` must be > 0.0 and <= 1.0. Given: {shown(given)}")
    return 1.0 if strategy == "linear" else given
