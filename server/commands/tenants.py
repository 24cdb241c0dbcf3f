"""`adapterd tenants`: what each tenant of a store may have. `set` has one flag per field of `TenantPolicy`, made from it.

Works on the store itself, beside a running server or without one.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapters_store.errors import NotFound
from adapters_store.records import TenantRecord

from ..tenancy.policy import TenantPolicy
from .location import Location, Root
from .terminal import complain_of

if TYPE_CHECKING:
    from adapters_store.store import Store

app = typer.Typer(
    no_args_is_help=True, help="What each tenant of a store may have; a running server heeds it within two seconds."
)

Name = Annotated[str, typer.Argument(help="The tenant.")]
UNSET = "none"  # what a flag takes to go back to the default


def _with_policy(function: Callable[..., None]) -> Callable[..., None]:
    """The tenant, one option for each field of `TenantPolicy`, and `--store`."""
    fixed = list(inspect.signature(function, eval_str=True).parameters.values())
    params = [param for param in fixed if param.kind is not inspect.Parameter.VAR_KEYWORD]
    params[1:1] = [_option(name, field) for name, field in TenantPolicy.model_fields.items()]
    function.__signature__ = inspect.Signature(params)  # type: ignore[attr-defined]  # what typer reads
    function.__annotations__ = {param.name: param.annotation for param in params}
    return function


def _option(name: str, field: pydantic.fields.FieldInfo) -> inspect.Parameter:
    default = "no limit" if field.default is None else field.default
    text = f"{field.description} " + escape(f"[default: {default}]")
    option = typer.Option("--" + name.replace("_", "-"), help=text, metavar="VALUE", show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option])


@app.command("set", help=f"Make a tenant, or change what is named of its policy; `{UNSET}` goes back to the default.")
@_with_policy
def _set(name: Name, *, store: Root = None, **fields: str | None) -> None:
    said = {field: value for field, value in fields.items() if value is not None}
    with Location(store).opened() as opened:
        policy = {**_policy_of(opened, name), **said}
        kept = {field: value for field, value in policy.items() if value != UNSET}
        try:
            checked = TenantPolicy.model_validate(kept)
        except pydantic.ValidationError as error:
            complain_of(error)
            sys.exit(2)
        _show(opened.put_tenant(name, checked.model_dump(exclude_unset=True)))


@app.command("list")
def list_tenants(store: Root = None) -> None:
    """Every tenant with a policy or a key, and what of its policy is not the default."""
    with Location(store).existing() as opened:
        records = opened.list_tenants()
    table = Table("tenant", "created", "policy", box=None)
    for record in records:
        policy = " ".join(f"{field}={value}" for field, value in record.policy.items())
        table.add_row(record.name, record.created_at.isoformat(timespec="seconds"), policy)
    Console().print(table)


@app.command("show")
def show(name: Name, store: Root = None) -> None:
    """One tenant's policy, and how much it keeps."""
    with Location(store).existing() as opened:
        record, usage = opened.tenant(name), opened.usage(name)
    _show(record, adapters=usage.adapters, adapter_bytes=usage.size_bytes)


@app.command("delete")
def delete(
    name: Name,
    adapters: Annotated[bool, typer.Option("--adapters", help="Its adapters too; refused if it has any without.")] = False,
    store: Root = None,
) -> None:
    """Forget a tenant: its keys are revoked, its users unbound."""
    with Location(store).existing() as opened:
        gone = opened.delete_tenant(name, adapters=adapters)
    print(f"tenant {name} is gone, and {len(gone)} adapters with it")


def _policy_of(store: Store, name: str) -> dict[str, Any]:
    try:
        return dict(store.tenant(name).policy)
    except NotFound:
        return {}


def _show(record: TenantRecord, **usage: int) -> None:
    shown = {"name": record.name, "policy": record.policy, "created_at": record.created_at.isoformat()}
    print(json.dumps(shown | ({"keeps": usage} if usage else {}), indent=2))
