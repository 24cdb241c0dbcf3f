"""A running server as the commands see it: where it is, the key to show it, its records and its refusals.

Speaks HTTP only, so a command can do nothing that a client could not.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import complain

if TYPE_CHECKING:  # takes a tenth of a second to import, and most commands speak to no server
    import httpx

LOCAL = "http://127.0.0.1:8080"

Url = Annotated[str, typer.Option("--url", envvar="ADAPTERD_URL", help="The server to talk to.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="ADAPTERD_API_KEY", show_envvar=True, help="The key to show it, if it asks for one."),
]


class Remote:
    """One server. A refusal, or no answer, is one line on stderr and ends the command with status 1.

    Usage:
        remote = Remote("http://127.0.0.1:8080", api_key=None)
        remote.show("GET", "/adapters/support")
    """

    def __init__(self, url: str, api_key: str | None, timeout: float = 60) -> None:
        """`timeout` is in seconds."""
        self._url = url.rstrip("/")
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._timeout = timeout

    def ask(self, verb: str, path: str, **request: Any) -> httpx.Response:
        """The answer, if it is a good one. `request` is what `httpx.request` takes."""
        import httpx

        url = f"{self._url}{path}"
        try:
            return _checked(httpx.request(verb, url, headers=self._headers, timeout=self._timeout, **request))
        except httpx.RequestError as error:
            complain(f"{url}: {error or type(error).__name__}")
            sys.exit(1)

    def show(self, verb: str, path: str, **request: Any) -> None:
        """Print the answer's JSON, if it has any."""
        response = self.ask(verb, path, **request)
        if response.content:
            print(json.dumps(response.json(), indent=2))

    def pages(self, path: str, key: str) -> list[dict[str, Any]]:
        """Every record of a listing, page by page."""
        records: list[dict[str, Any]] = []
        cursor: dict[str, str] = {}
        while True:
            page = self.ask("GET", path, params=cursor).json()
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
    complain(f"{response.status_code} {message}")
    sys.exit(1)
