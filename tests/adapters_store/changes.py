"""Every change a store can go through, on stores with a random past, and what anybody can see of one: for the tests that kill
and fail in the middle of a change.

What is seen must be what was there before, or what the change makes of it, and nothing between.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

from adapters_store.errors import Unavailable
from adapters_store.store import Store

from .conftest import in_memory

TENANTS = ("acme", "zeta")
NAMES = ("support", "org/sales")
Seen = list[tuple[object, ...]]


def upload(store: Store, tenant: str, name: str, *texts: str) -> None:
    with store.stage() as staged:
        staged.write("adapter_config.json", [b"the same in every adapter"])
        for number, text in enumerate(texts):
            staged.write(f"weights-{number}", [b"weights ", text.encode()])
        store.publish(staged, tenant=tenant, name=name, method="lora", parts=("lora",), details={"rank": 8})


def past(root: Path, random: Random) -> None:
    """A store to which several things have happened; acme's support is there, and something to collect."""
    with Store.open(root) as store:
        for step in range(random.randint(1, 6)):
            tenant, name = random.choice(TENANTS), random.choice(NAMES)
            upload(store, tenant, name, f"{step} {random.randint(0, 2)}")
            store.bind_user(tenant, f"user-{random.randint(0, 2)}", name)
            if random.random() < 0.4:
                store.delete(tenant, name)
        upload(store, "acme", "gone", "deleted")
        store.delete("acme", "gone")
        upload(store, "acme", "support", "kept", *("more" for _ in range(random.randint(0, 1))))
        store.bind_user("acme", "ann@example.org", "support")


@cache
def archive() -> bytes:
    """An export of a tenant that no past has."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as directory, Store.open(Path(directory)) as store:
        for text in ("one", "two"):
            upload(store, "omega", "support", text)
        store.bind_user("omega", "ann", "support")
        store.put_tenant("omega", {"weight": 2.0})
        target = io.BytesIO()
        store.export_to(target)
        return target.getvalue()


CHANGES: dict[str, Callable[[Store], object]] = {
    "publish": lambda store: upload(store, "acme", "support", "new", "and more of it"),
    "delete": lambda store: store.delete("acme", "support"),
    "bind": lambda store: store.bind_user("acme", "new@example.org", "support"),
    "unbind": lambda store: store.delete_user("acme", "ann@example.org"),
    "collect": lambda store: store.gc(0),
    "import": lambda store: store.import_from(io.BytesIO(archive())),
}


def seen(store: Store) -> Seen:
    """Everything: each version with its content, each user, each policy; not when it happened."""
    found: Seen = []
    for tenant in store._catalog.transfer.take(None):
        found += [(tenant.tenant, tenant.policy, *sorted(tenant.last_versions.items()))]
        found += [(user.user_id, user.adapter_id) for user in tenant.users]
        for record in tenant.versions:
            files = {name: path.read_bytes() for name, path in store.files(record.digest).items()}
            found.append((record.name, record.version, record.digest, *sorted(files.items())))
    return found


def before_and_after(prepared: Path, change: str) -> tuple[Seen, Seen]:
    """What is seen of a prepared store, and of a copy of it that the change got through on."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as directory:
        root = Path(shutil.copytree(prepared, Path(directory) / "copy"))
        with Store.open(root) as store:
            before = seen(store)
            CHANGES[change](store)
            return before, seen(store)


def check_whole(store: Store, root: Path) -> None:
    """Every row has its bytes, nothing is left lying about, and what can be collected leaves exactly what is needed."""
    assert store.verify() == ()
    assert len(list((root / "staging").iterdir())) == 1  # this instance's own, and empty
    assert [path for path in (root / "staging").rglob("*") if path.is_file()] == []
    store.gc(0)
    needed = set(store._catalog.dependents())
    assert {blob for blob in store._blobs if store._blobs.intact(blob)} == needed
    assert sum(path.is_file() for path in (root / "blobs").rglob("*")) == len(needed)


def check_goes_on(store: Store, change: str, before: Seen, after: Seen) -> None:
    """Whatever happened: it was before the change or after it, the change can still be made, and so can the next."""
    if seen(store) == before != after:
        CHANGES[change](store)
    assert seen(store) == after
    upload(store, "acme", "next", "the next one")
    assert store.get("acme", "next").version == 1


def raised(call: Callable[[], object]) -> Unavailable | None:
    try:
        call()
    except Unavailable as error:
        return error
    return None
