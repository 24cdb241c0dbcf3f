"""Supported: the README's tables of what is served, made from the code that serves it.

Families come from `METHODS`, what they are read from the dialects' own tables: a new one is listed the moment it exists.
Reads no upload and no model.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from .checkpoints.adapterhub_fields import ARCHITECTURES, HEADS, UnionFields
from .checkpoints.adapterhub_fields import Fields as AdapterHubFields
from .checkpoints.peft import READERS
from .checkpoints.peft_fields import CLASSES
from .methods import METHODS
from .methods.base import Method

BEGIN: Final = "<!-- made by `adapterd methods --update README.md` -->"
END: Final = "<!-- end of what is made -->"

#: Values of `peft_type` that this server reads and PEFT does not write.
OWN: Final = frozenset({"BITFIT", "DISCRETE_PROMPT", "HEAD"})
#: AdapterHub's architectures that are not named like the family they become.
_BECOMES: Final[Mapping[str | None, tuple[str, ...]]] = MappingProxyType(
    {None: ("bottleneck",), "lora": ("lora", "dora", "ia3")}
)


@dataclass(frozen=True)
class Family:
    """One line of the table, in markdown."""

    name: str
    summary: str
    sources: str
    served: str


def markdown() -> str:
    """Both tables: the families, and for each dialect what is honoured and what is refused by name."""
    rows = ((f"`{family.name}`", family.summary, family.sources, family.served) for family in families())
    return "\n".join((*_table(("method", "what it is", "read from", "how it is served"), rows), "", *_dialects()))


def updated(readme: str) -> str:
    """`readme` with the tables between its markers made anew. Raises: ValueError when it has no markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"needs a line {BEGIN} and a line {END}")
    return f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{after}"


def families() -> Iterator[Family]:
    for name, method in METHODS.items():
        sources = [*_peft(name), *_adapterhub(name), *([method.also] if method.also else [])]
        served = method.served or _first(inspect.getdoc(type(method)))
        yield Family(name, _summary(method), "; ".join(sources), served)


def _summary(method: Method) -> str:
    """The first paragraph of the family's module: what it computes, and whose it is."""
    return _first(sys.modules[type(method).__module__].__doc__)


def _first(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split()).removesuffix(".")


def _peft(name: str) -> list[str]:
    kinds = [kind for kind, (method, _) in READERS.items() if method == name]
    theirs = [f"`{kind}`" for kind in kinds if kind not in OWN]
    return [*([f"PEFT {', '.join(theirs)}"] if theirs else []), *(f"own `{kind}`" for kind in kinds if kind in OWN)]


def _adapterhub(name: str) -> list[str]:
    found = [_shown(key) for key in ARCHITECTURES if name in _BECOMES.get(key, (key,))]
    heads = [f"`{key}`" for key in HEADS] if name == "head" else []
    return [f"AdapterHub {', '.join([*found, *heads])}"] if found or heads else []


def _shown(architecture: str | None) -> str:
    return "bottleneck" if architecture is None else f"`{architecture}`"


def _dialects() -> Iterator[str]:
    yield "<details><summary>Every field of every dialect: honoured, or refused by name</summary>"
    yield ""
    yield "Fields that are not listed change nothing that a stored adapter computes (they steered its training or its start)."
    yield ""
    yield from _table(("dialect", "honoured", "refused by name unless it is"), _rows())
    yield ""
    yield "</details>"


def _rows() -> Iterator[tuple[str, ...]]:
    for kind in READERS:
        classes = CLASSES[kind]
        refused = {field: values for field, values in sorted(classes.refused.items()) if field not in classes.honoured}
        yield (
            f"{'own' if kind in OWN else 'PEFT'} `{kind}`",
            _code(classes.honoured - {"peft_type"}),
            "; ".join(f"`{field}` {', '.join(map(_value, values))}" for field, values in refused.items()),
        )
    for key, fields in (*ARCHITECTURES.items(), *HEADS.items()):
        if fields is not UnionFields:
            yield _of_adapterhub(_shown(key), fields)


def _of_adapterhub(name: str, fields: type[AdapterHubFields]) -> tuple[str, ...]:
    refused = (f"`{field}` {_value(value)} ({why})" for field, (value, why) in sorted(fields.refused.items()))
    return f"AdapterHub {name}", _code(fields.model_fields), "; ".join(refused)


def _code(names: frozenset[str] | Mapping[str, object]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _value(value: object) -> str:
    return "unset" if value is None else f"`{value!r}`"


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield _row(head)
    yield "|" + "---|" * len(head)
    for row in rows:
        yield _row(row)


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") or "-" for cell in cells) + " |"
