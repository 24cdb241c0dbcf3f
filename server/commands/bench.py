"""`adapterd bench` and `adapterd bench-int8`: flags in, a report out. The measuring is `server/bench`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import typer
from rich.console import Console

from ..bench.options import BenchOptions
from ..settings import default_home
from .terminal import DEFAULT_MODEL, console

JsonPath = Annotated[Path | None, typer.Option("--json", help="Also write the report to this file, as JSON.")]


def add_to(app: typer.Typer) -> None:
    """Make both of them commands of `app`."""
    app.command("bench", help="Offer load to a running server and measure it.")(_with_bench_options(_bench))
    app.command("bench-int8")(bench_int8)


def _with_bench_options(function: Callable[..., None]) -> Callable[..., None]:
    """One option for each field of `BenchOptions`, and `--json`."""
    hints = get_type_hints(BenchOptions)
    params = [_bench_option(field, hints[field.name]) for field in dataclasses.fields(BenchOptions)]
    params.append(inspect.Parameter("json_path", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=JsonPath))
    function.__signature__ = inspect.Signature(params)  # type: ignore[attr-defined]  # what typer reads
    function.__annotations__ = {param.name: param.annotation for param in params}
    return function


def _bench_option(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    flag = "--" + field.name.replace("_", "-")
    listed = get_origin(hint) is tuple
    kind = str if listed or get_origin(hint) is Literal else hint
    default: Any = ",".join(field.default) if listed and isinstance(field.default, tuple) else field.default
    option = typer.Option(f"{flag}/--no-{flag[2:]}" if hint is bool else flag, help=BenchOptions.help()[field.name])
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _bench(json_path: Path | None, families: str, api_keys: str, **flags: Any) -> None:
    from ..bench.run import render, run_bench, to_json

    flags["families"] = tuple(families.split(","))
    flags["api_keys"] = tuple(key for key in api_keys.split(",") if key)
    report = run_bench(BenchOptions(**flags))
    Console(width=200).print(render(report))
    if json_path is not None:
        json_path.write_text(to_json(report))
    if report.failed:
        sys.exit(1)


def bench_int8(
    model: Annotated[str, typer.Option("--model", envvar="ADAPTERD_MODEL", help="The base model.")] = DEFAULT_MODEL,
    text: Annotated[Path | None, typer.Option("--text", help="Plain text to score; a bundled one without it.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, max=256, help="Sequences decoded at once.")] = 8,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=100, help="Of decoding; figures are medians.")] = 5,
    json_path: JsonPath = None,
) -> None:
    """What `--quantize int8` costs in accuracy and gives in speed: perplexity and decoding, with it and without."""
    from ..bench.int8 import compare_int8, prose, render_int8
    from ..model.pull import console_report, resolve

    with console_report() as report:
        directory = resolve(model, default_home(), report)
    read = prose() if text is None else text.read_text(encoding="utf-8")
    found = compare_int8(directory, read, rows, rounds, lambda line: console.print(line))
    Console(width=120).print(render_int8(found))
    if json_path is not None:
        json_path.write_text(json.dumps(dataclasses.asdict(found), indent=2))
