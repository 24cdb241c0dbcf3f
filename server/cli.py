"""The `adapterd` command: serve, pull, bench, and adapters and users of a running server.

Owns flags and what a person reads. `serve` has one flag per field of `Settings`, made from it; the commands that manage a
server speak HTTP to it, so they can do nothing that a client could not. Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import quote

import httpx
import pydantic
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import __version__
from .bench import BenchOptions, render, run_bench, to_json
from .errors import AdapterdError
from .settings import Settings, default_home

app = typer.Typer(no_args_is_help=True, add_completion=False, help="One frozen base model, every user's adapter, one batch.")
adapters = typer.Typer(no_args_is_help=True, help="Adapters of a running server.")
users = typer.Typer(no_args_is_help=True, help="Which adapter each user goes through.")
app.add_typer(adapters, name="adapters")
app.add_typer(users, name="users")

Url = Annotated[str, typer.Option("--url", envvar="ADAPTERD_URL", help="The server to talk to.")]
LOCAL = "http://127.0.0.1:8080"
DEFAULT_MODEL: str = Settings.model_fields["model"].default
console = Console(stderr=True)


def main() -> None:
    """Run the command line; errors of ours are one line and exit status 1."""
    try:
        app()
    except httpx.RequestError as error:
        _complain(f"{error.request.url}: {error or type(error).__name__}")
        sys.exit(1)
    except (AdapterdError, OSError) as error:
        _complain(f"{error or type(error).__name__}")
        sys.exit(1)


def _complain(what: str) -> None:
    console.print(f"adapterd: {what}", style="red", markup=False, highlight=False, soft_wrap=True)


def _settings(**flags: Any) -> Settings:
    """What the flags and ADAPTERD_* variables say; a value that is wrong is named, and ends the command."""
    try:
        return Settings(**flags)
    except pydantic.ValidationError as error:
        for problem in error.errors():
            name = "--" + str(problem["loc"][0]).replace("_", "-")
            _complain(f"{name} {problem['msg']} (got {problem['input']!r})")
        sys.exit(2)


# -- serve -----------------------------------------------------------------------------------------------------------


def _with_settings(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of `Settings`: the flag, its help and its default come from there."""
    params = [_option(name, field) for name, field in Settings.model_fields.items()]
    function.__signature__ = inspect.Signature(params)  # type: ignore[attr-defined]  # what typer reads
    function.__annotations__ = {param.name: param.annotation for param in params}
    return function


def _option(name: str, field: pydantic.fields.FieldInfo) -> inspect.Parameter:
    """Only what was said goes to `Settings` (None = unsaid), so that ADAPTERD_* variables are heard."""
    flag = "--" + name.replace("_", "-")
    switch = field.annotation is bool
    choices = "|".join(value for value in get_args(field.annotation) if isinstance(value, str))
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if switch else flag,
        help=f"{field.description} " + escape(f"[default: {'unset' if field.default is None else field.default}]"),
        metavar=None if switch else choices or "VALUE",
        show_default=False,
    )
    kind = bool | None if switch else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


@app.command("serve", help="Serve a base model and its tenants' adapters.")
@_with_settings
def _serve(**flags: Any) -> None:
    settings = _settings(**{name: value for name, value in flags.items() if value is not None})
    # While loading there is nothing to drain. As a container's first process we would not even get the default action.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    from . import logs
    from .serving import bind, check_exposure

    logs.configure(settings.log_level, settings.log_format)
    check_exposure(settings)
    with bind(settings.host, settings.port) as listener:  # before the load, which takes long and much memory
        _load_and_serve(settings, listener)


def _load_and_serve(settings: Settings, listener: socket.socket) -> None:
    from .api.readiness import Readiness
    from .serving import Front

    readiness = Readiness("loading")
    with Front(listener, readiness) as front:
        from .assembly import assemble, seed_demo
        from .model.pull import console_report

        with console_report() as report:
            server = assemble(settings, report, readiness)
        if settings.demo:
            seed_demo(server)
        front.open(server.app, server.engine, settings.drain_seconds)
        _announce(settings, front.url)
        front.wait()


def _announce(settings: Settings, url: str) -> None:
    print(f"adapterd {__version__} serves {settings.model} on {url}", flush=True)
    if settings.demo:
        from .demo import DEMO

        for demo in DEMO:
            print(f"  user {demo.user_id or '-':<6} {demo.name:<22} {demo.method:<20} {demo.what}", flush=True)


