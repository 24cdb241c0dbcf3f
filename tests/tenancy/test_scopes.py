"""What a key may be used for."""

from __future__ import annotations

from server.tenancy.scopes import SCOPES, known_scopes, unknown_scope


def test_a_scope_that_this_release_does_not_know_grants_nothing() -> None:
    assert known_scopes(("infer", "everything", "Admin")) == {"infer"}
    assert known_scopes(()) == frozenset()
    assert known_scopes(SCOPES) == set(SCOPES)


def test_the_first_strange_scope_is_named() -> None:
    assert unknown_scope(("infer", "fly", "sing")) == "fly"
    assert unknown_scope(SCOPES) is None
