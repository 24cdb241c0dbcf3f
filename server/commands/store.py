"""`adapterd store`: the store itself, without a server or beside one: verify, collect, export, import.

Owns where an archive lies and what a person reads. What is done is adapters_store's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

import pydantic
import typer
from rich.console import Console
from rich.table import Table

from adapters_store.errors import Invalid
from adapters_store.records import JSON

from ..errors import ConflictError
from ..tenancy.policy import TenantPolicy
from .location import Location, Root
from .terminal import complain

GRACE_SECONDS = 3600.0  # the server's own, at its start

app = typer.Typer(no_args_is_help=True, help="The store of adapters, without a server or beside one.")


@app.command("verify")
def verify(root: Root = None) -> None:
    """Read every byte of every adapter and print what is damaged or missing (exit status 1)."""
    with Location(root).existing() as store:
        damage = store.verify()
        count = store.count()
    if not damage:
        print(f"{count} adapters, no damage")
        return
    table = Table("sha256", "problem", "needed by", box=None)
    for fault in damage:
        table.add_row(fault.blob, fault.problem, ", ".join(fault.versions))
    Console(soft_wrap=True).print(table)
    complain(
        f"{len(damage)} files are damaged or missing; uploading the same adapters again, or importing an export, repairs them"
    )
    sys.exit(1)


@app.command("gc")
def gc(
    root: Root = None,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds that what was deleted, or never published, is kept.")
    ] = GRACE_SECONDS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be freed.")] = False,
) -> None:
    """Free what deleted adapters held, and what broken uploads left."""
    with Location(root).existing() as store:
        found = store.gc(grace, dry_run=dry_run)
    print(f"{'would free' if dry_run else 'freed'} {found.blobs} files, {found.size_bytes} bytes")


@app.command("export")
def export(
    archive: Annotated[Path, typer.Argument(help="The tar file to write; it may not exist yet.", dir_okay=False)],
    tenants: Annotated[list[str] | None, typer.Argument(help="The tenants to export.", show_default=False)] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Export every tenant.")] = False,
    root: Root = None,
) -> None:
    """Write tenants' adapters, users and policies (never keys) into one tar file, every byte checked."""
    if everyone == bool(tenants):
        complain("name the tenants to export, or give --all")
        sys.exit(2)
    with Location(root).existing() as store, _new_file(archive) as target:
        done = store.export_to(target, None if everyone else tenants)
    print(f"{done.tenants} tenants, {done.versions} versions, {done.users} users, {done.blobs} files, {done.size_bytes} bytes")


@app.command("import")
def import_(
    archive: Annotated[Path, typer.Argument(help="What export wrote.", exists=True, dir_okay=False)],
    root: Root = None,
) -> None:
    """Add what an export holds to the store, every byte checked; all of it or nothing. May be done again."""
    with archive.open("rb") as source, Location(root).opened() as store:
        done = store.import_from(source, _check_policy)
    print(
        f"{done.tenants} tenants, {done.versions} versions ({done.new_versions} new), {done.new_users} users bound, "
        f"{done.size_bytes} bytes"
    )


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that only we may read, under its name once it is whole and on the disk. Raises: ConflictError; OSError."""
    if path.exists():
        raise ConflictError(f"{path} exists; nothing is overwritten")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _check_policy(policy: Mapping[str, JSON]) -> None:
    """Raises: Invalid."""
    try:
        TenantPolicy.model_validate(policy)
    except pydantic.ValidationError as error:
        raise Invalid("archive", "every tenant's policy must be one", str(error.errors()[0]["loc"])) from error