# -- pull ------------------------------------------------------------------------------------------------------------


@app.command()
def pull(
    model: Annotated[str, typer.Argument(envvar="ADAPTERD_MODEL", help="A short name or a Hub id.")] = DEFAULT_MODEL,
) -> None:
    """Fetch and convert a base model; prints its directory as the last line."""
    from .model.pull import console_report, resolve

    with console_report() as report:
        directory = resolve(model, default_home(), report)
    print(directory)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@app.command()
def methods(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's tables.")] = False,
    update: Annotated[Path | None, typer.Option("--update", help="Rewrite the tables in this README.", dir_okay=False)] = None,
) -> None:
    """The families that are served, and what each is read from."""
    from .supported import families, markdown, updated

    if update is not None:
        update.write_text(updated(update.read_text(encoding="utf-8")), encoding="utf-8")
    elif as_markdown:
        print(markdown())
    else:
        table = Table("method", "read from", box=None)
        for family in families():
            table.add_row(family.name, family.sources)
        Console().print(table)


# -- bench -----------------------------------------------------------------------------------------------------------


def _with_bench_options(function: Callable[..., None]) -> Callable[..., None]:
    """One option for each field of `BenchOptions`, and `--json`."""
    hints = get_type_hints(BenchOptions)
    params = [_bench_option(field, hints[field.name]) for field in dataclasses.fields(BenchOptions)]
    path = Annotated[Path | None, typer.Option("--json", help="Also write the report to this file, as JSON.")]
    params.append(inspect.Parameter("json_path", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=path))
    function.__signature__ = inspect.Signature(params)  # type: ignore[attr-defined]  # what typer reads
    function.__annotations__ = {param.name: param.annotation for param in params}
    return function


