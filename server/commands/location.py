"""Which store a command means that works on one without a server: the flags of `serve` that say so, and opening it.

Owns these flags and the refusal to make a store where one was expected. A catalog or blobs elsewhere are named by
ADAPTERD_CATALOG_URL and ADAPTERD_BLOBS_URL, as for the server: a command line is no place for a password.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import NotFoundError
from ..settings import Settings, default_store
from .terminal import settings_of

if TYPE_CHECKING:  # it takes long to import
    from adapters_store.store import Store


def _help(name: str) -> str:
    return Settings.model_fields[name].description or ""


Root = Annotated[Path | None, typer.Option("--store", help=_help("store"), file_okay=False, show_default=False)]


@dataclass(frozen=True)
class Location:
    """Where the store is; None = as ADAPTERD_* variables and defaults say."""

    root: Path | None

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """The store, made if need be. Raises: StoreError."""
        from adapters_store.store import open_store

        settings = self._settings
        with open_store(
            self._root, settings.catalog_url, settings.blobs_url, cache_bytes=settings.blob_cache_mb << 20
        ) as store:
            yield store

    @contextmanager
    def existing(self) -> Iterator[Store]:
        """Raises: NotFoundError where no store is; StoreError."""
        if self._settings.catalog_url is None and not (self._root / "catalog.sqlite3").is_file():
            raise NotFoundError(f"there is no store in {self._root}")
        with self.opened() as store:
            yield store

    @property
    def _root(self) -> Path:
        return self._settings.store or default_store()

    @property
    def _settings(self) -> Settings:
        return settings_of(**({} if self.root is None else {"store": self.root}))
