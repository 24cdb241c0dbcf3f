"""Residency: single-flight loading, least-recently-used eviction by slots and by bytes, pins, slot numbers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.digest import Digest
from server.engine.footprint import Footprint, SiteBytes
from server.engine.residency import AdapterFacts, Placement, Residency
from server.tenancy.holdings import IDLE
from server.tenancy.policy import OPEN, TenantPolicy

A, B, C, D = (Digest(letter * 64) for letter in "abcd")


def ready(residency: Residency, digest: Digest, *pools: str) -> None:
    assert residency.want(digest)
    residency.loaded(digest, AdapterFacts(pools))


def test_a_second_want_does_not_load_again() -> None:
    residency = Residency(2)
    assert residency.want(A)
    assert not residency.want(A)
    assert residency.state(A) == ("loading", None)
    residency.loaded(A, AdapterFacts(("ia3",)))
    assert not residency.want(A)
    residency.place(A)
    assert residency.state(A) == ("resident", None)
    assert not residency.want(A)


def test_a_failed_load_keeps_its_reason_until_it_is_wanted_again() -> None:
    residency = Residency(2)
    residency.want(A)
    residency.failed(A, "unreadable")
    assert residency.state(A) == ("failed", "unreadable")
    assert residency.want(A)
    assert residency.state(A) == ("loading", None)


def test_the_least_recently_used_unpinned_adapter_leaves() -> None:
    residency = Residency(2)
    for digest in (A, B):
        ready(residency, digest, "lora:16")
        residency.place(digest)
    residency.acquire([A])
    residency.release([A])  # A was used after B
    ready(residency, C, "lora:16")
    placement = residency.place(C)
    assert placement is not None
    assert placement.evicted == ((B, {"lora:16": 2}),)
    assert placement.slots == {"lora:16": 2}


def test_pinned_adapters_are_never_evicted() -> None:
    residency = Residency(1)
    ready(residency, A, "ia3")
    residency.place(A)
    residency.acquire([A])
    ready(residency, B, "ia3")
    assert residency.place(B) is None
    assert residency.unload(A) is None
    residency.release([A])
    assert residency.place(B) is not None


def test_the_other_adapters_of_a_request_are_kept() -> None:
    residency = Residency(1)
    ready(residency, A, "ia3")
    residency.place(A)
    ready(residency, B, "ia3")
    assert residency.place(B, keep=(A, B)) is None


def test_pools_number_their_slots_on_their_own_lowest_first() -> None:
    residency = Residency(3)
    ready(residency, A, "lora:16", "bias")
    ready(residency, B, "lora:8")
    assert residency.place(A) is not None
    placement = residency.place(B)
    assert placement is not None
    assert residency.slots(A) == {"lora:16": 1, "bias": 1}
    assert placement.slots == {"lora:8": 1}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["want", "place", "acquire", "release", "unload"]), st.integers(0, 5)), max_size=60))
def test_slots_are_never_shared_and_capacity_never_passed(operations: list[tuple[str, int]]) -> None:
    residency = Residency(3)
    digests = [Digest(f"{n:064x}") for n in range(6)]
    pins: dict[Digest, int] = {}
    for what, n in operations:
        digest = digests[n]
        if what == "want" and residency.want(digest):
            residency.loaded(digest, AdapterFacts(("p",) if n % 2 else ("p", "q")))
        elif what == "place" and digest in residency.loaded_only:
            residency.place(digest)
        elif what == "acquire" and residency.is_resident(digest):
            residency.acquire([digest])
            pins[digest] = pins.get(digest, 0) + 1
        elif what == "release" and pins.get(digest):
            residency.release([digest])
            pins[digest] -= 1
        elif what == "unload":
            assert (residency.unload(digest) is None) or not pins.get(digest)
        assert residency.used <= 3
        assert all(residency.is_resident(d) for d, count in pins.items() if count)
        for pool in ("p", "q"):
            used = [residency.slots(d)[pool] for d in residency.resident if pool in residency.slots(d)]
            assert len(used) == len(set(used))
            assert all(1 <= slot <= 3 for slot in used)


def weighty(residency: Residency, digest: Digest, pool: str, module: str = "q", per_slot: int = 10, own: int = 0) -> None:
    assert residency.want(digest)
    residency.loaded(digest, AdapterFacts((pool,), footprint=Footprint({(pool, module): SiteBytes(per_slot, own)})))


def test_bytes_evict_as_slots_do_least_recently_used_first() -> None:
    residency = Residency(8, budget=100)
    for digest, pool in ((A, "full"), (B, "ia3")):
        weighty(residency, digest, pool, per_slot=0, own=50)
        assert residency.place(digest) == Placement({pool: 1}, ())
    assert residency.nbytes == 100
    weighty(residency, C, "bitfit", per_slot=0, own=60)
    assert residency.place(C) == Placement({"bitfit": 1}, ((A, {"full": 1}), (B, {"ia3": 1})))
    assert residency.nbytes == 60
    weighty(residency, A, "full", per_slot=0, own=40)
    assert residency.place(A) == Placement({"full": 1}, ())


def test_a_pool_that_may_not_grow_gives_its_own_slots_again() -> None:
    residency = Residency(8, budget=40)
    for digest in (A, B):
        weighty(residency, digest, "lora:8")
        residency.place(digest)
    assert residency.nbytes == 40  # the identity, two adapters, and one free slot
    weighty(residency, C, "lora:8")
    assert residency.place(C) == Placement({"lora:8": 3}, ())
    weighty(residency, D, "lora:8")
    assert residency.place(D) == Placement({"lora:8": 1}, ((A, {"lora:8": 1}),))


def test_nobody_is_evicted_in_vain() -> None:
    residency = Residency(8, budget=100)
    weighty(residency, A, "full", per_slot=0, own=70)
    weighty(residency, B, "ia3", per_slot=0, own=10)
    residency.place(A)
    residency.place(B)
    residency.acquire([A])
    weighty(residency, C, "bitfit", per_slot=0, own=40)
    assert residency.place(C) is None
    assert residency.place(C) is None
    assert residency.resident == (B, A)
    residency.release([A])
    assert residency.place(C) == Placement({"bitfit": 1}, ((B, {"ia3": 1}), (A, {"full": 1})))


def test_a_placement_that_failed_succeeds_once_something_is_released() -> None:
    residency = Residency(8, budget=60)
    for digest in (A, B, C, D):
        weighty(residency, digest, "lora:8")
    for digest in (A, B, C):
        residency.place(digest)
    residency.acquire([A, B, C])
    assert residency.place(D) is None
    residency.release([C])
    assert residency.place(D) == Placement({"lora:8": 3}, ((C, {"lora:8": 3}),))


def test_an_adapter_that_is_kept_at_a_high_slot_goes_and_comes_back_lower() -> None:
    """A composition whose adapters fit the device must never wait for itself."""
    residency = Residency(8, budget=60)
    for digest in (B, C, A):
        weighty(residency, digest, "lora:8")
        residency.place(digest)
    weighty(residency, D, "full", per_slot=0, own=30)
    assert residency.nbytes == 40
    assert residency.needed([A, D]) == 50
    placement = residency.place(D, keep=(A, D))
    assert placement is not None
    assert [digest for digest, _ in placement.evicted] == [B, C, A]
    weighty(residency, A, "lora:8")
    assert residency.place(A, keep=(A, D)) == Placement({"lora:8": 1}, ())
    assert residency.nbytes == 50


def test_what_adapters_need_together_is_known_in_whatever_order_they_come() -> None:
    residency = Residency(8, budget=1000)
    weighty(residency, A, "lora:8", "q")
    weighty(residency, B, "lora:8", "v", per_slot=100)
    residency.place(A)
    assert residency.needed([A]) == 20
    assert residency.needed([A, B]) == residency.needed([B, A]) == 2 * 10 + 3 * 100


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["want", "acquire", "release", "unload"]), st.integers(0, 5)), max_size=60))
def test_the_budget_is_never_passed_and_all_is_given_back(operations: list[tuple[str, int]]) -> None:
    residency = Residency(5, budget=150)
    digests = [Digest(f"{n:064x}") for n in range(6)]
    pins: dict[Digest, int] = {}
    for what, n in operations:
        digest = digests[n]
        if what == "want" and residency.want(digest):
            footprint = Footprint({(f"p{n % 2}", "q"): SiteBytes(7, n)}, loose=5 * n)
            residency.loaded(digest, AdapterFacts((f"p{n % 2}",), footprint=footprint))
        elif what == "acquire" and residency.is_resident(digest):
            residency.acquire([digest])
            pins[digest] = pins.get(digest, 0) + 1
        elif what == "release" and pins.get(digest):
            residency.release([digest])
            pins[digest] -= 1
        elif what == "unload":
            residency.unload(digest)
        for waiting in residency.loaded_only:
            residency.place(waiting)
        assert residency.nbytes <= 150
        assert all(residency.is_resident(d) for d, count in pins.items() if count)
    for digest in residency.resident:
        residency.release([digest] * pins.get(digest, 0))
        residency.unload(digest)
    assert residency.nbytes == 0


# -- tenants


def numbered(prefix: str, n: int) -> Digest:
    return Digest.of(f"{prefix}{n}".encode())


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def use(residency: Residency, digest: Digest, tenant: str, policy: TenantPolicy = OPEN) -> bool:
    """Load, place and run one request through an adapter; false when it got no slot."""
    if not residency.is_resident(digest):
        if residency.want(digest):
            residency.loaded(digest, AdapterFacts(("lora:16",)))
        if residency.place(digest, (), tenant, policy) is None:
            return False
    residency.acquire([digest], tenant, policy)
    residency.release([digest])
    return True


def test_a_thousand_adapters_of_one_tenant_evict_none_of_anothers_working_set() -> None:
    clock = Clock()
    residency = Residency(8, clock=clock)
    mine = [numbered("victim", n) for n in range(3)]
    for digest in mine:
        assert use(residency, digest, "victim")
    for n in range(1000):
        clock.now += 0.05
        assert use(residency, numbered("attacker", n), "attacker")
        assert all(residency.is_resident(digest) for digest in mine)
        if n % 1000 == 500:
            assert use(residency, mine[0], "victim")  # once in 25 s is enough
    assert residency.used == 8


def test_slots_that_nobody_uses_are_lent_and_given_back() -> None:
    clock = Clock()
    residency = Residency(4, clock=clock)
    for n in range(2):
        use(residency, numbered("owner", n), "owner")
    clock.now = IDLE + 1
    for n in range(9):
        use(residency, numbered("borrower", n), "borrower")
    assert not any(residency.is_resident(numbered("owner", n)) for n in range(2))
    for n in range(3):
        assert use(residency, numbered("owner", n), "owner")
    kept = [digest for digest in residency.resident if digest in {numbered("borrower", n) for n in range(9)}]
    assert kept == [numbered("borrower", 7), numbered("borrower", 8)]


def test_a_shared_adapter_is_whose_used_it_last() -> None:
    residency = Residency(2, clock=Clock())
    use(residency, A, "a")
    use(residency, A, "b")
    use(residency, B, "b")
    use(residency, C, "a")
    assert residency.resident == (B, C)  # a held nothing any more, so b gave its oldest


def test_a_placement_that_failed_is_tried_again_once_others_have_become_idle() -> None:
    clock = Clock()
    residency = Residency(2, clock=clock)
    use(residency, A, "victim")
    ready(residency, B, "ia3")
    residency.place(B, (), "attacker")
    residency.acquire([B], "attacker")
    ready(residency, C, "ia3")
    assert residency.place(C, (), "attacker") is None
    assert residency.is_stuck(C, (), "attacker")
    clock.now = IDLE + 1
    assert not residency.is_stuck(C, (), "attacker")
    assert residency.place(C, (), "attacker") is not None
    assert residency.resident == (B, C)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.booleans()), min_size=10, max_size=80),
    st.integers(1, 6),
    st.sampled_from([None, 1, 2]),
)
def test_no_busy_tenant_is_pushed_below_its_share_and_everybody_is_served(
    uses: list[tuple[str, int, bool]], capacity: int, cap: int | None
) -> None:
    clock = Clock()
    residency = Residency(capacity, clock=clock)
    policies = {"a": TenantPolicy(max_slots=cap), "b": TenantPolicy(weight=2), "c": OPEN}

    def held() -> dict[str, float]:
        owners = [entry.holder.tenant for entry in residency._resident.values()]
        return {tenant: owners.count(tenant) / policies[tenant].weight for tenant in "abc"}

    for tenant, n, late in uses:
        before = held()
        assert use(residency, numbered(tenant, n), tenant, policies[tenant])  # nothing is pinned, so there is always a way
        after = held()
        for other in set("abc") - {tenant}:
            # Whoever lost one had more than the winner has now, or the winner had none.
            assert after[other] == before[other] or before[other] > before[tenant] or not before[tenant]
        assert cap is None or after["a"] <= cap
        assert residency.used <= capacity
        clock.now += 1.0 if late else 0.0
    assert set(residency._holders) == {entry.holder.tenant for entry in residency._resident.values()}
