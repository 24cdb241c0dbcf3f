"""Every error a client can see, as one tree; `server/api/app.py` turns it into an answer in one handler.

AdapterdError 500 internal
├── MalformedError 400 validation         a body that is no JSON
├── ValidationError 422 validation        a request's own fields ("Input validation error: ...")
├── AdapterError 422 adapter              an uploaded adapter's field or tensor
├── TooLargeError 413 too_large
├── UnauthorizedError 401 unauthorized
├── ForbiddenError 403 forbidden         a key without the scope that it takes
├── QuotaError 403 quota
├── NotFoundError 404 not_found           missing or foreign: the same answer
├── ConflictError 409 conflict
├── OverloadedError 429 overloaded        carries Retry-After
├── GenerationError 424 generation        a request that was accepted and then failed
└── UnavailableError 503 unavailable      starting, draining or stopped
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Self, TypeVar

E = TypeVar("E", bound="AdapterdError")


def _revived(kind: type[E], arguments: tuple[object, ...], fields: Mapping[str, object]) -> E:
    error = kind.__new__(kind, *arguments)
    vars(error).update(fields)
    return error


class AdapterdError(Exception):
    """Base of the tree. `str(error)` is safe to show to the client that caused it."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "internal"

    @property
    def code(self) -> str:
        """OpenAI's `code` field."""
        return self.error_type

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[object, ...]]:
        """Errors cross the engine's border, so pickling must not run an `__init__` that words the message a second time."""
        return _revived, (type(self), self.args, vars(self).copy())


class MalformedError(AdapterdError):
    status = 400
    error_type = "validation"


class ValidationError(AdapterdError):
    """A field of a request is wrong. The message carries LoRAX's prefix."""

    status = 422
    error_type = "validation"

    def __init__(self, message: str) -> None:
        super().__init__(f"Input validation error: {message}")


class AdapterError(AdapterdError):
    """An uploaded adapter cannot be served as it is; `field` is the config field, tensor or file at fault."""

    status = 422
    error_type = "adapter"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.reason = message


class TooLargeError(AdapterdError):
    status = 413
    error_type = "too_large"


class UnauthorizedError(AdapterdError):
    status = 401
    error_type = "unauthorized"

    @property
    def code(self) -> str:
        return "invalid_api_key"


class ForbiddenError(AdapterdError):
    status = 403
    error_type = "forbidden"


class QuotaError(AdapterdError):
    """More than a tenant may ever have; `limit` is the field of its policy that says so."""

    status = 403
    error_type = "quota"

    def __init__(self, message: str, limit: str = "quota") -> None:
        super().__init__(message)
        self.limit = limit


class NotFoundError(AdapterdError):
    status = 404
    error_type = "not_found"


class ConflictError(AdapterdError):
    status = 409
    error_type = "conflict"


class OverloadedError(AdapterdError):
    """Too much at once; `retry_after` is in seconds, `limit` names what was reached."""

    status = 429
    error_type = "overloaded"

    def __init__(self, message: str = "Model is overloaded", retry_after: float = 1.0, limit: str = "max_waiting") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.limit = limit


class GenerationError(AdapterdError):
    status = 424
    error_type = "generation"


class UnavailableError(AdapterdError):
    """`retry_after` is in seconds, where it is known."""

    status = 503
    error_type = "unavailable"

    def __init__(self, message: str = "the server is not available", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def failure(what: str, error: Exception) -> AdapterdError:
    """What a client is told: its own error as it is, a defect by its type alone."""
    return error if isinstance(error, AdapterdError) else GenerationError(f"{what} failed ({type(error).__name__})")