def _bench_option(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    flag = "--" + field.name.replace("_", "-")
    listed = field.name == "families"
    kind = str if listed or get_origin(hint) is Literal else hint
    default: Any = ",".join(BenchOptions.families) if listed else field.default
    option = typer.Option(f"{flag}/--no-{flag[2:]}" if hint is bool else flag, help=BenchOptions.help()[field.name])
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


@app.command("bench", help="Offer load to a running server and measure it.")
@_with_bench_options
def _bench(json_path: Path | None, families: str, **flags: Any) -> None:
    flags["families"] = tuple(families.split(","))
    report = run_bench(BenchOptions(**flags))
    Console(width=200).print(render(report))
    if json_path is not None:
        json_path.write_text(to_json(report))
    if report.failed:
        sys.exit(1)


@app.command("bench-int8")
def bench_int8(
    model: Annotated[str, typer.Option("--model", envvar="ADAPTERD_MODEL", help="The base model.")] = DEFAULT_MODEL,
    text: Annotated[Path | None, typer.Option("--text", help="Plain text to score; a bundled one without it.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, max=256, help="Sequences decoded at once.")] = 8,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=100, help="Of decoding; figures are medians.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file, as JSON.")] = None,
) -> None:
    """What `--quantize int8` costs in accuracy and gives in speed: perplexity and decoding, with it and without."""
    from .bench.int8 import compare_int8, prose, render_int8
    from .model.pull import console_report, resolve

    with console_report() as report:
        directory = resolve(model, default_home(), report)
    read = prose() if text is None else text.read_text(encoding="utf-8")
    found = compare_int8(directory, read, rows, rounds, lambda line: console.print(line))
    Console(width=120).print(render_int8(found))
    if json_path is not None:
        json_path.write_text(json.dumps(dataclasses.asdict(found), indent=2))


# -- adapters of a running server --------------------------------------------------------------------------------------


@adapters.command("upload")
def upload(
    adapter_id: Annotated[str, typer.Argument(help="The name to publish it under.")],
    directory: Annotated[Path, typer.Argument(help="What save_pretrained() wrote.", exists=True, file_okay=False)],
    url: Url = LOCAL,
) -> None:
    """Upload an adapter's directory, and those in it that hold an adapter as its further parts; prints the record."""
    from .checkpoints.folder import Folder
    from .checkpoints.parts import parts_of

    files = Folder.of(directory).files
    parts_of(files)  # what is missing or pickled need not travel to be refused
    with ExitStack() as opened, httpx.Client(base_url=url, timeout=600) as client:
        streams = {name: opened.enter_context(path.open("rb")) for name, path in files.items()}
        parts = [("files", (name, stream, "application/octet-stream")) for name, stream in streams.items()]
        _show(client.post("/adapters", data={"adapter_id": adapter_id}, files=parts))


@adapters.command("list")
def list_adapters(url: Url = LOCAL) -> None:
    """Every adapter of the tenant, newest first."""
    table = Table("adapter_id", "version", "method", "state", "bytes", "digest", box=None)
    for record in _pages(url, "/adapters", "adapters"):
        columns = ("adapter_id", "version", "method", "state", "size_bytes")
        table.add_row(*(str(record[column]) for column in columns), record["digest"][:12])
    Console().print(table)


@adapters.command("show")
def show(adapter_id: str, url: Url = LOCAL) -> None:
    """One adapter's record."""
    _show(_get(url, f"/adapters/{quote(adapter_id)}"))


@adapters.command("delete")
def delete(
    adapter_id: str,
    only: Annotated[int | None, typer.Option("--version", help="One version; all of them without.")] = None,
    url: Url = LOCAL,
) -> None:
    """Delete an adapter; requests in flight finish."""
    params = {} if only is None else {"version": only}
    _show(httpx.delete(f"{url}/adapters/{quote(adapter_id)}", params=params, timeout=60))


@adapters.command("check")
def check(
    directory: Annotated[Path, typer.Argument(help="What save_pretrained() wrote.", exists=True, file_okay=False)],
    model: Annotated[
        str, typer.Option("--model", envvar="ADAPTERD_MODEL", help="The base to check it against.")
    ] = DEFAULT_MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Offline: what an upload of this directory would be, or why it would be refused (exit status 1)."""
    from .check import check_directory
    from .model.pull import console_report
    from .report import render_verdict

    with console_report() as report:
        verdict = check_directory(directory, _settings(model=model), report)
    if as_json:
        print(json.dumps(verdict.to_json(), indent=2))
    else:
        Console().print(render_verdict(directory, verdict))
    if verdict.refusal is not None:
        _complain(str(verdict.refusal))
        sys.exit(1)


@adapters.command("convert")
def convert(
    directory: Annotated[Path, typer.Argument(help="What save_pretrained() wrote.", exists=True, file_okay=False)],
    out: Annotated[Path | None, typer.Option("--out", help="Where to write; beside the pickles without it.")] = None,
) -> None:
    """Turn the pickled weights (.bin) of an adapter that you trust into safetensors; nothing is deleted."""
    from .checkpoints.folder import convert as converted

    for done in converted(directory, out or directory):
        print(f"{done.source} -> {done.target} ({done.tensors} tensors)")


@users.command("bind")
def bind(user_id: str, adapter_id: str, url: Url = LOCAL) -> None:
    """Send a user's requests through an adapter."""
    _show(httpx.put(f"{url}/users/{quote(user_id)}", json={"adapter_id": adapter_id}, timeout=60))


@users.command("list")
def list_users(url: Url = LOCAL) -> None:
    """Every binding."""
    table = Table("user_id", "adapter_id", box=None)
    for record in _pages(url, "/users", "users"):
        table.add_row(record["user_id"], record["adapter_id"])
    Console().print(table)


@users.command("unbind")
def unbind(user_id: str, url: Url = LOCAL) -> None:
    """Back to the base model."""
    _show(httpx.delete(f"{url}/users/{quote(user_id)}", timeout=60))


def _get(url: str, path: str, **params: Any) -> httpx.Response:
    return httpx.get(f"{url}{path}", params=params, timeout=60)


def _pages(url: str, path: str, key: str) -> list[dict[str, Any]]:
    """Every record of a listing, page by page."""
    records: list[dict[str, Any]] = []
    cursor: dict[str, str] = {}
    while True:
        page = _checked(_get(url, path, **cursor)).json()
        records += page[key]
        if not page.get("next_cursor"):
            return records
        cursor = {"cursor": page["next_cursor"]}


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        message = str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        message = response.text[:500]
    _complain(f"{response.status_code} {message}")
    sys.exit(1)


def _show(response: httpx.Response) -> None:
    if _checked(response).content:
        print(json.dumps(response.json(), indent=2))
