"""The `adapterd` command: serve, pull, and the commands of `server/commands` put together.

Owns flags and what a person reads. `serve` has one flag per field of `Settings`, made from it. Heavy imports wait until a
command needs them.
"""

from __future__ import annotations

import inspect
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import pydantic
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapters_store.errors import StoreError

from . import __version__
from .commands import adapters, bench, keys, store, tenants, users
from .commands.terminal import DEFAULT_MODEL, complain, settings_of
from .errors import AdapterdError
from .memory import kept
from .settings import Settings, default_home

if TYPE_CHECKING:  # it takes long to import
    from .metrics import Metrics

app = typer.Typer(no_args_is_help=True, add_completion=False, help="One frozen base model, every user's adapter, one batch.")
app.add_typer(adapters.app, name="adapters")
app.add_typer(users.app, name="users")
app.add_typer(keys.app, name="keys")
app.add_typer(tenants.app, name="tenants")
app.add_typer(store.app, name="store")
bench.add_to(app)


def main() -> None:
    """Run the command line; errors of ours are one line and exit status 1."""
    try:
        app()
    except (AdapterdError, StoreError, OSError) as error:
        complain(f"{error or type(error).__name__}")
        sys.exit(1)


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
    settings = settings_of(**{name: value for name, value in flags.items() if value is not None})
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
        with kept(clean=True):
            from .assembly import assemble, seed_demo
            from .model.pull import console_report
        with kept():
            with console_report() as report:
                server = assemble(settings, report, readiness)
            if settings.demo:
                seed_demo(server)
        with _metrics(settings, server.metrics):
            front.open(server.app, server.engine, settings.drain_seconds)
            _announce(settings, front.url)
            front.wait()


@contextmanager
def _metrics(settings: Settings, metrics: Metrics) -> Iterator[None]:
    """The metrics on a port of their own while the server runs, if that is asked for."""
    from .metrics_port import MetricsPort
    from .serving import bind

    if settings.metrics_port is None:
        yield
        return
    with bind(settings.metrics_host, settings.metrics_port) as listener, MetricsPort(listener, metrics):
        yield


def _announce(settings: Settings, url: str) -> None:
    print(f"adapterd {__version__} serves {settings.model} on {url}", flush=True)
    if settings.demo:
        from .demo import DEMO

        for demo in DEMO:
            print(f"  user {demo.user_id or '-':<6} {demo.name:<22} {demo.method:<20} {demo.what}", flush=True)
    if settings.require_keys:
        store = "" if settings.store is None else f" --store {settings.store}"
        print(f"  requests need a key: adapterd keys create --tenant default --scopes infer,adapters{store}", flush=True)


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
