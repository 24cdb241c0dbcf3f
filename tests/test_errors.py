"""Errors: the tree in the module's docstring is the tree that exists, and each says what a client may read."""

from __future__ import annotations

import pickle
import re

import pytest

from server import errors
from server.errors import (
    AdapterdError,
    AdapterError,
    GenerationError,
    OverloadedError,
    QuotaError,
    ValidationError,
)

ALL = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, AdapterdError)}


def test_the_drawn_tree_is_the_one_that_exists() -> None:
    drawn = re.findall(r"(\w+Error) (\d{3}) (\w+)", str(errors.__doc__))
    assert {name: (int(status), kind) for name, status, kind in drawn} == {
        name: (kind.status, kind.error_type) for name, kind in ALL.items()
    }


def test_every_error_is_below_the_one_root() -> None:
    assert all(kind.__mro__[1:3] == (AdapterdError, Exception) for kind in ALL.values() if kind is not AdapterdError)


@pytest.mark.parametrize("name", sorted(ALL))
def test_an_error_says_its_message_and_has_a_code(name: str) -> None:
    kind = ALL[name]
    error = kind("rank", "is too large") if kind is AdapterError else kind("rank: is too large")
    assert str(error).endswith("rank: is too large")
    assert error.code == ("invalid_api_key" if kind is errors.UnauthorizedError else error.error_type)  # OpenAI's own word
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (kind, str(error), vars(error))
    assert 400 <= error.status < 600


def test_a_validation_error_speaks_as_lorax_does() -> None:
    assert str(ValidationError("`top_p` must be > 0.0")) == "Input validation error: `top_p` must be > 0.0"


def test_an_adapter_error_names_the_field_apart() -> None:
    error = AdapterError("lora_A", "has shape [3], the base model needs [4]")
    assert (error.field, str(error)) == ("lora_A", "lora_A: has shape [3], the base model needs [4]")


def test_an_overload_says_when_to_come_back() -> None:
    assert (str(OverloadedError()), OverloadedError().retry_after) == ("Model is overloaded", 1.0)
    assert OverloadedError("full", retry_after=7.5).retry_after == 7.5


@pytest.mark.parametrize("error", [OverloadedError("full", 7.5, "max_queued"), QuotaError("at most 2", "max_n")])
def test_a_refusal_names_its_limit_wherever_it_is_sent(error: OverloadedError | QuotaError) -> None:
    revived = pickle.loads(pickle.dumps(error))
    assert (type(revived), str(revived), revived.limit) == (type(error), str(error), error.limit)


def test_only_what_the_server_itself_got_wrong_is_a_500() -> None:
    assert [name for name, kind in ALL.items() if kind.status == 500] == ["AdapterdError"]
    assert GenerationError.status == 424
