"""`adapterd adapters`: adapters of a running server, and what needs none: checking and converting a directory."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

from adapters_store.names import check_name

from .remote import LOCAL, ApiKey, Remote, Url
from .terminal import DEFAULT_MODEL, complain, settings_of

app = typer.Typer(no_args_is_help=True, help="Adapters of a running server.")

Saved = Annotated[Path, typer.Argument(help="What save_pretrained() wrote.", exists=True, file_okay=False)]

Shared = Annotated[bool, typer.Option("--shared", help="One that all tenants may use; takes a key with scope admin.")]


@app.command("upload")
def upload(
    adapter_id: Annotated[str, typer.Argument(help="The name to publish it under.")],
    directory: Saved,
    shared: Shared = False,
    url: Url = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Upload an adapter's directory, and those in it that hold an adapter as its further parts; prints the record."""
    from ..checkpoints.folder import Folder
    from ..checkpoints.parts import parts_of

    files = Folder.of(directory).files
    parts_of(files)  # what is missing or pickled need not travel to be refused
    with ExitStack() as opened:
        streams = {name: opened.enter_context(path.open("rb")) for name, path in files.items()}
        parts = [("files", (name, stream, "application/octet-stream")) for name, stream in streams.items()]
        server = Remote(url, api_key, timeout=600)
        server.show("POST", "/adapters", params=_shared(shared), data={"adapter_id": adapter_id}, files=parts)


@app.command("list")
def list_adapters(url: Url = LOCAL, api_key: ApiKey = None) -> None:
    """Every adapter that the tenant may use, newest first."""
    table = Table("adapter_id", "version", "method", "state", "bytes", "digest", "", box=None)
    for record in Remote(url, api_key).pages("/adapters", "adapters"):
        columns = ("adapter_id", "version", "method", "state", "size_bytes")
        table.add_row(*(str(record[column]) for column in columns), record["digest"][:12], "shared" if record["shared"] else "")
    Console().print(table)


@app.command("show")
def show(adapter_id: str, url: Url = LOCAL, api_key: ApiKey = None) -> None:
    """One adapter's record."""
    Remote(url, api_key).show("GET", f"/adapters/{quote(adapter_id)}")


@app.command("delete")
def delete(
    adapter_id: str,
    only: Annotated[int | None, typer.Option("--version", help="One version; all of them without.")] = None,
    shared: Shared = False,
    url: Url = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Delete an adapter; requests in flight finish."""
    params = _shared(shared) | ({} if only is None else {"version": str(only)})
    Remote(url, api_key).show("DELETE", f"/adapters/{quote(adapter_id)}", params=params)


def _shared(shared: bool) -> dict[str, str]:
    return {"shared": "true"} if shared else {}


@app.command("check")
def check(
    directory: Saved,
    model: Annotated[
        str, typer.Option("--model", envvar="ADAPTERD_MODEL", help="The base to check it against.")
    ] = DEFAULT_MODEL,
    tenant: Annotated[str, typer.Option("--tenant", help="Whose upload it would be; the digest is that tenant's.")] = "default",
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Offline: what an upload of this directory would be, or why it would be refused (exit status 1)."""
    from ..check import check_directory
    from ..model.pull import console_report
    from ..report import render_verdict

    with console_report() as report:
        verdict = check_directory(directory, settings_of(model=model), report, check_name("tenant", tenant))
    if as_json:
        print(json.dumps(verdict.to_json(), indent=2))
    else:
        Console().print(render_verdict(directory, verdict))
    if verdict.refusal is not None:
        complain(str(verdict.refusal))
        sys.exit(1)


@app.command("convert")
def convert(
    directory: Saved,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write; beside the pickles without it.")] = None,
) -> None:
    """Turn the pickled weights (.bin) of an adapter that you trust into safetensors; nothing is deleted."""
    from ..checkpoints.folder import convert as converted

    for done in converted(directory, out or directory):
        print(f"{done.source} -> {done.target} ({done.tensors} tensors)")
