"""Listing: every page in its order, nothing twice, and a limit or cursor that cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from adapters_store.errors import Invalid
from adapters_store.store import MAX_PAGE, Store

from .conftest import Upload
from .places import Place

EVERYWHERE = True


def test_pages_show_every_name_once_newest_first(store: Store, upload: Upload) -> None:
    for number in range(7):
        upload(store, "acme", f"adapter/{number}", a=b"%d" % number)
    upload(store, "acme", "adapter/2", a=b"new")
    upload(store, "zeta", "other", a=b"1")
    seen, cursor, pages = [], None, 0
    while pages == 0 or cursor is not None:
        records, cursor = store.list("acme", limit=3, cursor=cursor)
        seen += [(record.name, record.version) for record in records]
        pages += 1
    assert seen == [(f"adapter/{n}", 2 if n == 2 else 1) for n in (2, 6, 5, 4, 3, 1, 0)]
    assert pages == 3
    assert store.list("acme", limit=7)[1] is None
    assert (store.count("acme"), store.count("zeta"), store.count()) == (7, 1, 8)


def test_a_name_published_between_two_pages_is_not_shown_twice(store: Store, upload: Upload) -> None:
    for name in "abcd":
        upload(store, "acme", name, a=name.encode())
    first, cursor = store.list("acme", limit=2)
    upload(store, "acme", "d", a=b"again")
    upload(store, "acme", "e", a=b"e")
    second, _ = store.list("acme", limit=2, cursor=cursor)
    assert [record.name for record in first + second] == ["d", "c", "b", "a"]


def test_records_of_one_instant_are_paged_by_name(place: Place, upload: Upload, clock: Callable[..., object]) -> None:
    instant = clock()
    with place.open(clock=lambda: instant) as store:
        for name in "bcBa":  # by bytes, not as a language sorts them
            upload(store, "acme", name, a=b"1")
        first, cursor = store.list("acme", limit=1)
        rest, _ = store.list("acme", cursor=cursor)
        assert [record.name for record in first + rest] == ["c", "b", "a", "B"]


def test_users_are_paged_by_id(store: Store, upload: Upload) -> None:
    upload(store, "acme", "support", a=b"1")
    for user in ("c@x.org", "a@x.org", "b@x.org", "B@x.org"):
        store.bind_user("acme", user, "support")
    first, cursor = store.list_users("acme", limit=2)
    rest, end = store.list_users("acme", limit=2, cursor=cursor)
    assert [binding.user_id for binding in first + rest] == ["B@x.org", "a@x.org", "b@x.org", "c@x.org"]
    assert end is None


@pytest.mark.parametrize("limit", [0, -1, MAX_PAGE + 1, 10**30])
def test_a_limit_out_of_range_is_refused(store: Store, limit: int) -> None:
    for call in (store.list, store.list_users):
        with pytest.raises(Invalid, match=f"^limit: must be between 1 and {MAX_PAGE}, got {limit}"):
            call("acme", limit=limit)


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "====",
        "AAAA",
        "é",
        "Li4v",
        "MDAwMS0wMS0wMVQwMDowMDowMCsyMzo1OSB4",
        "eA",
        "eA===",
        "e A==",
        "MjAyNi0wMS0wMVQwMDowMDowMCB4 ",
        "\x00",
        "A" * 10_000,
    ],
)
def test_a_cursor_that_no_page_gave_is_refused(store: Store, cursor: str) -> None:
    for call in (store.list, store.list_users):
        with pytest.raises(Invalid, match=r"^cursor: must be one that a page of this listing gave"):
            call("acme", cursor=cursor)
