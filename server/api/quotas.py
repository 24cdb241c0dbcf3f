"""What a tenant's policy lets one request ask for. Checked before any work; what the server allows nobody is in `rules`."""

from __future__ import annotations

from ..errors import QuotaError
from ..tenancy.policy import TenantPolicy


def check_answers(field: str, count: int, policy: TenantPolicy) -> None:
    """`count` answers, or texts, of one request. Raises: QuotaError."""
    _check("max_n", policy.max_n, f"`{field}`", count)


def check_stops(count: int, policy: TenantPolicy) -> None:
    """Raises: QuotaError."""
    _check("max_stop_sequences", policy.max_stop_sequences, "`stop` sequences", count)


def check_tokens(count: int, policy: TenantPolicy) -> None:
    """All that one call may compute must fit into a minute's tokens, or it would begin what it can never end.

    Raises: QuotaError.
    """
    _check("tokens_per_minute", policy.tokens_per_minute, "tokens, prompts and new ones together", count)


def new_tokens(wanted: int | None, room: int, prompt_tokens: int, policy: TenantPolicy) -> int:
    """How many a request may have: what it names, or as many as fit into the context, the policy and a minute's tokens.

    Raises: QuotaError for more than the policy allows.
    """
    _check("max_new_tokens", policy.max_new_tokens, "`max_new_tokens`", 1 if wanted is None else wanted)
    if wanted is not None:
        return wanted
    left = None if policy.tokens_per_minute is None else max(1, policy.tokens_per_minute - prompt_tokens)
    return min(most for most in (room, policy.max_new_tokens, left) if most is not None)


def default_new_tokens(default: int, policy: TenantPolicy) -> int:
    """What a wire format gives a request that names none, as far as the policy allows."""
    return default if policy.max_new_tokens is None else max(1, min(default, policy.max_new_tokens))


def _check(limit: str, most: int | None, what: str, given: int) -> None:
    if most is not None and given > most:
        raise QuotaError(f"{limit} of this tenant is {most}. Given: {str(given)[:20]} {what}", limit)
