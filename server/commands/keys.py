"""`adapterd keys`: API keys of a store, made and revoked beside a running server or without one.

Works on the store itself, so whoever may write it needs no key. Shows a key once, when it is made.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from adapters_store.records import KeyRecord

from ..tenancy.scopes import SCOPES, unknown_scope
from .location import Location, Root
from .terminal import complain

app = typer.Typer(no_args_is_help=True, help="API keys of a store; a running server heeds them within two seconds.")


@app.command("create")
def create(
    tenant: Annotated[str, typer.Option("--tenant", help="Whose key; the tenant is made if need be.")],
    scopes: Annotated[str, typer.Option("--scopes", help=f"What it may be used for: {', '.join(SCOPES)}.")] = "infer,adapters",
    note: Annotated[str, typer.Option("--note", help="What it is for, for people.")] = "",
    store: Root = None,
) -> None:
    """Make a key; prints it as the last line, and nowhere else ever."""
    wanted = [scope.strip() for scope in scopes.split(",")]
    strange = unknown_scope(wanted)
    if strange is not None:
        complain(f"--scopes must be among {', '.join(SCOPES)} (got {strange!r})")
        sys.exit(2)
    with Location(store).opened() as opened:
        made = opened.add_key(tenant, wanted, note)
    print(f"key {made.record.id} of tenant {tenant}, for {', '.join(made.record.scopes)}; it is shown this once:")
    print(made.text)


@app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Of one tenant only.")] = None, store: Root = None
) -> None:
    """Every key ever made, newest first; never the keys themselves."""
    with Location(store).existing() as opened:
        records = opened.list_keys(tenant)
    table = Table("id", "tenant", "scopes", "state", "created", "note", box=None)
    for record in records:
        created = record.created_at.isoformat(timespec="seconds")
        table.add_row(record.id, record.tenant, ",".join(record.scopes), _state(record), created, record.note)
    Console().print(table)


@app.command("revoke")
def revoke(key_id: Annotated[str, typer.Argument(help="The key's id, as `list` shows it.")], store: Root = None) -> None:
    """A key that works no more, within two seconds on every server that runs."""
    with Location(store).existing() as opened:
        record = opened.revoke_key(key_id)
    print(f"key {record.id} of tenant {record.tenant} is revoked")


def _state(record: KeyRecord) -> str:
    return "works" if record.revoked_at is None else f"revoked {record.revoked_at.isoformat(timespec='seconds')}"
