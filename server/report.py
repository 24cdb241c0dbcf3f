"""What `adapterd adapters check` shows a person. Decides nothing; the report's facts are `server/check.py`'s."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from adapters_store.records import JSON

from .check import Verdict


def render_verdict(directory: Path, verdict: Verdict) -> RenderableType:
    """Headline, parts, and the files that make the upload."""
    refusal = verdict.refusal
    against = f"against {escape(verdict.model)} (base weights: {verdict.base_weights})"
    if refusal is not None:
        said = f"[red]{escape(str(directory))} would be refused[/] {against}\n{escape(str(refusal))}"
        return Group(said, *_files(verdict))
    details = verdict.to_json()
    head = f"[green]{escape(str(directory))} would be {escape('+'.join(_listed(details['methods'])))}[/] {against}"
    return Group(head, Padding(_parts(details), (1, 0)), *_modules(details), *_labels(details), *_files(verdict))


def _parts(details: Mapping[str, JSON]) -> Table:
    table = Table("method", "pool", box=None, pad_edge=False)
    for name in ("sites", "parameters", "bytes", "virtual tokens"):
        table.add_column(name, justify="right")
    for part in _mappings(details["parts"]):
        table.add_row(str(part["method"]), str(part["pool"] or "-"), *_numbers(part))
    table.add_row("all", "", *_numbers({**details, "sites": _sum(details, "sites")}))
    return table


def _numbers(counts: Mapping[str, JSON]) -> list[str]:
    return [f"{counts[name]:,}" for name in ("sites", "parameters", "bytes", "virtual_tokens")]


def _sum(details: Mapping[str, JSON], name: str) -> int:
    return sum(count for part in _mappings(details["parts"]) if isinstance(count := part[name], int))


def _modules(details: Mapping[str, JSON]) -> Iterator[str]:
    for part in _mappings(details["parts"]):
        if isinstance(part["modules"], Mapping) and part["modules"]:
            shown = ", ".join(f"{name} x{count}" for name, count in part["modules"].items())
            yield escape(f"{part['method']} at: {shown}")


def _labels(details: Mapping[str, JSON]) -> Iterator[str]:
    """The classes of a head or of a verbalizer, wherever the family that has some told of them."""
    for name, told in details.items():
        if isinstance(told, Mapping) and isinstance(told.get("labels"), list):
            yield escape(f"{name} labels: {', '.join(_listed(told['labels']))}")


def _files(verdict: Verdict) -> Iterator[str]:
    yield escape(f"files: {', '.join(verdict.files) or 'none'}")
    if verdict.left_out:
        yield escape(f"left out: {', '.join(verdict.left_out)}")
    yield f"digest: {verdict.digest}"


def _mappings(value: JSON) -> list[Mapping[str, JSON]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _listed(value: JSON) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []
