"""`adapterd users`: which adapter each user of a running server goes through."""

from __future__ import annotations

from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

from .remote import LOCAL, ApiKey, Remote, Url

app = typer.Typer(no_args_is_help=True, help="Which adapter each user goes through.")


@app.command("bind")
def bind(user_id: str, adapter_id: str, url: Url = LOCAL, api_key: ApiKey = None) -> None:
    """Send a user's requests through an adapter."""
    Remote(url, api_key).show("PUT", f"/users/{quote(user_id)}", json={"adapter_id": adapter_id})


@app.command("list")
def list_users(url: Url = LOCAL, api_key: ApiKey = None) -> None:
    """Every binding."""
    table = Table("user_id", "adapter_id", box=None)
    for record in Remote(url, api_key).pages("/users", "users"):
        table.add_row(record["user_id"], record["adapter_id"])
    Console().print(table)


@app.command("unbind")
def unbind(user_id: str, url: Url = LOCAL, api_key: ApiKey = None) -> None:
    """Back to the base model."""
    Remote(url, api_key).show("DELETE", f"/users/{quote(user_id)}")
