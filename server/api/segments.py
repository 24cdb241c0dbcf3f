"""How ids stand in routes: `{adapter_id:id}` takes the rest of the path, whatever it holds. Says nothing of what an id may be.

Starlette's own `path` stops at a line break: an id with one would be no route at all (404) instead of a wrong id (400, 422).
"""

from __future__ import annotations

from starlette.convertors import Convertor, register_url_convertor


class IdConvertor(Convertor[str]):
    """Any text, slashes and line breaks included."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("id", IdConvertor())
